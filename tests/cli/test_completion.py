"""The completion of shells, asked of a real bash."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from commands import kvinv, refused

from kvinv_pl.cli.entry import COMMANDS, STAGES


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_commands_options_and_their_choices(tmp_path: Path) -> None:
    answer = kvinv("completion", "--shell", "bash")
    assert answer.code == 0, answer.err
    script = tmp_path / "kvinv.bash"
    script.write_text(answer.out, encoding="utf-8")

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        asked = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_TYPE=9; _shtab_kvinv"
        )
        asked += '; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert {*STAGES, *COMMANDS} <= completed("kvinv", "")
    assert completed("kvinv", "edit", "--sta") == {"--start"}
    assert "--model.sharpness" in completed("kvinv", "edit", "--model.s")
    assert completed("kvinv", "edit", "--reading", "") == {"frozen", "blend"}
    assert completed("kvinv", "report", "--o") == {"--out"}


def test_a_shell_that_there_is_no_script_for_is_refused() -> None:
    refused(kvinv("completion", "--shell", "fish"), "--shell", "fish")
