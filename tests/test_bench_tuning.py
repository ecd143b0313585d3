"""tools/bench_tuning.py: what it measures with is right, and its commands print their tables."""

from __future__ import annotations

import gc
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvinv_pl.models.costs.counting import LiveMemory

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module
    sys.path[:] = path


def test_live_memory_is_what_is_alive_and_its_peak():
    held = torch.empty(1000, device="meta")
    with LiveMemory(held) as memory:
        a = torch.empty(500, device="meta")
        assert memory.bytes == 6000
        view = a[:10]
        assert memory.bytes == 6000
        del a
        assert memory.bytes == 6000  # the view holds it
        del view
        gc.collect()
        assert (memory.bytes, memory.peak) == (4000, 6000)


def test_alternatives_take_turns_and_their_ratio_is_of_the_same_rounds(tool: Any):
    measuring, order = tool("tuning_costs.measuring"), []
    works = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = measuring.in_turn(works, rounds=2)
    assert order == ["a", "b"] * 3
    assert len(times["a"].seconds) == 2
    halves = measuring.ratio(measuring.Times([1.0, 10.0, 3.0]), measuring.Times([2.0, 20.0, 6.0]))
    assert halves == pytest.approx(0.5)


@pytest.mark.slow
def test_the_front_is_printed_with_its_ratios(
    tool: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    models, bench = tool("tuning_costs.models"), tool("bench_tuning")
    tiny = {"sample_size": 16, "block_out_channels": (32,) * 4, "cross_attention_dim": 8}
    tiny["layers_per_block"] = 1
    monkeypatch.setattr(models, "GEOMETRIES", {"sd15": tiny, "sd15-quarter": tiny})
    tool("calling").call(bench.COMMANDS, ["front", "--geometry=sd15-quarter", "--rounds", "2"])
    out = capsys.readouterr().out
    assert out.count("ratio") == 2 and "GFLOP" in out


def test_a_clock_adds_up_what_each_part_takes_and_a_fit_says_what_is_left(tool: Any):
    beside, ticks = tool("tuning_costs.beside"), iter([1.0, 3.0, 10.0, 11.0, 20.0, 24.0])
    clock = beside.Clock(now=lambda: next(ticks))

    def fails() -> None:
        raise RuntimeError

    assert clock.around("a", lambda x: 2 * x)(3) == 6
    with pytest.raises(RuntimeError):
        clock.around("a", fails)()
    clock.around("b", len)("")
    assert clock.seconds == {"a": 3.0, "b": 4.0}
    fit = beside.Fit(10.0, clock.seconds)
    assert fit.rest == 3.0 and fit.share == 0.3


@pytest.mark.slow
def test_what_a_fit_takes_beside_its_networks_is_printed(
    tool: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    models, bench = tool("tuning_costs.models"), tool("bench_tuning")
    tiny = {"sample_size": 16, "block_out_channels": (32,) * 4, "cross_attention_dim": 64}
    monkeypatch.setattr(models, "GEOMETRIES", {"tiny": {**tiny, "layers_per_block": 1}})
    threads = torch.get_num_threads()
    try:
        tool("calling").call(bench.COMMANDS, ["beside", "--geometry=tiny", "--pixels", "128", "--steps", "1"])
    finally:
        torch.set_num_threads(threads)
    shares = re.findall(r" s +([\d.]+)%", capsys.readouterr().out)
    assert len(shares) == 4 and sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert all(float(share) > 0 for share in shares)


def test_an_unknown_geometry_is_one_line(tool: Any, capsys: pytest.CaptureFixture[str]):
    bench = tool("bench_tuning")
    with pytest.raises(SystemExit) as stop:
        tool("calling").call(bench.COMMANDS, ["front", "--geometry", "none"])
    assert stop.value.code == 2
    assert "expected sd15, sd15-quarter, sd15-half, got none" in capsys.readouterr().err


def test_the_cheapest_way_that_gets_there_is_named(tool: Any):
    curves = tool("tuning_costs.curves")
    points = [curves.Point("a", 10, 0.4, 40), curves.Point("b", 5, 0.6, 39), curves.Point("c", 20, 0.1, 50)]
    assert curves.cheapest(points, 0.5).way == "a"
    assert curves.cheapest(points, 0.05) is None
