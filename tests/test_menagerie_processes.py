"""The training of the embedded model in two processes, which share every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"
PROGRAM = """
import json, sys
from pathlib import Path

import torch
from menagerie_training.loop import Stage, Trained
from menagerie_training.pictures import Rows


class Nearing(Trained):
    # Draws a point to the mean of the rows that it is shown.
    def training_step(self, batch, _):
        self.seen = batch[0]
        (self.before,) = (value.detach().clone() for value in self.nets.parameters())
        return (self.nets["point"]() - self.seen).square().sum(1).mean()

    def on_after_backward(self):
        (value,) = self.nets.parameters()
        made.append([tensor.tolist() for tensor in (self.seen, self.before, value.grad)])


class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.zeros(3))

    def forward(self):
        return self.at


work, made = Path(sys.argv[1]), []
rows = Rows(torch.arange(192.0).reshape(64, 3) / 192)
module = Nearing(0.1, 3, 0.5, point=Point())
Stage(work, "nearing", {"steps": 3}, []).fit(module, rows, batch=4, processes=2)
weights, average = (nets["point"].at.tolist() for nets in (module.nets, module.average))
record = {"steps": made, "weights": weights, "average": average}
(work / f"rank{module.global_rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes to end")
@pytest.mark.slow
def test_two_processes_take_each_step_together_along_the_gradient_of_both_batches(tmp_path: Path) -> None:
    first, second = in_two_processes(tmp_path)
    assert first["weights"] == second["weights"] != [0.0] * 3 and first["average"] == second["average"]
    for one, other in zip(first["steps"], second["steps"], strict=True):
        (ours, at, gradient), (theirs, _, _) = one, other
        assert one[1:] == other[1:] and ours != theirs
        of_whole_batch = 2 * (torch.tensor(at) - torch.tensor([*ours, *theirs]).mean(0))
        torch.testing.assert_close(torch.tensor(gradient), of_whole_batch)
    assert torch.load(tmp_path / "nearing" / "last.ckpt", weights_only=False)["global_step"] == 3


def in_two_processes(work: Path) -> list[dict[str, Any]]:
    """What each of the two has made of the program; neither outlives four minutes."""
    (work / "program.py").write_text(PROGRAM, encoding="utf-8")
    made = subprocess.Popen(
        [sys.executable, work / "program.py", work],
        env={**os.environ, "PYTHONPATH": str(TOOLS)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = made.communicate(timeout=240)
    finally:
        if made.poll() is None:
            os.killpg(made.pid, signal.SIGKILL)
            made.communicate()
    assert made.returncode == 0, said
    return [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(2)]
