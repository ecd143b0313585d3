"""docs/: its commands, in the order of the page, do what the page says that they do."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import checkpoints
import pytest
import segmenters
from commands import QUICK, kvinv

from kvinv_pl.bench.plan import WORLD_CASES
from kvinv_pl.bench.rows import Row
from kvinv_pl.cli.commands.ablate import ablate
from kvinv_pl.cli.commands.bench import METHODS, OURS, bench
from kvinv_pl.cli.commands.new_variant import write

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """What a page has between fences: of which kind, and the text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


BLOCKS = blocks("write-a-variant.md")


def without_figures(text: str) -> str:
    """Figures and times belong to the model and the machine, as does how often progress is told."""
    lines = [line for line in text.strip().splitlines() if not line.endswith(" left")]
    return re.sub(r"\d+(:\d+)?(\.\d+)?( min)?", "N", "\n".join(lines)).replace("N s", "N")


def test_the_page_shows_the_files_that_new_variant_writes(tmp_path: Path) -> None:
    code, config, test = (file.read_text(encoding="utf-8") for file in write("gated", tmp_path))
    whole, part = (text for kind, text in BLOCKS if kind == "python")
    (settings,) = (text for kind, text in BLOCKS if kind == "yaml")
    assert whole == code and part in test and config.endswith(settings)


def test_every_command_of_the_page_does_what_it_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = checkpoints.make("tiny", tmp_path_factory.mktemp("models"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for (kind, text), (following, shown) in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind != "sh":
            continue
        said = ""
        for line in text.splitlines():
            program, *args = shlex.split(line)
            if program == "pytest":
                # warnings are errors there, too; the plugins off are those that are at work here
                off = [f"-pno:{plugin}" for plugin in ("cacheprovider", "faulthandler", "timeout", "xdist")]
                assert pytest.main(["-W", "error", *off, *args]) == 0
                assert " passed" in capsys.readouterr().out
                continue
            assert program == "kvinv"
            # the tiny model reconstructs next to nothing, and says so; so few steps begin late, and say so
            told = ["--model.required_psnr", 0, "--model.timestep_spacing", "trailing"]
            quick = ["--checkpoint", model, *told, *QUICK] if args[0] == "run" else []
            answer = kvinv(*args, *quick)
            assert answer.code == 0, answer.err
            said = answer.err if args[0] == "run" else answer.out
        if following == "text":
            # the tiny checkpoint is not the embedded one, for which more is chosen
            here = shown.replace("source guidance 1, ahead 0.7, reading guidance 2, ", "")
            assert without_figures(said) == without_figures(here)
    assert (tmp_path / "runs" / "gated" / "sheet.png").exists()
    assert len(os.listdir(tmp_path / "runs" / "gated" / "edits")) == 4
    monkeypatch.delitem(sys.modules, "gated")


def test_every_command_of_the_page_on_masks_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("models")
    of_verb = {
        "run": ["--checkpoint", checkpoints.make("tiny", home), *QUICK],
        "mask": ["--sam", segmenters.make(home / "sam")],
    }
    monkeypatch.chdir(tmp_path)
    lines = [line for _, text in blocks("masks.md") for line in text.splitlines()]
    for line in lines:
        program, *args = shlex.split(line)
        if program == "kvinv":  # the tools are below
            answer = kvinv(*args, *of_verb.get(args[0], []))
            assert answer.code == 0, answer.err
    assert (tmp_path / "mask-shown.png").exists()
    assert set(os.listdir(tmp_path / "runs")) == {"full_kv", "masked", "recorded"}
    pages = [path.name for path in DOCS.glob("*.md")]
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{name}" in readme for name in pages)


TUNED = DOCS.parent / "tests" / "data" / "run_format_1" / "tuned"
RUN_ABOVE = {"masks.md", "write-a-variant.md"}


def commands_of(page: Path) -> list[list[str]]:
    """What kvinv is given on a page, whoever starts it; ... stands for what is the same everywhere."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line.replace(" ... ", " ")
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        for whole in (block.splitlines() if kind in ("", "sh") else [])
        for line in whole.split("&&")
    ]
    split = [shlex.split(line, comments=True) for line in lines]
    return [
        words[words.index(name) + 1 :] for words in split for name in ("kvinv", "kvinv_pl") if name in words
    ]


GIVEN = {
    page.name: commands_of(page)
    for page in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
    if page.name not in RUN_ABOVE and commands_of(page)
}


@pytest.mark.parametrize("page", GIVEN)
def test_every_other_command_of_the_pages_is_one_that_kvinv_takes(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(DOCS.parent / "configs")
    write("my_variant", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("kvinv_pl.app.studio.serve.serve", lambda *args, **settings: None)
    for verb, *args in GIVEN[page]:
        if "--run" in args:  # what an edit is made with, the run says
            shutil.copytree(TUNED, args[args.index("--run") + 1], dirs_exist_ok=True)
        # options, their values and files are read, and nothing is done
        answer = kvinv(verb, *args, *([] if verb == "studio" else ["--print_config"]))
        assert answer.code == 0 and not answer.err, answer.err
    monkeypatch.delitem(sys.modules, "my_variant", raising=False)


PAGES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TOOLS = [
    command
    for page in PAGES
    for command in re.findall(
        r"python (tools/\w+\.py(?:[^\n`#]|\\\n)*)", page.read_text(encoding="utf-8").replace("\\\n", " ")
    )
]


@pytest.mark.parametrize("command", sorted(set(TOOLS)))
def test_the_tools_that_the_pages_name_are_there_and_take_what_they_are_given(command: str) -> None:
    tool, *args = shlex.split(command)
    source = (DOCS.parent / tool).read_text(encoding="utf-8")
    for arg in args:
        if arg.startswith("--"):
            name = arg[2:].split("=")[0]
            assert re.search(rf"\b{name.replace('-', '_')}: |--{name}\b", source)
    if args and not args[0].startswith("-"):
        assert f"def {args[0]}(" in source


COMPARED = [
    command
    for page in PAGES
    for command in re.findall(
        r"^(?:kvinv (?:bench|ablate) [^\n#]*|make bench ARGS=\"[^\n\"]*)",
        page.read_text(encoding="utf-8").replace("\\\n", " "),
        re.M,
    )
]


def test_benches_that_are_shown_and_that_make_runs_have_options_and_rows_that_there_are() -> None:
    commands = {"bench": bench, "ablate": ablate}
    (made,) = re.findall(
        r"kvinv (bench .*) \$\(ARGS\)", (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    )
    lines = [made, *(line.removeprefix("kvinv ").replace('make bench ARGS="', "bench ") for line in COMPARED)]
    assert len(lines) > 4
    for line in lines:
        verb, *args = shlex.split(line)
        options = inspect.signature(commands[verb]).parameters
        for n, arg in enumerate(args):
            if arg.startswith("--"):
                assert arg[2:] in options, line
            if arg in ("--method", "--also"):
                Row.parse(args[n + 1])


def test_make_bench_computes_the_rows_of_the_readmes_table() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    table = readme.partition("\n## Figures\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    named = [re.findall("`(.*)`", row) or [OURS] for row in rows if "`" in row or "(the default)" in row]
    assert [text for texts in named for text in texts] == METHODS
    (made,) = re.findall(r"kvinv bench .*", (DOCS.parent / "Makefile").read_text(encoding="utf-8"))
    assert shlex.split(made)[2:] == ["--out", "bench", "--workers", "2", "$(ARGS)"]
    assert inspect.signature(bench).parameters["method"].default is METHODS and WORLD_CASES == 64
    assert [Row.parse(text).text for text in METHODS] == METHODS


def test_the_pages_name_tools_and_commands() -> None:
    assert len(set(TOOLS)) > 8
    assert len(GIVEN) > 8 and sum(map(len, GIVEN.values())) > 25
