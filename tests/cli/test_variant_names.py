"""How a variant is named: shortly, by class path, in a file beside the YAML, by another distribution."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fits
import pytest
import yaml
from commands import QUICK, Answer, kvinv, photograph

from kvinv_pl.cli.variant_names import YAML, name_variants_in_yaml

# Lightning's command line calls jsonargparse by an older name
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

LOW_RANK = "kvinv_plugins.low_rank.LowRank"
VARIANT = '''
from typing import Literal

from kvinv_pl import CPAttention, Site

class {name}(CPAttention):
    """{does}

    Args:
        site: Where.
        times: What V is multiplied by.
    """

    def __init__(self, site: Site, times: float = 1.0):
        super().__init__(site)
        self.times = times

    def forward(self, k, v):
        return {returns}
'''


def variant(file: Path, name: str = "Scaled", returns: str = "k, v * self.times") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(VARIANT.format(name=name, does="Scales V.", returns=returns))
    return file


def config(file: Path, attention: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"model": {"attention": attention}}))
    return file


def taken(*args: object) -> Any:
    """The variant that a command would use."""
    answer = kvinv("fit", "--image", "cat.png", *args, "--print_config")
    assert answer.code == 0, answer.err
    return yaml.safe_load(answer.out)["model"]["attention"]


def refused(answer: Answer, says: str) -> None:
    assert answer.code == 2 and says in answer.err, answer.err
    assert answer.err.splitlines()[-1].startswith("kvinv: error: ") and "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("attention", "rank"),
    [
        ("low_rank", 8),
        ("LowRank", 8),
        (LOW_RANK, 8),
        ({"class_path": "low_rank"}, 8),
        ({"class_path": "low_rank", "init_args": {"rank": 3}}, 3),
        ({"class_path": LOW_RANK, "init_args": {"rank": 3}}, 3),
    ],
)
def test_a_variant_is_named_in_yaml_and_its_options_are_overridden_by_flags(
    attention: Any, rank: int, tmp_path: Path
) -> None:
    file = config(tmp_path / "a.yaml", attention)
    found = taken("--config", file)
    assert (found["class_path"], found["init_args"]["rank"]) == (LOW_RANK, rank)
    assert taken("--config", file, "--model.attention.rank", 4)["init_args"]["rank"] == 4


@pytest.mark.parametrize("name", ["low_rank", "LowRank", LOW_RANK])
def test_a_variant_is_named_by_a_flag(name: str, tmp_path: Path) -> None:
    for given in (["--model.attention", name], [f"--model.attention={name}"]):
        found = taken(*given, "--model.attention.rank", 4)
        assert (found["class_path"], found["init_args"]["rank"]) == (LOW_RANK, 4)
    # over a file that names another, whose options do not stay
    file = config(tmp_path / "a.yaml", {"class_path": "full_kv", "init_args": {"start": "source"}})
    assert taken("--config", file, "--model.attention", name)["class_path"] == LOW_RANK


def test_a_variant_that_a_variant_wraps_has_a_short_name_too() -> None:
    name_variants_in_yaml()
    from jsonargparse import get_loader

    inner = {"class_path": "low_rank", "init_args": {"rank": 2}}
    text = {"model": {"attention": {"class_path": "v_only", "init_args": {"inner": inner}}}}
    loaded = get_loader(YAML)(yaml.safe_dump(text))
    assert loaded["model"]["attention"]["init_args"]["inner"]["class_path"] == LOW_RANK
    assert loaded["model"]["attention"]["class_path"] == "kvinv_plugins.v_only.VOnly"
    other = {"data": {"attention": "low_rank"}, "model": {"optimizer": {"class_path": "Adam"}}}
    assert get_loader(YAML)(yaml.safe_dump(other)) == other


def test_a_name_that_nobody_has_is_answered_with_the_nearest(tmp_path: Path) -> None:
    for attention in ("lowrank", {"class_path": "lowrank"}):
        file = config(tmp_path / "a.yaml", attention)
        answer = kvinv("fit", "--image", "cat.png", "--config", file, "--print_config")
        refused(answer, "no attention variant 'lowrank': expected one of full_kv")
        assert "did you mean low_rank" in answer.err
    refused(kvinv("fit", "--image", "cat.png", "--model.attention", "lowrank"), "did you mean low_rank")


def given(folder: Path) -> list[object]:
    photograph(folder / "cat.png")
    return [
        "--image", folder / "cat.png", "--source", "a cat", "--target", "a dog",
        "--checkpoint", fits.checkpoint(), *QUICK,
    ]  # fmt: skip


def test_a_class_in_a_file_beside_the_yaml_goes_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only where the YAML lies in the working directory."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    variant(tmp_path / "mine" / "naming_beside.py")
    file = config(
        tmp_path / "mine" / "a.yaml", {"class_path": "naming_beside.Scaled", "init_args": {"times": 2.0}}
    )
    out = tmp_path / "run"
    answer = kvinv("run", "--config", file, *given(tmp_path), "--out", out)
    assert answer.code == 0, answer.err
    attention = json.loads((out / "run.json").read_text())["tuning"]["attention"]
    assert attention == {"class_path": "naming_beside.Scaled", "init_args": {"times": 2.0}}
    assert kvinv("edit", "--run", out, "--target", "a horse").code == 0


@pytest.mark.parametrize(
    ("returns", "says"),
    [
        ("k, v[..., :1]", "Scaled.forward returned the shape"),
        ("k.long(), v", "Scaled.forward returned torch.int64 at "),
        ("v", "Scaled.forward: expected (k_bar, v_bar), got a Tensor"),
        ("k, v * float('nan')", "the reconstruction is no longer finite at step 0"),
    ],
)
def test_a_variant_that_returns_what_cannot_be_used_is_one_line(
    returns: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = f"naming_wrong_{abs(hash(returns))}"
    variant(tmp_path / f"{module}.py", returns=returns)
    file = config(tmp_path / "a.yaml", f"{module}.Scaled")
    refused(
        kvinv("fit", "--config", file, *given(tmp_path)[:4], *given(tmp_path)[6:], "--out", tmp_path / "run"),
        says,
    )
    assert not list((tmp_path / "run").glob("steps/*"))


def test_a_run_of_another_variant_or_other_sites_is_refused(tmp_path: Path) -> None:
    args = [*given(tmp_path), "--out", tmp_path / "run"]
    assert kvinv("run", *args, "--model.attention", "low_rank", "--model.max_grid", 4).code == 0
    run = tmp_path / "run"
    for other, says in (
        (["--model.attention", "low_rank", "--model.attention.rank", 2, "--model.max_grid", 4], "rank = 8, "),
        (["--model.attention", "low_rank"], "was made with --model.max_grid = 4, not nothing"),
    ):  # fmt: skip
        refused(kvinv("run", *args, *other), says)
    refused(
        kvinv("edit", "--run", run, "--target", "a", "--model.attention", "v_only"),
        "with --model.attention =",
    )
    refused(
        kvinv("edit", "--run", run, "--target", "a", "--model.target_modules", "encoder"),
        "another --model.target_modules (sites",
    )
    answer = kvinv("edit", "--run", run, "--target", "a", "--model.max_grid", 2)
    refused(answer, "--model.max_grid: expected at least 4, got 2")


def installed(folder: Path, distribution: str, entry_point: str, source: str) -> None:
    """One module and one entry point, as pip would leave them."""
    module = entry_point.partition("=")[2].partition(":")[0].strip()
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[kvinv_pl.attention]\n{entry_point}\n")


def test_a_plugin_that_cannot_be_imported_is_told_and_in_the_way_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "sad", "bad = naming_bad:Bad", "raise RuntimeError('out of order')")
    listed = kvinv("variants")
    assert (
        listed.code == 0 and "broken  (sad 1.2)" in listed.out and "RuntimeError: out of order" in listed.out
    )
    assert taken("--model.attention", "v_only")
    says = "the variant 'bad' of sad 1.2 is broken: naming_bad:Bad cannot be imported (RuntimeError: out of"
    refused(kvinv("fit", "--image", "cat.png", "--model.attention", "bad"), says)
    refused(kvinv("sites", "--attention", "bad"), says)


def test_two_plugins_of_one_name_are_refused_with_both_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for owner in ("one", "two"):
        installed(tmp_path, owner, f"same = naming_{owner}:Same", "")
    for command in (["variants"], ["sites"], ["fit", "--image", "cat.png"]):
        answer = kvinv(*command)
        refused(answer, "two attention variants are named 'same'")
        assert "naming_one:Same of one 1.2" in answer.err and "naming_two:Same of two 1.2" in answer.err


def test_the_variant_of_another_distribution_is_there_once_pip_has_installed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built and installed as anybody's package is."""
    for needed in ("pip", "setuptools"):  # not imported: setuptools minds who imported distutils
        if find_spec(needed) is None:
            pytest.skip(f"there is no {needed}")
    project = tmp_path / "project"
    variant(project / "their_variants" / "__init__.py", returns="k, v * self.times")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "their-variants"\nversion = "0.3"\n'
        '[project.entry-points."kvinv_pl.attention"]\nscaled = "their_variants:Scaled"\n'
        '[tool.setuptools]\npackages = ["their_variants"]\n'
    )
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    target = ["--target", str(tmp_path / "site"), str(project)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    listed = kvinv("variants", "scaled")
    assert "scaled      their_variants.Scaled  (their-variants 0.3)" in listed.out, listed.err
    assert "--model.attention.times  a number (default: 1.0)" in listed.out
    args = [*given(tmp_path), "--model.attention", "scaled", "--model.attention.times", "1.5"]
    answer = kvinv("run", *args, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    attention = json.loads((tmp_path / "run" / "run.json").read_text())["tuning"]["attention"]
    assert attention == {"class_path": "their_variants.Scaled", "init_args": {"times": 1.5}}
