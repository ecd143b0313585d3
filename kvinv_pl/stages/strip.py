"""What an edit is going to be, step by step: the predicted x_0 on the way (Fig. 3 of the paper)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from kvinv_pl.algorithm.editing import edit
from kvinv_pl.data.geometry import to_image
from kvinv_pl.data.records import geometry_of
from kvinv_pl.data.run_store import RunStore
from kvinv_pl.models.denoiser import Denoiser
from kvinv_pl.stages.invert import mask_of
from kvinv_pl.stages.reader import Reader
from kvinv_pl.stages.settings import EditSettings


@torch.no_grad()
def predicted_pictures(
    denoiser: Denoiser, store: RunStore, target: str, settings: EditSettings, count: int
) -> list[tuple[int, Image.Image]]:
    """The predicted x_0 at up to `count` steps, evenly spread from noise to the last, each with its timestep.

    The run is tuned to the end, the model loaded in its precision, and `count` 2 or more.
    """
    table, trajectory = denoiser.table, store.trajectory()
    denoiser.place((trajectory.shape[-2], trajectory.shape[-1]), slots=1)
    mask = mask_of(store)
    denoiser.bind(None if mask is None else mask[None])
    steps = {round(n * (len(table) - 1) / (count - 1)) for n in range(count)}
    z = trajectory[-1:].to(denoiser.device)
    found = list[Float[Tensor, "1 c h w"]]()
    reader = Reader(denoiser, store, [target], settings)
    wanted = sorted(i for i in steps if table.has_effect(i))

    def keep(i: int, z_to: Tensor) -> Tensor:
        nonlocal z
        if i in wanted:
            found.append(table.predicted_z_0(z, z_to, i))
        z = reader.keep(i, z_to)
        return z

    with reader.prefetching():
        edit(reader.eps, z, table, reader.psi, settings.guide, settings.start, keep=keep, alone=reader.alone)
    geometry = geometry_of(store.read_run()["picture"])
    pixels = denoiser.backbone.decode(torch.cat(found))
    pictures = [to_image(each.cpu(), geometry) for each in pixels]
    return list(zip((int(table.timesteps[i]) for i in wanted), pictures, strict=True))
