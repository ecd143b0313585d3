"""Every file in configs/: each is parsed by all stages, and run on a small checkpoint of its kind."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import Kind, change_json, make
from PIL import Image

from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.attention.config import variant_config
from kvinv_pl.cli.entry import STAGES, main
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.trainer import KVTrainer

# Lightning's command line calls jsonargparse by an older name
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGS = Path(__file__).parents[2] / "configs"
KIND_OF: dict[str, Kind] = {
    "menagerie": "tiny",
    "sd15": "sd15",
    "sd21": "sd21",
    "anything_v3": "anything_v3",
    "paper": "sd15",
    "variants/v_only": "tiny",
    "variants/low_rank": "tiny",
    "variants/recorded": "tiny",
    "variants/masked": "tiny",
}
WITH_MASK = {"variants/masked"}
SECTIONS = {"model": KVInversion, "data": SourceImages, "trainer": KVTrainer}
TUNED_AS_MEASURED = (
    "inner_steps",
    "tolerance",
    "tolerance_growth",
    "carry",
    "reading",
    "start",
    "inversion_guidance",
)
TRAINERS = ("trainer/one_gpu", "trainer/many_gpus", "trainer/many_nodes")
SITE = Site("up_blocks.0.attn1", 1, (2, 2), 8, 2)
every_config = pytest.mark.parametrize("name", KIND_OF)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def printed(capsys: pytest.CaptureFixture[str], stage: str, *args: str) -> dict[str, Any]:
    """What `kvinv STAGE ... --print_config` says that it would work with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([stage, *args, "--image", "cat.png", "--print_config"])
    said = capsys.readouterr()
    assert end.value.code in (0, None), said.err
    return yaml.safe_load(said.out)


def defaults(model: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(model).parameters.items()}


def leaves(tree: dict[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, *path, key)
        else:
            yield (*path, key), value


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def test_every_file_in_configs_is_covered_here() -> None:
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert found == {*KIND_OF, *TRAINERS}


@pytest.mark.parametrize("name", [*KIND_OF, *TRAINERS])
def test_every_key_of_a_config_is_an_option(name: str) -> None:
    config = read(name)
    assert config.keys() <= SECTIONS.keys()
    for section, values in config.items():
        assert values.keys() <= defaults(SECTIONS[section]).keys()


@pytest.mark.parametrize(
    ("name", "stage"),
    # the options of all stages are those of the same three classes
    [
        *((name, "run") for name in [*KIND_OF, *TRAINERS]),
        *(("menagerie", stage) for stage in STAGES if stage != "run"),
    ],
)
def test_every_stage_takes_every_value_of_a_config(
    name: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = printed(capsys, stage, "--config", str(CONFIGS / f"{name}.yaml"))
    for path, value in leaves(read(name)):
        assert at(taken, path) == value, ".".join(path)


def test_a_misspelt_key_in_a_config_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    misspelt = tmp_path / "sd15.yaml"
    misspelt.write_text((CONFIGS / "sd15.yaml").read_text().replace("inner_steps:", "inner_stepz:"))
    with pytest.raises(SystemExit) as end:
        main(["run", "--config", str(misspelt), "--image", "cat.png", "--target", "a dog", "--print_config"])
    assert end.value.code == 2
    assert "inner_stepz" in capsys.readouterr().err


def test_the_config_of_the_menagerie_is_the_defaults_of_the_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    signature = defaults(KVInversion)
    spelled = read("menagerie")["model"]
    assert list(spelled) == list(signature)
    plain = {name: value for name, value in signature.items() if name not in ("attention", "optimizer")}
    assert {name: spelled[name] for name in plain} == plain

    without, taken = (
        printed(capsys, "run"),
        printed(capsys, "run", "--config", str(CONFIGS / "menagerie.yaml")),
    )
    assert taken["model"]["optimizer"] == without["model"]["optimizer"]
    assert taken["trainer"] == without["trainer"]
    variant = KVInversion().variant(SITE)
    assert isinstance(variant, CPAttention)
    assert spelled["attention"] == variant_config(variant)


def test_every_value_of_the_menagerie_config_is_explained() -> None:
    before = ""
    for line in (CONFIGS / "menagerie.yaml").read_text(encoding="utf-8").splitlines():
        is_value = line.startswith("  ") and not line.startswith("   ") and not line.lstrip().startswith("#")
        assert not is_value or before.lstrip().startswith("#"), f"a comment above: {line}"
        before = line


@pytest.mark.parametrize("name", ["sd15", "sd21", "anything_v3"])
def test_a_real_checkpoint_is_tuned_as_was_measured_on_the_embedded_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A better default, once measured, goes into sd15.yaml too."""
    model = printed(capsys, "fit", "--config", str(CONFIGS / f"{name}.yaml"))["model"]
    default = printed(capsys, "fit")["model"]
    assert model["optimizer"] == default["optimizer"]
    assert {key: model[key] for key in TUNED_AS_MEASURED} == {key: default[key] for key in TUNED_AS_MEASURED}


@pytest.mark.parametrize("other", ["tuning_guidance: 1.0", "reading: frozen"])
def test_the_other_readings_of_the_paper_are_one_line_each(
    other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (CONFIGS / "paper.yaml").read_text(encoding="utf-8")
    key, _, value = other.partition(": ")
    lines = text.splitlines()
    assert any(line.startswith("#") and line.endswith(f" {other}") for line in lines)
    replaced = [f"  {other}" if line.startswith(f"  {key}:") else line for line in lines]
    assert replaced != lines
    (tmp_path / "other.yaml").write_text("\n".join(replaced), encoding="utf-8")
    taken = printed(capsys, "run", "--config", str(tmp_path / "other.yaml"))
    assert taken["model"][key] == yaml.safe_load(value)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def small(kind: Kind, home: Path) -> Path:
    """A checkpoint of this kind that says it was made for pictures of 128 px: 512 px take a minute."""
    checkpoint = make(kind, home)
    if kind != "tiny":
        change_json(checkpoint / "unet" / "config.json", sample_size=16, _diffusers_version="0.38.0")
    return checkpoint


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The options of a command that say what is edited and where."""
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(tmp_path / "cat.png")
    where = ["--image", str(tmp_path / "cat.png"), "--out", str(tmp_path / "run")]
    return [*where, "--source", "a cat standing", "--target", "a cat running"]


def masked(name: str, folder: Path) -> list[str]:
    """The mask of the picture in `given`, for a config whose variant needs one."""
    if name not in WITH_MASK:
        return []
    mask = Image.new("L", (48, 40))
    mask.paste(255, (8, 8, 32, 40))
    mask.save(folder / "mask.png")
    return ["--mask", str(folder / "mask.png")]


def quick(kind: Kind, home: Path) -> list[str]:
    short = ["--model.steps", "2", "--model.inner_steps", "1", "--model.retries", "0"]
    return ["--checkpoint", str(small(kind, home)), *short]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@every_config
def test_a_config_edits_a_picture_with_a_checkpoint_of_its_kind(
    name: str, home: Path, tmp_path: Path, given: list[str]
) -> None:
    out, kind, model = tmp_path / "run", KIND_OF[name], read(name)["model"]
    guidance = model.get("guidance") or 7.5  # of any checkpoint but the embedded one
    main(
        [
            "run",
            "--config",
            str(CONFIGS / f"{name}.yaml"),
            *given,
            *masked(name, tmp_path),
            *quick(kind, home),
        ]
    )

    run = record(out)
    assert run["scheduler"]["steps"] == len(run["reconstruction"]["phases"]) == 2
    assert run["scheduler"]["prediction"] == ("v_prediction" if kind == "sd21" else "epsilon")
    assert run["inversion"]["guidance"] == model.get("inversion_guidance", 1.0)
    assert run["tuning"]["guidance"] == (model.get("tuning_guidance") or guidance)
    assert run["tuning"]["carry"] == model.get("carry", True)
    (edit,) = [json.loads(file.read_text(encoding="utf-8")) for file in (out / "edits").glob("*.json")]
    assert (edit["target"], edit["guidance"]) == ("a cat running", guidance)
    assert edit["reading"] == model.get("reading", "frozen")
    assert edit["start"] == model.get("start", 0.0)
    assert run["tuning"]["attention"]["class_path"].endswith(model.get("attention", {}).get("class_path", ""))
    assert run["tuning"]["kv"] == model.get("kv", "stored")
    pictures = {file.relative_to(out).as_posix() for file in out.rglob("*.png")}
    assert {"source.png", "reconstruction.png", "sheet.png", "edits/a-cat-running.png"} <= pictures


def test_the_stages_one_by_one_take_a_config_as_run_does(
    home: Path, tmp_path: Path, given: list[str]
) -> None:
    for stage in ("invert", "fit", "edit"):
        main([stage, "--config", str(CONFIGS / "menagerie.yaml"), *given, *quick("tiny", home)])
    assert (tmp_path / "run" / "sheet.png").exists()


def test_a_run_without_a_config_goes_on_with_that_of_the_menagerie(
    home: Path, tmp_path: Path, given: list[str]
) -> None:
    main(["fit", *given, *quick("tiny", home)])
    tuning = record(tmp_path / "run")["tuning"]
    main(["run", "--config", str(CONFIGS / "menagerie.yaml"), *given, *quick("tiny", home)])
    assert record(tmp_path / "run")["tuning"] == tuning
