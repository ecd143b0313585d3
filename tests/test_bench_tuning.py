"""tools/bench_tuning.py: what it measures with is right, and its commands print their tables."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import pytest
import torch

from kvinv_pl.algorithm.inversion import invert
from kvinv_pl.attention import Selection
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.models.stable_diffusion import Backbone

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module
    sys.path[:] = path


def test_live_memory_is_what_is_alive_and_its_peak(tool: Any):
    measuring = tool("tuning_costs.measuring")
    held = torch.empty(1000, device="meta")
    with measuring.LiveMemory(held) as memory:
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


def test_null_text_inversion_comes_closer_with_every_step_and_stops_by_its_own_rule(tool: Any):
    null_text = tool("tuning_costs.null_text")
    backbone = Backbone.load(str(fits.checkpoint()))
    denoiser = Denoiser(backbone, lambda site: pytest.fail(f"no psi is needed at {site}"), Selection(), 4)
    contexts = backbone.embed(["", fits.SOURCE])[:, None]
    z_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trajectory = invert(denoiser.guided_prediction(contexts, 1.0), z_0, denoiser.table)
        sampled = [trajectory[-1]]
        for i in range(4):
            eps = denoiser.guided_prediction(contexts, 4.0)(sampled[0], denoiser.table.timesteps[i : i + 1])
            sampled.insert(0, denoiser.table.forward(sampled[0], eps, i))

    def missed(inner_steps: int) -> float:
        found, used = null_text.reconstruct(denoiser, trajectory, contexts, 4.0, inner_steps)
        assert len(used) == 4 and all(1 <= n <= max(inner_steps, 1) for n in used)
        return float((found - z_0).square().mean())

    assert missed(10) < missed(1) < float((sampled[0] - z_0).square().mean())
    _, used = null_text.reconstruct(denoiser, torch.stack(sampled), contexts, 4.0)
    assert used[0] == 1  # where the model goes there by itself, the first look is enough


@pytest.mark.slow
def test_the_front_is_printed_with_its_ratios(
    tool: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    models, bench = tool("tuning_costs.models"), tool("bench_tuning")
    tiny = {"sample_size": 16, "block_out_channels": (32,) * 4, "cross_attention_dim": 8}
    tiny["layers_per_block"] = 1
    monkeypatch.setattr(models, "GEOMETRIES", {"sd15": tiny, "sd15-quarter": tiny})
    bench.main(["front", "--geometry=sd15-quarter", "--rounds", "2"])
    out = capsys.readouterr().out
    assert out.count("ratio") == 2 and "GFLOP" in out


def test_flags_may_have_dashes_and_an_unknown_geometry_is_one_line(
    tool: Any, capsys: pytest.CaptureFixture[str]
):
    bench = tool("bench_tuning")
    assert bench._as_declared("--seed-base=7") == "--seed_base=7"
    assert bench._as_declared("-7") == "-7"
    with pytest.raises(SystemExit) as stop:
        bench.main(["front", "--geometry", "none"])
    assert stop.value.code == 2
    assert "expected sd15, sd15-quarter, sd15-half, got none" in capsys.readouterr().err


def test_the_cheapest_way_that_gets_there_is_named(tool: Any):
    curves = tool("tuning_costs.curves")
    points = [curves.Point("a", 10, 0.4, 40), curves.Point("b", 5, 0.6, 39), curves.Point("c", 20, 0.1, 50)]
    assert curves.cheapest(points, 0.5).way == "a"
    assert curves.cheapest(points, 0.05) is None
