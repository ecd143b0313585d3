"""`kvinv variants` and `kvinv sites`, against what a run really leaves."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import get_args

import checkpoints
import fits
import pytest
from commands import kvinv
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]

from kvinv_pl.attention import CPAttention, Site, registry
from kvinv_pl.attention.registry import Variant
from kvinv_pl.cli.commands.variants import sites
from kvinv_pl.data.runs.tensors import DTYPES, StoreDtype
from kvinv_pl.training.module import KVInversion


def rows(out: str) -> list[list[str]]:
    """The columns of every self-attention: mark, path, grid, tokens, width, heads, values, MiB, MiB."""
    lines = [line for line in out.splitlines() if "attn1" in line]
    return [[line[0], *line[1:].replace(",", "").split()] for line in lines]


def test_every_self_attention_is_shown_and_the_chosen_ones_marked_without_weights(bare: Path) -> None:
    answer = kvinv("sites", "--checkpoint", bare, "--size", "32x16")
    assert answer.code == 0, answer.err
    found = rows(answer.out)
    assert "a picture of 32 x 16, latents of 16 x 8" in answer.out
    assert [row[0] for row in found] == ["*" if "up_blocks" in row[1] else " " for row in found]
    assert {row[1].partition(".")[0] for row in found} == {"down_blocks", "mid_block", "up_blocks"}
    first = next(row for row in found if row[1].startswith("down_blocks.0"))
    assert first[2:7] == ["8x16", "128", "16", "2", str(2 * 128 * 16 + 4)]


def test_the_bound_and_the_variant_are_the_ones_asked_for(bare: Path) -> None:
    answer = kvinv(
        "sites", "--checkpoint", bare, "--size", "16x16", "--target_modules", "all", "--max_grid", 4,
        "--attention", "low_rank", "--attention.rank=2",
    )  # fmt: skip
    for mark, _, grid, tokens, width, _, values, *_ in rows(answer.out):
        assert mark == ("*" if grid in ("4x4", "2x2") else " ")
        assert int(values) == 2 * 2 * (int(tokens) + int(width)) + 4


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("kv", ["stored", "replayed"])
def test_the_mebibytes_are_those_that_a_run_leaves_on_disk(kv: str, dtype: str, tmp_path: Path) -> None:
    """Besides z-tilde and the headers of the files."""
    image = fits.picture(tmp_path / "cat.png")
    store = fits.fit(image, tmp_path / "run", kv=kv, attention=LowRank, store_dtype=dtype, steps=2)
    answer = kvinv(
        "sites", "--checkpoint", fits.checkpoint(), "--size", "16x16", "--steps", 2,
        "--attention", "low_rank", "--store_dtype", dtype,
    )  # fmt: skip
    (said,) = re.findall(rf"with kv {kv}: ([\d.]+) MiB", answer.out)
    files = sum(file.stat().st_size for file in (store.folder / "steps").iterdir())
    tensors = sum(len(store.step(i).psi) + 2 * len(store.step(i).kv or ()) for i in range(2))
    z = 2 * store.step(0).z.numel() * 4
    assert 0 <= files - z - float(said) * 2**20 + 0.01 * 2**20 <= 0.02 * 2**20 + 200 * tensors


def test_the_names_of_store_dtype_are_the_module_s(bare: Path) -> None:
    names = get_args(StoreDtype)
    for command in (sites, KVInversion):
        assert inspect.signature(command).parameters["store_dtype"].annotation is StoreDtype
    assert set(names) == set(DTYPES)
    taken = {
        name: rows(kvinv("sites", "--checkpoint", bare, "--size", "32x32", "--store_dtype", name).out)
        for name in names
    }
    # K-hat and V-hat of the first site, (tokens, dim) each, and lambda and gamma; int8 has scales in fp32
    tokens, dim = int(taken["int8"][0][3]), int(taken["int8"][0][4])
    bytes_of = {name: float(found[0][-2]) * 2**20 / 50 for name, found in taken.items()}
    expected = {
        "float32": 4 * (2 * tokens * dim + 4),
        "float16": 2 * (2 * tokens * dim + 4),
        "bfloat16": 2 * (2 * tokens * dim + 4),
        "int8": 2 * tokens * dim + 4 * (2 * dim + 4),
    }
    for name in names:
        assert bytes_of[name] == pytest.approx(expected[name], abs=0.005 * 2**20 / 50 + 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--store_dtype", "int4"], "--store_dtype: expected float16 or bfloat16 or float32 or int8, got"),
        (["--size", "12"], "size: expected WIDTHxHEIGHT in pixels such as 512x768, got '12'"),
        (["--steps", "0"], "steps: expected 1 or more, got 0"),
        (["--max_grid", "1"], "max_grid: expected at least 4, got 1: the smallest of the"),
        (["--target_modules", "nope"], "no self-attention matches"),
        (["--attention", "fullkv"], "no attention variant 'fullkv': expected one of full_kv, "),
        (["--attention", "low_rank", "--attention.rank", "0"], "rank: expected 1 or more, got 0"),
        (["--checkpoint", "/nowhere"], "there is no folder /nowhere"),
        (["--max_gird", "3"], "no option --max_gird: did you mean --max_grid"),
    ],
)
def test_what_cannot_be_meant_is_one_line(bare: Path, options: list[str], says: str) -> None:
    size = [] if "--size" in options else ["--size", "16x16"]
    answer = kvinv("sites", "--checkpoint", bare, *size, *options)
    assert answer.code == 2 and not answer.out
    assert says in answer.err and answer.err.count("\n") == 1


def test_of_a_hub_id_only_configurations_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, fetched = checkpoints.make("tiny", tmp_path), list[str]()

    def download(repository: str, name: str) -> str:
        fetched.append(name)
        target = tmp_path / "cache" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(whole / name, target))

    monkeypatch.setattr("kvinv_pl.models.checkpoints.hub.hf_hub_download", download)
    assert kvinv("sites", "--checkpoint", "somebody/tiny", "--size", "16x16").code == 0
    assert fetched == ["model_index.json", "unet/config.json", "vae/config.json"]


def test_variants_are_listed_with_what_they_learn_on_the_model(bare: Path) -> None:
    out = kvinv("variants", "--checkpoint", bare).out
    counts = {
        name: int(count.replace(",", ""))
        for name, count in re.findall(r"^(\w+) .*\n.*\n +([\d,]+) values of psi for one timestep", out, re.M)
    }
    assert {"full_kv", "low_rank", "recorded", "v_only"} <= counts.keys()
    assert counts["full_kv"] > counts["v_only"] > counts["recorded"] == 0
    assert counts["full_kv"] > counts["low_rank"] > 0
    assert "kvinv_plugins.v_only.VOnly  (kvinv-pl " in out


def test_a_broken_variant_is_listed_with_the_reason_and_one_that_needs_options_with_them(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Needy(CPAttention):
        """Wants to be told something.

        Args:
            site: Where.
            depth: How deep
                it goes.
        """

        def __init__(self, site: Site, depth: int):
            super().__init__(site)

    found = {
        "bad": Variant("bad", None, "sad 1.2", "bad:Bad cannot be imported (ImportError: no)"),
        "needy": Variant("needy", Needy, "theirs 3"),
    }
    monkeypatch.setattr(registry, "variants", lambda: found)
    out = kvinv("variants", "--checkpoint", bare).out
    assert "broken  (sad 1.2)" in out and "bad:Bad cannot be imported (ImportError: no)" in out
    assert "it depends on depth, which must be given" in out
    shown = kvinv("variants", "needy", "--checkpoint", bare).out
    assert "--model.attention.depth  a whole number (must be given)\n      How deep it goes." in shown
    assert "sad 1.2" not in shown


def test_a_variant_is_shown_with_every_option_its_default_and_its_meaning() -> None:
    out = kvinv("variants", "low_rank").out
    assert "--model.attention.rank  a whole number (default: 8)\n      The rank, cut to the" in out
    assert "--model.attention.start  zeros or noise (default: zeros)" in out
    assert "--model.attention.site" not in out and "full_kv" not in out
    for variant in registry.variants().values():
        assert variant.cls and all(option.text for option in registry.options(variant.cls))


def test_a_variant_that_is_not_installed_is_shown_by_its_class_path() -> None:
    answer = kvinv("variants", "kvinv_plugins.low_rank.LowRank")
    assert answer.code == 0 and "(not installed)" in answer.out and "rank" in answer.out
    answer = kvinv("variants", "kvinv_plugins.low_rank.Nothing")
    assert answer.code == 2 and "has no variant 'Nothing'" in answer.err


def test_the_help_of_a_variant_is_asked_for_by_its_name() -> None:
    answer = kvinv("run", "--model.attention.help", "low_rank")
    assert answer.code == 0 and "--model.attention.rank" in answer.out


def test_an_unknown_variant_is_answered_with_the_nearest(bare: Path) -> None:
    answer = kvinv("variants", "low_rnak", "--checkpoint", bare)
    assert answer.code == 2 and "no attention variant 'low_rnak'" in answer.err
    assert answer.err.rstrip().endswith("did you mean low_rank")


def test_without_a_model_the_variants_are_listed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvinv_pl.menagerie.checkpoint", lambda: Path("/nowhere"))
    answer = kvinv("variants")
    assert answer.code == 0 and "full_kv" in answer.out
    assert "how many values of psi they have is not known: /nowhere has no model_index.json" in answer.out
