"""A mistake is answered by one line and exit code 2, and leaves everything as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from commands import QUICK, kvinv, photograph, refused, signals_as_at_a_terminal, times, tree
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from kvinv_pl.cli.arguments import expand_short_flags, underscored
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.training.devices.launcher import STOPPING

RUN = Path(__file__).parents[1] / "data" / "run_format_1" / "tuned"


@pytest.fixture(scope="session")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, cat.png, and its finished run; to be copied."""
    folder = tmp_path_factory.mktemp("tuned")
    photograph(folder / "cat.png")
    answer = kvinv(
        "run", "--image", folder / "cat.png", "--source", "a cat", "--target", "a dog", "--checkpoint", model,
        *QUICK, "--out", folder / "run",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def run(tuned: Path, tmp_path: Path) -> Path:
    """A finished run of our own."""
    return Path(shutil.copytree(tuned / "run", tmp_path / "run"))


@pytest.fixture
def good(model: Path, tmp_path: Path) -> list[object]:
    """Options that a run could be made of, in a folder that is not there yet."""
    photograph(tmp_path / "cat.png")
    return [
        "--image", tmp_path / "cat.png", "--source", "a cat", "--target", "a dog", "--checkpoint", model,
        *QUICK, "--out", tmp_path / "out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "options", "told"),
    [
        ("edit", ("--data.run", "b", "--run", RUN), f"--run {RUN} and --data.run b disagree"),
        ("edit", ("--run", RUN, "--run", RUN.parent / "killed"), f"--run {RUN} and --run"),
        ("run", ("--image", "a.png", "--data.image=b.png"), "--image a.png and --data.image b.png disagree"),
        ("run", ("--model.steps", 4, "--steps", 5), "--steps 5 and --model.steps 4 disagree"),
        ("run", ("--target", "a", "--data.targets", '["b"]'), "--target a and --data.targets"),
    ],
)
def test_two_flags_of_one_option_that_disagree_are_refused(
    verb: str, options: tuple[object, ...], told: str
) -> None:
    refused(kvinv(verb, *options), told, "give it once")


def test_two_flags_of_one_option_may_say_the_same(tmp_path: Path) -> None:
    line = expand_short_flags(
        "edit", ["--run", str(RUN), "--data.run", f"{RUN}/", "--steps=4", "--model.steps", "4"]
    )
    assert line.argv.count(f"--data.run={RUN}") == 1


def test_a_run_that_is_named_wins_over_that_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("data:\n  run: elsewhere\n")
    shown = kvinv("edit", "--run", RUN, "--config", tmp_path / "other.yaml", "--print_config")
    assert f"run: {RUN}" in shown.out and "elsewhere" not in shown.out


# ---------------------------------------------------------------------------------------------- the picture


def text(file: Path) -> None:
    file.write_text("I am a picture")


def cut(file: Path) -> None:
    file.write_bytes(photograph(file, (200, 200)).read_bytes()[:200])


def dot(file: Path) -> None:
    photograph(file, (1, 1))


def huge(file: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(file)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: None, "expected a picture file at"),
        (lambda file: file.mkdir(), "contains no pictures"),
        (text, "got no such format; save it as one of them (a list of pictures is a .csv"),
        (cut, "cannot be read as a picture: image file is truncated; save it again"),
        (dot, "is 1x1, expected 8 pixels a side or more: take a larger one"),
        (huge, "million pixels: make it smaller"),
        (lambda file: photograph(file, (300, 20)), "300x20, expected at most 8:1"),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused(
    good: list[object], tmp_path: Path, make: Callable[[Path], Any], says: str
) -> None:
    make(tmp_path / "bad.png")
    refused(
        kvinv("run", *good, "--image", tmp_path / "bad.png"), "bad.png" if "8:1" not in says else "", says
    )
    assert not (tmp_path / "out").exists()


def test_the_home_of_nobody_is_refused(good: list[object]) -> None:
    for given in (("world", "--out", "~nobody-here/x"), ("run", *good, "--image", "~nobody-here/x.png")):
        refused(kvinv(*given), "write it in full")


@pytest.mark.parametrize(
    "targets", [(), ("--target", ""), ("--target", "  "), ("--target", "a dog", "--target", "")]
)
def test_no_target_or_an_empty_one_is_refused(
    good: list[object], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    without = good[:4] + good[6:]
    refused(kvinv("run", *without, *targets), "target", "cat.png", "what")
    refused(kvinv("run", *without, "--target"), "--target expects a value, got nothing")
    refused(kvinv("run", "--target", *without), "--target expects a value, got --image")
    assert not (tmp_path / "out").exists()


def test_a_mask_for_a_variant_that_takes_none_is_refused_before_anything_is_done(
    good: list[object], tmp_path: Path
) -> None:
    refused(kvinv("run", *good, "--mask", tmp_path / "cat.png"), "a mask was given, but FullKV takes none")
    assert not (tmp_path / "out").exists()


def test_a_mask_of_another_size_or_none_at_all_is_refused(good: list[object], tmp_path: Path) -> None:
    refused(kvinv("run", *good, "--mask", photograph(tmp_path / "mask.png", (20, 20))), "16x16", "20x20")
    refused(kvinv("run", *good, "--mask", tmp_path / "nope.png"), "nope.png, found nothing")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- the checkpoint


def drop_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def drop_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def cut_weights(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def make_transformer(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = index.pop("unet")
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "there is no folder"),
        (drop_weights, "incomplete"),
        (drop_tokenizer, "incomplete"),
        (cut_weights, "cannot be read"),
        (make_transformer, "FluxPipeline, a transformer model"),
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_checkpoint_that_is_missing_broken_or_of_another_kind_is_refused(
    good: list[object], model: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    damage(copy)
    refused(kvinv("run", *good, "--checkpoint", copy), str(copy), says)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--steps", "-3"], "--steps: expected 1 or more, got -3"),
        (["--steps", "abc"], "--steps: expected a whole number, got 'abc'"),
        (["--steps=5.5"], "--steps: expected a whole number, got '5.5'"),
        (["--model.inner_steps", "abc"], "--model.inner_steps: expected a whole number, got 'abc'"),
        (["--steps", "2000"], "steps must be 1 to 1000, got 2000"),
        (["--guidance", "nan"], "--guidance: expected a number or auto, got 'nan'"),
        (["--guidance", ".nan"], "--guidance: expected a finite number of 0 or more, got nan"),
        (["--guidance", "-1"], "--guidance: expected a finite number of 0 or more, got -1"),
        (["--guidance", "x"], "--guidance: expected a number or auto, got 'x'"),
        (
            ["--model.tuning_guidance", ".nan"],
            "expected a finite number of 0 or more, got nan",
        ),
        (
            ["--model.tolerance", ".nan"],
            "error: --model.tolerance: expected a mean squared error of 0 or more, got nan",
        ),
        (["--model.start=.inf"], "--model.start: expected a share of the steps, 0 to 1, got inf"),
        (["--reading", "frosen"], "--reading: expected frozen or blend, got 'frosen'"),
        (["--start", "2"], "--start: expected a share of the steps, 0 to 1, got 2"),
        (["--seed", "x"], "--seed: expected a whole number, got 'x'"),
        (["--overwrite", "maybe"], "--overwrite: expected true or false, got 'maybe'"),
        (["--stepz", "5"], "no option --stepz: did you mean --steps"),
        (["--model.stepz", "5"], "no option --model.stepz: did you mean --model.steps"),
        (["--step", "5"], "no option --step: did you mean --steps"),
        (["--run", "x"], "no option --run"),
        (["cat", "standing"], "unexpected 'cat standing': put text of several words in quotes"),
        (["--out"], "--out expects a value, got nothing"),
        (["--model.attention", "nope"], "no attention variant 'nope': expected one of"),
        (
            ["--model.attention", "FullKV", "--model.attention.start", "none"],
            "start: expected one of 'zeros', ",
        ),
        (
            ["--model.attention", "full_kv", "--model.attention.noise", "3"],
            "FullKV takes no argument 'noise'",
        ),
        (
            ["--model.optimizer", "Zork"],
            "--model.optimizer: expected the class_path of an Optimizer, got 'Zork'",
        ),
        (["--model.optimizer", "Adam", "--model.optimizer.lr", "-1"], "optimizer: Invalid learning rate: -1"),
        (["--model.target_modules", "nope"], "no self-attention matches"),
        (["--trainer.max_epochs", "3"], "an epoch is one timestep"),
        (["--trainer.precision", "64-true"], "--trainer.precision: expected auto, 32-true"),
        (["--trainer.accelerator", "qpu"], "invalid accelerator"),
        (["--config", "nope.yaml"], "--config: there is no file nope.yaml"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(
    good: list[object], tmp_path: Path, options: list[str], says: str
) -> None:
    refused(kvinv("run", *good, *options), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("model: [unclosed\n x: :", "bad.yaml is not a configuration: expected YAML"),
        ("- a\n- b\n", "bad.yaml is not a configuration: expected YAML"),
        ("model:\n  stepz: 5\n", "no option 'model.stepz': did you mean model.steps"),
        ("steps: 5\n", "no option 'steps': did you mean model.steps"),
        ("model:\n  steps: many\n", "model.steps: expected a whole number, got 'many'"),
        ("model:\n  guidance: .nan\n", "guidance: expected a finite number of 0 or more, got nan"),
        (
            "model:\n  attention: {class_path: nope.Nope}\n",
            "model.attention: expected the class_path of a CPAttention",
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(
    good: list[object], tmp_path: Path, yaml: str, says: str
) -> None:
    (tmp_path / "bad.yaml").write_text(yaml)
    without = good[:8] + good[12:]  # what the file says is not overridden
    refused(kvinv("run", *without, "--config", tmp_path / "bad.yaml"), says)
    assert not (tmp_path / "out").exists()


def test_an_unknown_command_or_option_is_answered_with_what_was_meant() -> None:
    refused(kvinv("edti"), "no command 'edti': did you mean edit")
    refused(kvinv("world", "--sede", 7), "no option --sede: did you mean --seed")
    refused(kvinv("bench", "--data.seed_base", 7), "no option --data.seed_base: did you mean --seed_base")
    refused(kvinv("mask", "--image.width", 7), "no option --image.width; see")
    refused(kvinv("world", "--seed", "x"), "--seed: expected a whole number, got 'x'")
    refused(kvinv("world", "--seed", -1), "seed: expected 0 or more, got -1")
    refused(kvinv("variants", "all"), "no attention variant 'all'")


@pytest.mark.parametrize("given", [("--seed-base", "x"), ("--seed_base", "x"), ("--seed-base=x",)])
def test_an_option_may_be_typed_with_hyphens(given: tuple[str, ...]) -> None:
    for verb in ("bench", "ablate"):
        refused(kvinv(verb, *given), "--seed_base: expected a whole number, got 'x'")
    stage = [flag.replace("seed", "model.inner").replace("base", "steps") for flag in given]
    refused(kvinv("fit", *stage), "--model.inner_steps: expected a whole number, got 'x'")
    assert underscored("--data.source=a-b") == "--data.source=a-b" and underscored("-o") == "-o"


def test_a_list_without_images_or_with_broken_lines_is_refused(good: list[object], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("picture,source\na.png,a cat\n")
    refused(
        kvinv("run", *good, "--image", tmp_path / "list.csv"),
        "has the columns picture, source: expected image",
    )
    (tmp_path / "list.jsonl").write_text('{"image": "cat.png"}\n{"image"\n')
    refused(kvinv("run", *good, "--image", tmp_path / "list.jsonl"), "line 2 of", "is not JSON")
    (tmp_path / "late.csv").write_text("image\nnone.png\nnope.png\n")
    refused(kvinv("run", *good, "--image", tmp_path / "late.csv"), "nope.png, found nothing")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- the run folder


def test_a_run_of_another_picture_prompt_or_model_is_refused_and_kept(
    good: list[object], run: Path, model: Path, tmp_path: Path
) -> None:
    before = {name: (run / name).read_bytes() for name in tree(run)}
    other = Path(shutil.copytree(model, tmp_path / "other"))
    checkpoints.change_json(other / "vae" / "config.json", scaling_factor=0.5)
    changes = {
        "with another --image (": ["--image", photograph(tmp_path / "other.png", seed=1)],
        "source": ["--source", "a rabbit"],
        "with --checkpoint = ": ["--checkpoint", other],
        "with --steps = 2, not 3": ["--steps", 3],
        "with another --model.timestep_spacing (timesteps.0 = ": ["--model.timestep_spacing", "linspace"],
        "with --model.tolerance_growth = 2e-05, not 0.5": ["--model.tolerance_growth", 0.5],
        "with another --model.target_modules (sites": ["--model.target_modules", "encoder"],
        "with --model.max_grid = nothing, not 100": ["--model.max_grid", 100],
        "with --data.geometry = 'keep', not 'crop'": ["--data.geometry", "crop"],
        "with --model.inner_steps = 2, not 3": ["--model.inner_steps", 3],
        "with --model.optimizer.lr = 0.03, not 0.1": [
            *("--model.optimizer", "Adam", "--model.optimizer.lr", 0.1),
        ],
        "with --model.attention.scale = 'layer', not 'head'": [
            *("--model.attention", "full_kv", "--model.attention.scale", "head"),
        ],
    }
    for field, change in changes.items():
        anew = "start again with `kvinv run` or `kvinv fit` and --overwrite"
        refused(kvinv("run", *good, "--out", run, *change), field, "was made with", anew)
        assert {name: (run / name).read_bytes() for name in before} == before


def test_of_many_pictures_one_that_was_made_otherwise_is_told_of_by_the_option(
    good: list[object], tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        photograph(tmp_path / "in" / f"{name}.png", seed=seed)
    folder = tmp_path / "out" / "a"
    assert kvinv("invert", *good, "--out", folder, "--image", tmp_path / "in" / "a.png").code == 0
    answer = kvinv("invert", *good, "--image", tmp_path / "in", "--model.inversion_guidance", 2)
    assert answer.code == 1 and "1 of 2 pictures" in answer.err
    assert f"{folder} was made with --model.inversion_guidance = 1.0, not 2.0: " in answer.err


def test_overwrite_starts_such_a_run_anew_and_goes_on_with_its_own(good: list[object], run: Path) -> None:
    other = [*good, "--out", run, "--source", "a rabbit", "--overwrite"]
    answer = kvinv("run", *other)
    assert answer.code == 0 and "inverting" in answer.err and "tuning" in answer.err
    assert RunStore(run).read_run()["source"] == "a rabbit"
    before = times(run)
    assert kvinv("run", *other).code == 0 and times(run) == before
    answer = kvinv("run", *other, "true", "--model.inner_steps", 1)
    assert answer.code == 0 and "tuning" in answer.err
    assert RunStore(run).read_run()["tuning"]["inner_steps"] == 1


@pytest.mark.parametrize("name", ["trajectory.safetensors", "steps/1.safetensors"])
def test_an_altered_file_is_refused_by_its_name(good: list[object], run: Path, name: str) -> None:
    if name.startswith("trajectory"):  # which is read where something is still to be tuned
        shutil.rmtree(run / "steps")
    data = bytearray((run / name).read_bytes())
    data[-5] ^= 1
    (run / name).write_bytes(data)
    for verb, *options in (
        ["run", *good, "--out", run, "--start", 0.5],
        ["edit", "--run", run, "--target", "a fox"],
    ):
        answer = kvinv(verb, *options)
        if verb == "run" or not name.startswith("trajectory"):
            refused(answer, Path(name).name, "is damaged", "delete it")
        else:
            refused(answer, "is not tuned")
    assert (run / name).read_bytes() == bytes(data)


@pytest.mark.parametrize("name", ["trajectory.safetensors", "steps/1.safetensors"])
def test_a_cut_file_is_refused_by_edit_and_made_again_by_run(
    good: list[object], run: Path, name: str
) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:300])
    refused(kvinv("edit", "--run", run, "--target", "a fox"), "run", "kvinv")
    assert kvinv("run", *good, "--out", run).code == 0
    assert kvinv("edit", "--run", run, "--target", "a fox").code == 0


def test_a_damaged_run_json_is_refused(good: list[object], run: Path) -> None:
    for content, says in (
        ("{", "is damaged"),
        ('{"format": 99}', "has format 99, expected 1"),
        ("[]", "format"),
    ):
        (run / "run.json").write_text(content)
        refused(kvinv("edit", "--run", run, "--target", "a fox"), "run.json", says)
        refused(kvinv("run", *good, "--out", run), "run.json", says)
    (run / "run.json").write_text('{"format": 1, "tuning": {}, "model": {}}')
    refused(kvinv("edit", "--run", run, "--target", "a fox"), "run.json is damaged (it lacks 'checkpoint')")
    refused(kvinv("run", *good, "--out", run), "was made with")


def test_what_a_run_folder_knows_is_not_asked_for_again(good: list[object], run: Path) -> None:
    edit = ["edit", "--run", run, "--target", "a fox"]
    for flag, value in (("--source", "a rabbit"), ("--data.mask", "m.png"), ("--data.geometry", "crop")):
        refused(kvinv(*edit, flag, value), f"{flag} cannot be combined with --run")
    refused(kvinv(*edit, "--image", good[1]), "expected either image or run, got both")
    refused(kvinv(*edit, "--steps", 3), "was made with --steps = 2, not 3")


def test_an_edit_of_what_is_no_finished_run_is_refused(good: list[object], tmp_path: Path) -> None:
    refused(kvinv("edit", "--run", tmp_path, "--target", "a dog"), "is not a run folder")
    refused(kvinv("edit", *good), "is not")
    assert not (tmp_path / "out").exists()
    assert kvinv("invert", *good).code == 0
    refused(kvinv("edit", "--run", tmp_path / "out", "--target", "a dog"), "is not tuned", "kvinv fit")


def test_a_folder_that_cannot_be_written_is_refused(good: list[object], tmp_path: Path) -> None:
    for verb in ("run", "invert"):
        refused(kvinv(verb, *good, "--out", tmp_path / "cat.png" / "out"), "cannot write", "Not a directory")
    refused(kvinv("world", "-o", tmp_path / "cat.png" / "out"), "cannot write", "Not a directory")
    assert tree(tmp_path) == {"cat.png"}


def test_a_run_that_another_process_holds_is_refused(good: list[object], run: Path) -> None:
    before = tree(run)
    with RunStore(run).lock():
        refused(kvinv("run", *good, "--out", run), f"is in use by process {os.getpid()}")
        refused(kvinv("edit", "--run", run, "--target", "a fox"), f"is in use by process {os.getpid()}")
    assert tree(run) == before
    assert kvinv("edit", "--run", run, "--target", "a fox").code == 0


# ------------------------------------------------------------------------------------ while it is under way


def no_room(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_from_the_start_leaves_nothing_half_written(
    good: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as injected:
        injected.setattr("kvinv_pl.data.runs.run_store.os.fsync", no_room)
        refused(
            kvinv("run", *good, "--trainer.logger", "false"), "cannot write", "No space left", "make room"
        )
    assert not (tmp_path / "out").exists()
    assert kvinv("run", *good).code == 0


def test_a_disk_that_fills_while_the_log_is_written_is_said_in_one_line(
    good: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as injected:
        injected.setattr(RecordWriter, "write", no_room)
        refused(kvinv("run", *good), "cannot write", "No space left")
    assert kvinv("run", *good).code == 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have the system refuse to write more bytes to a file of this process."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_disk_that_fills_during_the_fit_loses_no_finished_phase(good: list[object], tmp_path: Path) -> None:
    with files_of_at_most(9_000):
        answer = kvinv("run", *good)
    refused(answer, "cannot write", "File too large", "make room")
    assert not [name for name in tree(tmp_path / "out") if "tmp" in name]
    assert (tmp_path / "out" / "trajectory.safetensors").exists()
    before = times(tmp_path / "out")
    assert kvinv("run", *good).code == 0
    assert before.items() <= times(tmp_path / "out").items()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a process")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_goes_on_where_it_was(
    sent: signal.Signals,
    code: int,
    good: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process; tests/training/test_strategy.py sends signals to another one."""
    slower = [*good, "--steps", 5, "--model.tolerance_growth", 0]
    save_step = RunStore.save_step

    def save(self: RunStore, i: int, *rest: Any) -> None:
        save_step(self, i, *rest)
        if i == 1:
            os.kill(os.getpid(), sent)

    with monkeypatch.context() as patched, signals_as_at_a_terminal():
        patched.setattr(RunStore, "save_step", save)
        stopped = kvinv("run", *slower)
    assert stopped.code == code, stopped.err
    assert STOPPING in capfd.readouterr().err.splitlines()
    assert "Traceback" not in stopped.err
    assert stopped.err.splitlines()[-1] == "kvinv: stopped; run the same command to resume"
    assert RunStore(tmp_path / "out").done() == {0, 1}
    made = times(tmp_path / "out")
    answer = kvinv("run", *slower)
    assert answer.code == 0 and "inverting" not in answer.err, answer.err
    assert made.items() <= times(tmp_path / "out").items()


def test_debug_shows_where_an_error_came_from(good: list[object], tmp_path: Path) -> None:
    for answer in (
        kvinv("run", *good, "--image", tmp_path / "nope.png", "--debug"),
        kvinv("world", "--seed", "-1", "--debug"),
    ):
        assert answer.code == 2 and "Traceback" in answer.err and "UserError" in answer.err
        assert answer.err.splitlines()[-1].startswith("kvinv: error: ")
