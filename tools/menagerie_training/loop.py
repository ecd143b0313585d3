"""What the stages share: the optimiser, the average of the weights, and how a stage is resumed."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kvinv_pl.errors import UserError
from menagerie_training.pictures import Both, Rows, Side, loader

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
EVERY = 200  # steps from one checkpoint to the next


class Trained(L.LightningModule):
    """AdamW with warm-up and cosine, and an exponential moving average of the weights."""

    def __init__(self, lr: float, steps: int, decay: float, **nets: nn.Module) -> None:
        """Train `nets` to a highest rate of `lr`; `decay` is that of their average."""
        super().__init__()
        self.lr, self.steps, self.decay = lr, steps, decay
        self.nets = nn.ModuleDict(nets)
        self.average = copy.deepcopy(self.nets).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        """AdamW; the rate rises over the first steps and falls to a fiftieth along a cosine."""
        optimizer = torch.optim.AdamW(self.nets.parameters(), self.lr, weight_decay=1e-2, betas=(0.9, 0.99))
        warm = min(200, self.steps // 10 + 1)

        def rate(step: int) -> float:
            done = min(1.0, max(0.0, (step - warm) / max(1, self.steps - warm)))
            return min(1.0, (step + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_start(self) -> None:
        """Draw other rows and noise after a resumption than at the start."""
        torch.manual_seed((self.global_rank << 20) + self.global_step)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average towards the weights."""
        decay = min(self.decay, (1 + self.global_step) / (10 + self.global_step))
        mine, theirs = tuple(self.nets.parameters()), tuple(self.average.parameters())
        get_ema_multi_avg_fn(decay)(theirs, mine, None)


class Stage:
    """One stage of the training in the folder `work`: its settings, progress and results."""

    def __init__(self, work: Path, name: str, settings: Mapping[str, Any], results: list[str]) -> None:
        """The settings must be those that the stage was begun with, save for `steps`, which may grow."""
        self.work, self.name, self.results = work, name, [work / result for result in results]
        self.settings = json.loads(json.dumps(dict(settings)))
        self.record = work / name / "settings.json"
        self.last = work / name / "last.ckpt"
        begun = json.loads(self.record.read_text()) if self.record.exists() else {"settings": self.settings}
        self.done_steps = begun.get("finished", 0)
        for key, value in self.settings.items():
            if key != "steps" and value != (was := begun["settings"].get(key)):
                raise UserError(
                    f"the stage {name} in {work} was begun with --{key} {was}, got {value}; "
                    f"give the same, another --work, or remove {self.last.parent}"
                )

    def finished(self) -> bool:
        """Whether nothing is left to do; says so."""
        if self.done_steps < self.settings["steps"] or not all(path.exists() for path in self.results):
            return False
        print(f"{self.name}: finished, {self.done_steps} steps, in {self.results[0]}", flush=True)
        return True

    def fit(self, module: Trained, rows: Rows | Both | Side, batch: int, processes: int = 1) -> None:
        """Train from the last checkpoint, or from the start, to the requested number of steps.

        Each of several processes has a batch of its own, and one thread: on a CPU, torch spends less on two
        processes than on two threads.
        """
        self._write(0)
        if processes > 1:
            torch.set_num_threads(1)
            torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
        steps = self.settings["steps"]
        ready = self.last if self.last.exists() else None
        print(f"{self.name}: {'resuming' if ready else 'training'}, to {steps} steps", flush=True)
        trainer = L.Trainer(
            accelerator="auto" if processes == 1 else "cpu", devices=processes,
            strategy="auto" if processes == 1 else "ddp",
            precision="bf16-mixed", max_steps=steps, max_epochs=-1,
            logger=TensorBoardLogger(self.work / "logs", name=self.name, version=""),
            callbacks=[
                ModelCheckpoint(
                    self.last.parent, "last", every_n_train_steps=EVERY,
                    save_top_k=1, enable_version_counter=False,
                ),
                TQDMProgressBar(refresh_rate=50),
            ],
            gradient_clip_val=1.0, enable_model_summary=False, log_every_n_steps=20,
            use_distributed_sampler=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before.*")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            trainer.fit(module, loader(rows, batch), ckpt_path=ready)
        if trainer.global_step % EVERY:
            trainer.save_checkpoint(self.last)

    def finish(self) -> None:
        """Record that the results are written."""
        self._write(self.settings["steps"])
        print(f"{self.name}: finished, {self.settings['steps']} steps, in {self.results[0]}", flush=True)

    def _write(self, finished: int) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps({"settings": self.settings, "finished": finished}, indent=2) + "\n")


def needed(path: Path, stage: str) -> Path:
    """A result of an earlier stage; without it, one line that names the stage."""
    if not path.exists():
        again = f"python tools/train_menagerie.py {stage} --work {path.parent.parent}"
        raise UserError(f"{path} is missing, which the stage {stage} writes; first run: {again}")
    return path
