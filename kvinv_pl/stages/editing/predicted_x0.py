"""What a picture is going to be, step by step: the predicted x_0 on the way (Fig. 3 of the paper)."""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from kvinv_pl.data.images.geometry import to_image
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.models.denoiser import Denoiser


class Strip:
    """Of a run that is tuned to the end, at `count` steps or fewer, evenly spread from noise to the last."""

    def __init__(self, denoiser: Callable[[], Denoiser], store: RunStore, count: int) -> None:
        """Take who has the model, which need not be loaded before the first step; `count` is 2 or more."""
        self._denoiser, self._store, self._count = denoiser, store, count
        self._before: Tensor | None = None
        self.pictures: list[tuple[int, Image.Image]] = []
        """Each with its timestep."""

    def see(self, i: int, t: int, z: Tensor) -> None:
        """Note what the latents before and after a step say of the picture; of several edits, the first's."""
        before = self._store.trajectory()[-1:].to(z) if i == 0 else self._before
        if before is not None and i in self._steps():
            self._note(i, before[:1], z[:1])
        self._before = z

    def read_tuning(self) -> None:
        """Note the same of the steps that the run has stored, by which its reconstruction came."""
        for i in self._steps():
            before = self._store.step(i - 1).z if i else self._store.trajectory()[-1]
            self._note(i, before[None], self._store.step(i).z[None])

    def _steps(self) -> list[int]:
        table, last = self._denoiser().table, len(self._denoiser().table) - 1
        spread = sorted({round(n * last / (self._count - 1)) for n in range(self._count)})
        return [i for i in spread if table.has_effect(i)]

    @torch.no_grad()
    def _note(self, i: int, before: Tensor, after: Tensor) -> None:
        denoiser = self._denoiser()
        z_0 = denoiser.table.predicted_z_0(before.to(denoiser.device), after.to(denoiser.device), i)
        shown = to_image(denoiser.backbone.decode(z_0)[0].cpu(), self._store.geometry())
        self.pictures.append((int(denoiser.table.timesteps[i]), shown))
