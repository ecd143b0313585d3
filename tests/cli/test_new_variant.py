"""`kvinv new-variant`: three files that work as they are; tests/cli/test_docs.py runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import kvinv, tree

ROOT = Path(__file__).parents[2]


def test_a_name_of_several_words_is_a_class_of_as_many(tmp_path: Path) -> None:
    answer = kvinv("new-variant", "two_gates", "-o", tmp_path / "new")
    assert answer.code == 0 and tree(tmp_path / "new") == {
        "two_gates.py",
        "two_gates.yaml",
        "test_two_gates.py",
    }
    assert answer.out.split() == [
        str(tmp_path / "new" / name) for name in ("two_gates.py", "two_gates.yaml", "test_two_gates.py")
    ]
    assert "class TwoGates(CPAttention):" in (tmp_path / "new" / "two_gates.py").read_text()
    assert "class_path: two_gates.TwoGates" in (tmp_path / "new" / "two_gates.yaml").read_text()
    assert "from two_gates import TwoGates" in (tmp_path / "new" / "test_two_gates.py").read_text()


def test_what_is_written_follows_the_style_of_the_project(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    kvinv("new-variant", "tidy", "-o", tmp_path)
    for command in (["check"], ["format", "--check"]):
        settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings, str(tmp_path / "tidy.py")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Variant", "expected small letters, digits and _, such as my_variant, got 'My-Variant'"),
        ("2fast", "expected small letters"),
        ("../up", "expected small letters"),
        ("", "expected small letters"),
        ("class", "expected small letters"),
        ("torch", "torch is the name of another module"),
        ("tensor", "the class of tensor would be Tensor"),
    ],
)
def test_a_bad_name_is_one_line_and_nothing_is_written(tmp_path: Path, name: str, message: str) -> None:
    answer = kvinv("new-variant", name, "-o", tmp_path / "new")
    assert answer.code == 2 and answer.err.count("\n") == 1 and message in answer.err
    assert not tree(tmp_path)


@pytest.mark.parametrize("there", ["mine.py", "mine.yaml", "test_mine.py"])
def test_a_file_that_is_there_is_not_touched(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    answer = kvinv("new-variant", "mine", "-o", tmp_path)
    assert answer.code == 2 and f"{tmp_path / there} already exists" in answer.err
    assert tree(tmp_path) == {there} and (tmp_path / there).read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = kvinv("new-variant", "mine", "-o", tmp_path / "file")
    assert answer.code == 2 and answer.err.count("\n") == 1 and "cannot write" in answer.err
