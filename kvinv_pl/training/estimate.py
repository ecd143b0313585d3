"""What tuning pictures will take, before it is begun: slots, memory, disk, forwards, work and time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.data.failures import MEMORY_ADVICE
from kvinv_pl.data.images.geometry import fit_geometry, working_size
from kvinv_pl.data.runs.tensors import stored_bytes
from kvinv_pl.data.source_image import SourceImage
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import Sizes, load_on_meta
from kvinv_pl.models.costs.memory import fitting, free_bytes, in_units
from kvinv_pl.models.costs.meta_model import META, Costs, MetaModel, prompt_tokens
from kvinv_pl.models.costs.timing import NetworkTimings, time_network
from kvinv_pl.optimizers import needs_closure
from kvinv_pl.stages.forwards import count_forwards
from kvinv_pl.stages.progress import format_seconds
from kvinv_pl.training.admission import most_slots
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.machine import Machine
from kvinv_pl.training.module import KVInversion


def first_existing(out: Path) -> Path:
    """The path, or the nearest of its parents that exists; a UserError if none does, as on a lost drive."""
    for path in (out, *out.parents):
        if path.exists():
            return path
    raise UserError(f"there is no {out.anchor} for {out}: check the path")


def estimate(model: KVInversion, data: SourceImages, machine: Machine) -> Iterator[str]:
    """Lines for the user. Of the checkpoint only configurations are read, and nothing is written.

    The network is timed where there is memory for it, with other weights. Without pictures, one of the
    working size is planned.
    """
    place = first_existing(data.out.absolute())
    sizes = load_on_meta(model.checkpoint, model.load_options.allow_pickle).sizes
    by_size = dict[tuple[int, int], list[SourceImage]]()
    for image in data.images:
        by_size.setdefault(_size(image, sizes), []).append(image)
    if not by_size:
        height, width = working_size(sizes.sample, data.size, sizes.multiple)
        by_size[fit_geometry((width, height), (height, width), sizes.multiple, "keep").resized] = []
    targets, disk = max((len(image.targets) for image in data.images), default=0), 0
    for size, images in by_size.items():
        pictures, prompts = max(1, len(images)), [image.source for image in images]
        each = Estimate(model, size, pictures, max(1, targets), machine, prompts)
        yield from each.lines()
        disk += pictures * sum(each.on_disk())
    free = shutil.disk_usage(place).free
    yield f"disk, in all: {in_units(disk)}; {in_units(free)} are free in {place}"
    if disk > free:
        yield "  that is more than is free: --data.size, --model.max_grid and --model.kv replayed take less"


def _size(image: SourceImage, sizes: Sizes) -> tuple[int, int]:
    if image.path is None:
        picture = image.store.read_run()["picture"]
    else:
        picture = image.load(sizes.sample, sizes.multiple).record
        image.close()
    width, height = picture["model_size"]
    return width, height


class Estimate:
    """What the pictures of one size take."""

    def __init__(
        self,
        model: KVInversion,
        size: tuple[int, int],
        pictures: int,
        targets: int,
        machine: Machine,
        prompts: Sequence[str] = (),
    ) -> None:
        """Take what is planned; `size` is the width and height of the pictures as the model sees them."""
        self.model, self.size, self.pictures, self.targets = model, size, pictures, targets
        self.machine = machine
        self._tokens = prompt_tokens([model.tuning.negative, *prompts], model.load_options.prompt_syntax)
        self._sizes = load_on_meta(model.checkpoint, model.load_options.allow_pickle).sizes
        self.grid = size[1] // self._sizes.vae_factor, size[0] // self._sizes.vae_factor
        self.sketch = self._sketch_at(self.grid)
        self.variant: CPAttention = next(iter(self.sketch.psi.values()))
        self.learned: list[nn.Parameter] = list(self.variant.parameters())
        self.counts = count_forwards(model.steps, model.inverting, model.tuning, model.editing, self.variant)

    def _sketch_at(self, grid: tuple[int, int]) -> MetaModel:
        model, machine = self.model, self.machine
        outlined = load_on_meta(model.checkpoint, model.load_options.allow_pickle)
        return MetaModel(outlined, model.variant, model.selection, grid, machine.dtype, self._tokens)

    @cached_property
    def sample(self) -> NetworkTimings | None:
        """The network, timed; None: there is not the memory for it."""
        device, multiple = self.machine.device, self._sizes.multiple // self._sizes.vae_factor
        if self.costs.weights + self.costs.slot > free_bytes(device):
            return None
        speed = self.machine.speed
        return time_network(self._sketch_at, self.grid, multiple, self.counts.tuning_rows, device, speed)

    @cached_property
    def costs(self) -> Costs:
        """What the network takes."""
        keeps_bars = self.model.tuning.kv == "stored" or self.variant.at_pivot
        return self.sketch.costs(self.counts.tuning_rows, keeps_bars)

    def lines(self) -> Iterator[str]:
        """For the user."""
        model, counts, sketch, machine = self.model, self.counts, self.sketch, self.machine
        count = f"{self.pictures} pictures" if self.pictures > 1 else "a picture"
        dtype = str(machine.dtype).removeprefix("torch.")
        yield (
            f"{model.checkpoint}: {count} of {self.size[0]} x {self.size[1]}, latents of {self.grid[1]} x "
            f"{self.grid[0]}, {model.steps} steps, {dtype} on {machine.device.type}"
        )
        values = sum(value.numel() for value in sketch.values())
        yield f"  psi: {values:,} values a step, at {len(sketch.sites)} self-attentions"
        slots, unit = self._slots()
        yield f"  slots: {slots} {unit}"
        yield from self._memory(slots)
        psi, bars = self.on_disk()
        yield f"  disk: {in_units(psi + bars)} a picture, of which K-bar and V-bar {in_units(bars)}"
        least = f"{counts.tuning_least} to " if counts.tuning_least < counts.tuning else ""
        source = f" and {counts.source_rows} of the source" if counts.source_rows else ""
        yield (
            f"  forwards: inversion {counts.inversion}, tuning {least}{counts.tuning} ({counts.inner_steps} "
            f"with a backward at most), the edits {counts.edit}"
        )
        yield (
            f"  rows of a forward: inversion {counts.inversion_rows}, tuning {counts.tuning_rows} a slot, "
            f"edit {counts.edit_rows} a target{source}"
        )
        yield from self._work()

    def _slots(self) -> tuple[int, str]:
        model, machine = self.model, self.machine
        optimizer = model.optimizer(self.learned) if self.learned else None
        count, unit = most_slots(model, -(-self.pictures // machine.devices), optimizer)
        if model.slots != "auto":
            return int(model.slots), f"for {unit}"
        if count == 1:
            return 1, f"({unit} one after the other)"
        free = free_bytes(machine.device) - self.costs.weights
        return fitting(self.costs.slot, free, count), f"of {count} {unit} side by side"

    def _memory(self, slots: int) -> Iterator[str]:
        costs, free = self.costs, free_bytes(self.machine.device)
        needed = costs.weights + max(slots * costs.slot, costs.decoding)
        decoding = f"decoding{' by tiles' if costs.tiled else ''} {in_units(costs.decoding)}"
        yield (
            f"  memory: about {in_units(needed)}: U-Net and VAE {in_units(costs.weights)}, a slot "
            f"{in_units(costs.slot)}, or {decoding}; {in_units(free)} are free"
        )
        if needed > free:
            yield f"  that is more than is free: {MEMORY_ADVICE.partition(';')[0]}"

    def on_disk(self) -> tuple[int, int]:
        """The bytes of a picture without K-bar and V-bar, and of those."""
        dtype, steps, sketch = self.model.tuning.store_dtype, self.model.steps, self.sketch
        psi = sum(stored_bytes(value, dtype) for value in sketch.values()) * steps
        latents = (2 * steps + 1) * sketch.latents(1, torch.float32).nbytes  # the trajectory, and z-tilde
        if self.model.tuning.kv == "replayed":
            return psi + latents, 0
        shapes = [(self.counts.tuning_rows, site.tokens, site.dim) for site in sketch.sites]
        bars = sum(2 * stored_bytes(torch.empty(shape, device=META), dtype) for shape in shapes)
        return psi + latents, bars * steps

    def _work(self) -> Iterator[str]:
        counts, costs, tuning = self.counts, self.costs, self.model.tuning
        inversion = counts.inversion * counts.inversion_rows * costs.row
        ends = (counts.tuning - counts.inner_steps) * costs.forward
        inner_steps = counts.inner_steps * costs.inner_step
        edit = counts.edit * counts.edit_rows * costs.row
        source = counts.edit * counts.source_rows * costs.row
        yield (
            f"  work: inversion {_flop(inversion)}, tuning {_flop(ends + inner_steps)} at most, "
            f"an edit {_flop(edit + source)}"
        )
        yield from self._time(inversion + ends + self.targets * edit + source, inner_steps)
        if tuning.retries and self.learned:
            times = "again" if tuning.retries == 1 else f"again, {tuning.retries} times at most"
            yield f"  below {tuning.required_psnr:g} dB it is tuned {times}, with twice the inner steps"
        if self.learned and needs_closure(self.model.optimizer([nn.Parameter(torch.zeros(1))])):
            yield "  the optimiser evaluates the loss itself: each inner step has further forwards"

    def _time(self, forwards: float, inner_steps: float) -> Iterator[str]:
        """By operations of forwards, and of inner steps with their backward."""
        edits = f"{self.targets} edit{'s' if self.targets > 1 else ''}"
        if (timed := self.sample) is None:
            whole = format_seconds((forwards + inner_steps) / self.machine.speed)
            yield (
                f"  time: about {whole} a picture at most, with {edits}: a guess from products of matrices "
                f"({_flop(self.machine.speed)}/s), as there is not the memory to time the network; it may be "
                "several times as long"
            )
            return
        parts = zip(timed.forward.spread(forwards), timed.inner_step.spread(inner_steps), strict=True)
        low, middle, high = (format_seconds(sum(part)) for part in parts)
        yield (
            f"  time: about {middle} a picture, with {edits} and all inner steps made; {low} to {high} by "
            "the quickest and the slowest time of the network here; VAE, disk and what else the machine "
            "does come on top"
        )
        one, step = (f"{spread.spread(spread.flop)[1]:.3g} s" for spread in (timed.forward, timed.inner_step))
        scaled = "" if timed.grid == self.grid else ", scaled up by operations, which is less certain"
        yield (
            f"  timed: a forward {one}, an inner step {step}, at latents of {timed.grid[1]} x "
            f"{timed.grid[0]}{scaled}"
        )


def _flop(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"
