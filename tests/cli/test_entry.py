"""The command line: what is typed, what is shown, and what lies in the run folder afterwards."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import QUICK, command, kvinv, photograph, process, refused, size, times, tree
from PIL import ExifTags, Image

from kvinv_pl.cli.arguments import SHORT_FLAGS
from kvinv_pl.cli.entry import main
from kvinv_pl.data.images.pictures import open_picture
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.menagerie import ACTIONS
from kvinv_pl.training.datamodule import SourceImages


@pytest.fixture
def cat(model: Path, tmp_path: Path) -> list[object]:
    """The options that every stage of one picture is given."""
    photograph(tmp_path / "cat.png")
    return [
        "--image", tmp_path / "cat.png", "--source", "a cat", "--checkpoint", model, *QUICK,
        "--out", tmp_path / "run",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first run of `cat` leaves, with an edit to a dog; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    options = (
        "--source",
        "a cat",
        "--target",
        "a dog",
        "--checkpoint",
        model,
        *QUICK,
        "--out",
        folder / "run",
    )
    first = kvinv("run", "--image", photograph(folder / "cat.png"), *options)
    assert first.code == 0 and "inverting" in first.err and "tuning" in first.err, first.err
    return folder / "run"


@pytest.fixture
def done(made: Path, tmp_path: Path) -> Path:
    """That run, where `cat` has its own."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def edits(folder: Path) -> dict[str, dict[str, object]]:
    """The settings of every edit, by target."""
    return {record["target"]: record for record, _ in RunStore(folder).edits()}


# ------------------------------------------------------------------------------------------ what it answers


def test_help_answers_without_the_heavy_libraries() -> None:
    script = (
        "import sys, time; began = time.perf_counter()\n"
        "from kvinv_pl.cli import main; main(['--help']); main([])\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy; assert time.perf_counter() - began < 1"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("run", "invert", "fit", "edit", "world", "variants", "check", "new-variant"):
        assert f"\n  {verb}" in done.stdout


def test_waiting_threads_leave_a_busy_machine_its_cores_unless_they_are_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given, kept in ((None, "10000"), ("7", "7")):
        if given:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        else:
            monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        kvinv("--help")
        assert os.environ["GOMP_SPINCOUNT"] == kept


def test_no_arguments_and_help_end_well() -> None:
    for args in (
        (),
        ("--help",),
        ("-h",),
        ("run", "--help"),
        ("world", "--help"),
        ("variants", "-h"),
        ("check", "-h"),
    ):
        answer = kvinv(*args)
        assert answer.code == 0 and answer.out and not answer.err
    assert kvinv("--version").out.startswith("kvinv ")


@pytest.mark.parametrize("verb", ["run", "invert", "fit", "edit"])
def test_the_help_of_a_stage_shows_the_usual_options_first_and_says_what_each_is(verb: str) -> None:
    out = kvinv(verb, "--help").out
    assert out.startswith(f"usage: kvinv {verb} ")
    assert (
        out.index("--image FILE")
        < out.index("--steps N")
        < out.index("--config")
        < out.index("--model.steps")
    )
    told = " ".join(out.split())
    assert "trailing and at least 20: with 10, most edits miss the action (default: 50)" in told
    assert "The source prompt: what the picture shows, in a few words; may be empty" in told
    assert "known subclasses" not in out and re.search(r"\bnull\b", out) is None
    assert ("--run DIR" in out) == (verb == "edit")
    assert max(map(len, out.splitlines())) < 130


@pytest.mark.parametrize(
    ("verb", "idle"),
    [
        ("run", set()),
        ("fit", set()),  # which remembers for the next edit what it makes nothing of
        ("invert", {"--guidance", "--start", "--reading", "--seed"}),
        ("edit", {"--seed"}),
        ("plan", {"--start", "--seed"}),
    ],
)
def test_the_usual_options_of_a_stage_are_those_that_it_makes_something_of(
    verb: str, idle: set[str], cat: list[object]
) -> None:
    usual = kvinv(verb, "--help").out.partition("the usual options:\n")[2].partition("\n\n")[0]
    shown = {line.split()[0] for line in usual.splitlines() if line.startswith("  -")}
    assert shown == {*SHORT_FLAGS, *(["--run"] if verb == "edit" else []), "-c,"} - idle
    assert usual.splitlines()[-1].startswith("  -c, --config FILE ")
    given = [arg for flag in idle for arg in (flag, "blend" if flag == "--reading" else 1)]
    answer = kvinv(verb, *cat, *given, "--print_config")  # taken all the same
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("verb", "bare"),
    [("check", "TARGET"), ("new-variant", "NAME"), ("variants", "[NAME]"), ("mask", "IMAGE")],
)
def test_the_help_of_a_command_says_what_may_stand_without_a_flag(verb: str, bare: str) -> None:
    usage, _, rest = kvinv(verb, "--help").out.partition("\n\n")
    assert f" {bare}" in usage and f"--{bare.strip('[]').lower()} " not in usage
    assert f"`kvinv {verb} " in rest and "does as well" in " ".join(rest.split())
    assert "null" not in rest


def test_a_variant_is_written_and_checked_by_its_bare_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    written = kvinv("new-variant", "bare_named", "-o", "there")
    assert written.code == 0, written.err
    assert set(written.out.split()) == {
        f"there/{name}" for name in ("bare_named.py", "bare_named.yaml", "test_bare_named.py")
    }
    for target, name in (
        (["there/bare_named.py:BareNamed"], "BareNamed"),
        (["--target", "full_kv"], "FullKV"),
    ):
        answer = kvinv("check", *target)
        assert answer.code == 0 and f"{name} passes" in answer.out, answer.err


def test_the_module_is_the_command_and_a_refusal_its_exit_code() -> None:
    answer = process("--version")
    assert answer.code == 0 and answer.out == kvinv("--version").out
    refused(process("edti"), "no command 'edti': did you mean edit")


@pytest.mark.parametrize("name", ["\udcff", "動物"])
def test_a_path_may_have_letters_that_the_output_lacks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252" if name == "動物" else "utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    main(["world", "--size", "8", "--sheet", "1", "--out", str(tmp_path / name)])
    out.seek(0)
    assert out.read().strip().endswith("sheet.png") and (tmp_path / name / "sheet.png").is_file()


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    told = " ".join(command("world", "-o", tmp_path / "world"))
    done = subprocess.run(f"{told} | true", shell=True, capture_output=True, text=True, check=False)
    assert not done.stderr


# ------------------------------------------------------------------------------------------------ the world


def test_world_writes_every_action_with_its_mask_and_prompt(tmp_path: Path) -> None:
    answer = kvinv("world", "--seed", 7, "-o", tmp_path / "world", "--size", 32)
    wanted = {f"{action}{end}" for action in ACTIONS for end in (".png", "-mask.png")}
    assert answer.code == 0 and tree(tmp_path / "world") == {*wanted, "prompts.tsv"}
    for line, action in zip(answer.out.splitlines(), ACTIONS, strict=True):
        file, prompt = line.split("\t")
        assert file.endswith(f"{action}.png") and action in prompt
        assert size(Path(file)) == (32, 32)
        with Image.open(file.replace(".png", "-mask.png")) as mask:
            assert mask.mode == "1"
    works = SourceImages(str(tmp_path / "world" / "prompts.tsv")).images
    for work, line, action in zip(works, answer.out.splitlines(), ACTIONS, strict=True):
        assert [str(work.path), work.source] == line.split("\t")
        assert work.mask == tmp_path / "world" / f"{action}-mask.png"


@pytest.mark.parametrize("options", [[], ["--sheet", 2]], ids=["pictures", "sheet"])
def test_world_writes_a_file_whole_or_not_at_all(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("world", "--size", 16, "-o", tmp_path, *options)
    assert kvinv(*command).code == 0
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*places: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kvinv_pl.data.runs.files.os.replace", full)
    refused(kvinv(*command, "--seed", 8), "cannot write", "No space left on device")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_world_shows_several_animals_on_a_sheet(tmp_path: Path) -> None:
    answer = kvinv("world", "--sheet", 3, "--size", 16, "-o", tmp_path)
    assert (
        answer.code == 0 and answer.out == f"{tmp_path / 'sheet.png'}\n" and tree(tmp_path) == {"sheet.png"}
    )
    assert size(tmp_path / "sheet.png") == (16 * len(ACTIONS), 16 * 3)


# ------------------------------------------------------------------------------------------------------ run


def test_run_leaves_all_that_the_design_lists(cat: list[object], model: Path, tmp_path: Path) -> None:
    answer = kvinv(
        "run", *cat, "--target", "a dog", "--target", "a cat running", "--negative", "red", "--seed", 5
    )
    assert answer.code == 0, answer.err
    look, advice = answer.err.splitlines()[-2:]
    assert look == f"look at {tmp_path / 'run' / 'sheet.png'}" and advice.startswith(
        "a reconstruction is below"
    )
    found = {name for name in tree(tmp_path / "run") if not name.startswith(("logs/", ".lock"))}
    assert found == {
        "run.json", "source.png", "reconstruction.png", "sheet.png", "trajectory.safetensors",
        "steps/0.safetensors", "steps/1.safetensors",
        "edits/a-dog.png", "edits/a-dog.json", "edits/a-cat-running.png", "edits/a-cat-running.json",
    }  # fmt: skip
    assert any("events" in name for name in tree(tmp_path / "run" / "logs"))

    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["format"] == 1
    assert run["model"]["checkpoint"] == str(model) and len(run["model"]["sha256"]) == 64
    assert run["scheduler"]["steps"] == 2 and len(run["scheduler"]["timesteps"]) == 2
    assert len(run["scheduler"]["alphas"]) == 3 and run["scheduler"]["prediction"] == "epsilon"
    assert run["source"] == "a cat" and run["inversion"] == {"guidance": 1.0, "negative": ""}
    assert run["picture"]["name"] == "cat.png" and len(run["picture"]["sha256"]) == 64
    tuning = run["tuning"]
    assert tuning["attention"]["class_path"] == "kvinv_plugins.full_kv.FullKV"
    assert set(tuning["attention"]["init_args"]) == {"start", "noise_std", "scale"}
    assert tuning["sites"] and all(site.startswith("up_blocks.") for site in tuning["sites"])
    assert (tuning["guidance"], tuning["negative"], tuning["seed"]) == (7.5, "red", 5)
    assert {"kvinv-pl", "torch", "lightning", "diffusers", "transformers", "peft"} <= set(run["versions"])
    assert run["reconstruction"]["psnr_to_round_trip"] > 0
    (dog,) = (record for target, record in edits(tmp_path / "run").items() if target == "a dog")
    assert (dog["source"], dog["guidance"], dog["reading"], dog["start"]) == ("a cat", 7.5, "frozen", 0.0)


def test_a_target_that_asks_for_nothing_is_told(cat: list[object], caplog: pytest.LogCaptureFixture) -> None:
    assert kvinv("run", *cat, "--target", "a cat", "--target", "a dog").code == 0
    assert caplog.text.count("a target is the source prompt") == 1
    caplog.clear()
    assert kvinv("run", *cat, "--target", "a fox").code == 0 and "source prompt" not in caplog.text


def test_empty_source_prompts_are_told_in_one_line(
    cat: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        photograph(tmp_path / name)
    answer = kvinv("invert", *cat, "--image", tmp_path / "in", "--source", "")
    assert answer.code == 0, answer.err
    assert caplog.text.count("source prompt") == 1
    assert f"{tmp_path / 'in' / 'a.png'} and 2 more: the source prompt is empty" in caplog.text


def test_a_second_run_neither_inverts_nor_tunes(cat: list[object], done: Path) -> None:
    before = times(done)
    second = kvinv("run", *cat, "--target", "a fox", "--guidance", "7.5", "--start", 0.5)
    assert second.code == 0 and "editing" in second.err
    assert "inverting" not in second.err and "tuning" not in second.err
    assert times(done) == before
    assert set(edits(done)) == {"a dog", "a fox"}


def test_the_stages_go_on_from_one_another(cat: list[object], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert kvinv("invert", *cat).code == 0
    assert (run / "trajectory.safetensors").exists() and not (run / "steps").exists()
    inverted = times(run)
    answer = kvinv("fit", *cat)
    assert answer.code == 0 and "inverting" not in answer.err
    assert inverted.items() <= times(run).items() and RunStore(run).done() == {0, 1}
    tuned = times(run)
    assert kvinv("edit", *cat, "--target", "a dog").code == 0
    assert times(run) == tuned and set(edits(run)) == {"a dog"}


def test_edit_takes_everything_from_the_run_folder_but_what_is_typed(
    cat: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--model.attention",
        "full_kv",
        "--model.attention.scale",
        "head",
        "--model.target_modules",
        "all",
    ]
    assert kvinv("fit", *cat, *options, "--guidance", 3, "--negative", "red").code == 0
    (tmp_path / "cat.png").unlink()  # no longer needed
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = times(tmp_path / "run")
    answer = kvinv("edit", "--run", tmp_path / "run", "--target", "a dog")
    assert answer.code == 0, answer.err
    typed = kvinv(
        "edit", "--run", "../run", "--target", "a fox", "--guidance", 5, "--reading=blend", "--negative", ""
    )
    assert typed.code == 0 and "tuned at guidance 3, edited at 5" in typed.err
    assert times(tmp_path / "run") == before and not tree(tmp_path / "elsewhere")
    shown = {
        target: [edit[key] for key in ("guidance", "reading", "negative")]
        for target, edit in edits(tmp_path / "run").items()
    }
    assert shown == {"a dog": [3.0, "frozen", "red"], "a fox": [5.0, "blend", ""]}


def test_a_checkpoint_that_was_moved_is_still_the_one_of_the_run(
    done: Path, model: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    answer = kvinv("edit", "--run", done, "--checkpoint", moved, "--target", "a fox")
    assert answer.code == 0, answer.err


def test_what_is_rendered_is_not_rendered_again(cat: list[object], done: Path) -> None:
    run, edited = done, ["edits/*"]
    before = times(run, edited)
    again = kvinv("run", *cat, "--target", "a dog")
    assert again.code == 0 and "editing" not in again.err
    assert f"cat.png: {run / 'edits' / 'a-dog.png'} exists with these settings" in again.err
    assert f"look at {run / 'sheet.png'}" in again.err.splitlines()
    assert times(run, edited) == before
    (run / "sheet.png").unlink()
    assert kvinv("edit", "--run", run).code == 0  # its own target
    assert times(run, edited) == before and (run / "sheet.png").exists()
    more = kvinv("edit", "--run", run, "--target", "a fox", "--target", "a dog")
    assert more.code == 0 and "editing cat.png" in more.err and "a-dog.png exists with" in more.err
    assert before.items() <= times(run, edited).items() and set(edits(run)) == {"a dog", "a fox"}
    assert kvinv("edit", "--run", run, "--trainer.precision", "bf16-mixed").code == 0
    assert kvinv("edit", "--run", run, "--target", "a dog", "--reading", "blend").code == 0
    assert before.items() <= times(run, edited).items()
    assert sum(edit["target"] == "a dog" for edit, _ in RunStore(run).edits()) == 3
    anew = kvinv("edit", "--run", run, "--overwrite")
    assert anew.code == 0 and "exists with" not in anew.err
    after = times(run, edited)
    assert after.keys() == times(run, edited).keys() and len(RunStore(run).edits()) == 4
    assert {name for name, at in before.items() if after[name] != at} == set(before)
    both = ["edit", "--run", run, "--target", "a dog", "--target", "a fox"]
    assert kvinv(*both).code == 0
    assert f"cat.png: {run / 'edits' / 'a-dog.png'} and 1 more exist with" in kvinv(*both).err


def test_of_a_run_that_was_killed_before_its_certificate_nothing_is_rendered(
    cat: list[object], done: Path
) -> None:
    shutil.rmtree(done / "edits")
    store = RunStore(done)
    run = store.read_run()
    del run["reconstruction"]
    store.write_run(run)
    answer = kvinv("edit", "--run", done, "--target", "a dog")
    assert answer.code == 2 and "is not tuned to the end: resume it with `kvinv fit`" in answer.err
    assert not (done / "edits").exists()
    assert kvinv("run", *cat, "--target", "a dog").code == 0


# ----------------------------------------------------------------------------------------- several pictures


def test_a_folder_of_pictures_goes_through_the_stages(model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        photograph(tmp_path / "in" / f"{name}.png", seed=seed)
    options = [
        "--image",
        tmp_path / "in",
        "--source",
        "a cat",
        "--checkpoint",
        model,
        *QUICK,
        "--out",
        tmp_path / "out",
    ]
    for verb in ("invert", "fit"):
        assert kvinv(verb, *options).code == 0
    before = times(tmp_path / "out", ["*/trajectory.safetensors", "*/steps/*"])
    assert len(before) == 6
    photograph(tmp_path / "in" / "c.png", (40, 16), seed=2)  # one more, of another shape
    answer = kvinv("run", *options, "--target", "a dog")
    assert answer.code == 0, answer.err
    assert "inverting c.png" in answer.err and "inverting a.png" not in answer.err
    assert before.items() <= times(tmp_path / "out", ["*/trajectory.safetensors", "*/steps/*"]).items()
    assert kvinv("edit", "--run", tmp_path / "out", "--target", "a fox").code == 0
    for name in "abc":
        assert set(edits(tmp_path / "out" / name)) == {"a dog", "a fox"}


def test_a_list_gives_every_picture_its_own_prompts(model: Path, tmp_path: Path) -> None:
    photograph(tmp_path / "in" / "a.png")
    photograph(tmp_path / "in" / "sub" / "b.png", seed=1)
    file = tmp_path / "in" / "list.csv"  # a jsonl is read to the same: tests/training/test_datamodule.py
    file.write_text(
        "image,source,targets\na.png,a cat,a dog|a fox\nsub/b.png,,a cat running", encoding="utf-8"
    )
    options = [
        "--image",
        file,
        "--source",
        "a horse",
        "--checkpoint",
        model,
        *QUICK,
        "--out",
        tmp_path / "out",
    ]
    assert kvinv("fit", *options).code == 0
    answer = kvinv("edit", *options)
    assert answer.code == 0, answer.err
    assert set(edits(tmp_path / "out" / "a")) == {"a dog", "a fox"}
    assert set(edits(tmp_path / "out" / "b")) == {"a cat running"}
    assert [RunStore(tmp_path / "out" / name).read_run()["source"] for name in "ab"] == ["a cat", "a horse"]
    # the run folders know the list's targets, and what is given instead is not remembered
    for given in (["--guidance", 3], ["--target", "a mouse"], ["--guidance", 4]):
        answer = kvinv("edit", "--run", tmp_path / "out", *given)
        assert answer.code == 0, answer.err
    asked = {
        name: {(edit["target"], edit["guidance"]) for edit, _ in RunStore(tmp_path / "out" / name).edits()}
        for name in "ab"
    }
    assert asked["a"] == {("a mouse", 7.5), *((t, w) for t in ("a dog", "a fox") for w in (7.5, 3.0, 4.0))}
    assert asked["b"] == {("a mouse", 7.5), *(("a cat running", w) for w in (7.5, 3.0, 4.0))}


# ---------------------------------------------------------------------------------------------- the options


def test_options_come_from_yaml_and_flags_override_them(cat: list[object], tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model:\n  steps: 3\n  inner_steps: 1\n  reading: blend\ndata:\n  targets: [a fox]\n",
        encoding="utf-8",
    )
    without = cat[:6] + cat[10:]
    answer = kvinv("run", "--steps", 2, *without, "--config", tmp_path / "my.yaml", "--reading", "frozen")
    assert answer.code == 0, answer.err
    run = RunStore(tmp_path / "run").read_run()
    assert run["scheduler"]["steps"] == 2 and run["tuning"]["inner_steps"] == 1
    assert edits(tmp_path / "run")["a fox"]["reading"] == "frozen"


def test_the_printed_configuration_can_be_fed_back(cat: list[object], tmp_path: Path) -> None:
    printed = kvinv("run", *cat, "--target", "a dog", "--model.attention", "full_kv", "--print_config")
    assert printed.code == 0 and not (tmp_path / "run").exists()
    assert yaml.safe_load(printed.out)["model"]["steps"] == 2
    (tmp_path / "again.yaml").write_text(printed.out, encoding="utf-8")
    answer = kvinv("run", "--config", tmp_path / "again.yaml")
    assert answer.code == 0, answer.err
    saved = tmp_path / "run" / "logs" / "config.yaml"
    assert kvinv("run", "-c", saved, "--target", "a fox").code == 0
    assert set(edits(tmp_path / "run")) == {"a dog", "a fox"}


@pytest.mark.parametrize(
    "text", ["", "a: cat", "null", "7", "[x]", "{a: b}", "'quoted'", "über\U0001f431", "a # b", "-red"]
)
def test_texts_arrive_as_they_were_typed(cat: list[object], text: str) -> None:
    options = ["--source", text, "--negative", text, *(["--target", text] if text else [])]
    shown = yaml.safe_load(kvinv("run", *cat, *options, "--print_config").out)
    assert (shown["data"]["source"], shown["model"]["negative"]) == (text, text)
    assert shown["data"]["targets"] == ([text] if text else [])


def test_an_empty_source_prompt_is_a_prompt(cat: list[object], tmp_path: Path) -> None:
    answer = kvinv("run", *cat, "--source", "", "--target", "a dog")
    assert answer.code == 0, answer.err
    assert RunStore(tmp_path / "run").read_run()["source"] == ""


def test_without_a_logger_nothing_is_written_outside_the_run(
    cat: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert kvinv("invert", *cat, "--trainer.logger", "false").code == 0
    assert not tree(tmp_path / "here")
    assert not (tmp_path / "run" / "logs").exists()


# ------------------------------------------------------------------------------------------------- geometry


def test_a_picture_of_any_size_comes_back_in_its_own(cat: list[object], tmp_path: Path) -> None:
    photograph(tmp_path / "cat.png", (50, 35))
    assert kvinv("run", *cat, "--target", "a dog").code == 0
    run = tmp_path / "run"
    for name in ("source.png", "reconstruction.png", "edits/a-dog.png"):
        assert size(run / name) == (50, 35)
    width, height = RunStore(run).read_run()["picture"]["model_size"]
    assert width > height == 16


def test_crop_returns_the_crop(cat: list[object], tmp_path: Path) -> None:
    photograph(tmp_path / "cat.png", (50, 35))
    assert kvinv("run", *cat, "--target", "a dog", "--data.geometry", "crop", "--data.size", 12).code == 0
    for name in ("source.png", "reconstruction.png", "edits/a-dog.png"):
        assert size(tmp_path / "run" / name) == (35, 35)
    assert RunStore(tmp_path / "run").read_run()["picture"]["model_size"] == [12, 12]


def test_a_run_of_another_working_size_is_refused_and_so_is_one_that_is_too_small(
    cat: list[object], tmp_path: Path
) -> None:
    assert kvinv("invert", *cat, "--data.size", 12).code == 0
    refused(kvinv("invert", *cat), "was made with another --data.size (model_size.0 = 12, not 16)")
    refused(kvinv("invert", *cat, "--data.size", 3), "--data.size: expected 4 pixels or more, got 3")


def test_a_picture_that_a_camera_turned_comes_back_upright(cat: list[object], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photograph(tmp_path / "cat.jpg", (24, 16), exif=exif)
    assert kvinv("run", *cat, "--image", tmp_path / "cat.jpg", "--target", "a dog").code == 0
    assert size(tmp_path / "run" / "edits" / "a-dog.png") == (16, 24)
    assert open_picture(tmp_path / "run" / "source.png").image.size == (16, 24)
    assert "EXIF orientation 6" in str(RunStore(tmp_path / "run").read_run()["picture"]["notes"])
