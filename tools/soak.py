"""Kill a fit at random moments, again and again, and compare what comes of it with a fit that was left alone.

    python tools/soak.py [--kills 20] [--slots 2] [--curriculum pivot] [--precision bf16-mixed] [--devices 2]

The pictures are animals of the embedded world and the model is the embedded one, or another by --checkpoint.
Every file of tensors is compared, by its digest, and every run.json. The last line is the verdict; the exit
code is 0 where all is equal.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvinv_pl.data.runs.files import read_header
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.menagerie import Animal


def command(options: argparse.Namespace, pictures: Path, out: Path) -> list[str]:
    """`kvinv fit` of all pictures."""
    return [
        sys.executable, "-m", "kvinv_pl", "fit", "--image", str(pictures), "--source", "an animal standing",
        "--out", str(out), "--checkpoint", options.checkpoint, "--steps", str(options.steps),
        "--model.inner_steps", str(options.inner_steps), "--model.slots", str(options.slots),
        "--model.curriculum", options.curriculum, "--model.tolerance", "0", "--model.tolerance_growth", "0",
        "--model.required_psnr", "99", "--model.retries", "1",
        "--trainer.accelerator", "cpu", "--trainer.precision", options.precision,
        "--trainer.devices", str(options.devices), "--trainer.logger", "false",
    ]  # fmt: skip


def contents(out: Path) -> dict[str, object]:
    """The digest of every file of tensors, and what every run.json says."""
    found: dict[str, object] = {}
    for file in sorted(out.rglob("*.safetensors")):
        kind = "trajectory" if file.stem == "trajectory" else f"step {file.stem}"
        found[str(file.relative_to(out))] = read_header(file, kind)[0]["digest"]
    for file in sorted(out.rglob("run.json")):
        found[str(file.relative_to(out))] = RunStore(file.parent).read_run()
    return found


def main() -> None:
    """Run to the end once; then with kills until it has ended too; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=3)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--inner-steps", "--inner_steps", type=int, default=3)
    parser.add_argument("--curriculum", default="sequential")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--checkpoint", default="menagerie")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kvinv-soak-") as folder:
        pictures, whole, killed = (Path(folder, name) for name in ("pictures", "whole", "killed"))
        pictures.mkdir()
        for n in range(options.pictures):
            Animal.sample(900_000 + n).render("standing").save(pictures / f"{n}.png")
        began = time.monotonic()
        subprocess.run(command(options, pictures, whole), check=True, stderr=subprocess.DEVNULL)
        took = time.monotonic() - began
        print(f"uninterrupted: {took:.1f} s", flush=True)
        kills = over = 0
        while kills < options.kills:
            began = time.monotonic()
            child = subprocess.Popen(command(options, pictures, killed), stderr=subprocess.PIPE)
            try:
                child.communicate(timeout=draw.uniform(0.1, 1.0) * took)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate(timeout=30)  # which ends with the last rank that could still write
                kills += 1
                steps = len([*killed.rglob("steps/*.safetensors")])
                print(f"kill {kills} after {time.monotonic() - began:.1f} s: {steps} phases done", flush=True)
                continue
            if child.returncode != 0:
                sys.exit(f"FAILED: exit code {child.returncode}")
            over += 1  # it ended before its time was up: it begins again, in a new folder
            if contents(killed) != contents(whole):
                sys.exit(f"FAILED: the files differ after {kills} kills")
            os.rename(killed, Path(folder, f"over-{over}"))
        subprocess.run(command(options, pictures, killed), check=True, stderr=subprocess.DEVNULL)
        expected, found = contents(whole), contents(killed)
        unlike = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        if unlike:
            sys.exit(f"FAILED: {len(unlike)} of {len(expected)} files differ: {', '.join(unlike[:5])}")
        print(
            f"passed: {kills} kills, {over + 1} runs to the end, all {len(expected)} files equal "
            f"({options.curriculum}, {options.precision}, {options.slots} slots, {options.devices} devices)"
        )


if __name__ == "__main__":
    main()
