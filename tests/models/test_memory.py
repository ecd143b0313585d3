"""How many pictures are tuned side by side where nobody has said how many."""

import gc
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from kvinv_pl.models.costs import memory
from kvinv_pl.stages.progress import Progress
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion
from kvinv_pl.training.workload import KEPT_LOADED, Workload


@pytest.fixture(scope="module")
def module() -> KVInversion:
    made = fits.model(slots="auto")
    made.load_backbone(torch.float32)
    return made


def test_memory_is_known_where_the_kernel_does_not_say_how_much_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under the first Windows Subsystem for Linux."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemFree: 4 kB\n")
    assert memory.free_bytes(torch.device("cpu")) > 2**20
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable: 4 kB\n")
    assert memory.free_bytes(torch.device("cpu")) == 4096


def test_what_a_slot_takes_grows_with_the_picture_and_with_the_branches(module: KVInversion) -> None:
    small, large = (memory.bytes_per_slot(module.denoiser, (side, side), 2.0) for side in (8, 16))
    one_branch = memory.bytes_per_slot(module.denoiser, (8, 8), 1.0)
    assert one_branch < small < large
    psi = sum(value.nbytes for value in module.denoiser.psi.parameters())
    assert one_branch > memory.COPIES * psi > 0


def test_a_slot_reads_as_many_chunks_as_all_prompts_have() -> None:
    made = fits.model(slots="auto", prompt_syntax="webui")
    made.load_backbone(torch.float32)
    denoiser, long = made.denoiser, ("a BREAK cat", "a BREAK b BREAK c")

    def counted(*prompts: str) -> int:
        return memory.bytes_per_slot(denoiser, (8, 8), 2.0, prompts=prompts)

    def real(*prompts: str) -> int:
        z, t = torch.zeros(1, 4, 8, 8), denoiser.table.timesteps[:1]
        predict = denoiser.guided_prediction(denoiser.backbone.embed(["", *prompts])[:2, None].clone(), 2.0)
        with denoiser.attached().blend():
            return memory.saved_bytes(lambda: predict(z, t), denoiser.parameters())

    assert counted("a cat", "a dog") == counted() < counted(long[0]) < counted(*long)
    assert counted(*long) - counted() == real(*long) - real("")


@pytest.mark.parametrize(
    ("fitting", "pictures", "chosen"), [(0.5, 5, 1), (3.2, 5, 3), (3.2, 2, 2), (1e6, 1000, memory.MOST)]
)
def test_as_many_as_fit_are_tuned_side_by_side(
    fitting: float, pictures: int, chosen: int, module: KVInversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = memory.bytes_per_slot(module.denoiser, (8, 8), 2.0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(fitting * each / memory.SHARE))
    slots, reason = memory.side_by_side(module.denoiser, (8, 8), 2.0, pictures)
    assert slots == chosen and "are free" in reason


def test_this_machine_has_memory_free() -> None:
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_what_was_chosen_is_said_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits.pictures(tmp_path / "in", "abc")
    data = SourceImages(str(tmp_path / "in"), out=str(tmp_path / "out"))
    fits.trainer(quiet=False).fit(fits.model(slots="auto", steps=1, inner_steps=1), datamodule=data)
    said = capsys.readouterr().err
    assert "slots: 3 of 3 pictures side by side (each takes about " in said and "tuning 3 pictures" in said


def alive() -> int:
    """The bytes of all tensors that the collector knows."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Alive(Callback):
    """What is alive when a phase begins, at most, of what came after the fit began."""

    peak = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gc.collect()
        gc.freeze()  # what is there by now is not looked through

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peak = max(self.peak, alive())


@pytest.mark.parametrize("curriculum", ["sequential", "pivot"])
def test_what_is_alive_grows_neither_with_timesteps_nor_with_pictures(
    curriculum: Any, tmp_path: Path
) -> None:
    """But for the latents of the trajectories in work, one for each timestep.

    With three phases as many are on their way to the disk as ever are.
    """
    peaks = []
    for steps, pictures in ((3, 1), (6, 1), (3, 2)):
        folder = tmp_path / f"{steps}-{pictures}"
        fits.pictures(folder / "in", map(str, range(pictures)))
        watch = Alive()
        data = SourceImages(str(folder / "in"), SOURCE, out=str(folder / "out"))
        module = fits.model(steps=steps, inner_steps=1, curriculum=curriculum, slots=1)
        fits.trainer(callbacks=[watch]).fit(module, datamodule=data)
        peaks.append(watch.peak)
        level = data.images[0].store.trajectory()[0].numel() * 4
        psi = sum(value.numel() for value in data.images[0].store.step(0).psi.values()) * 4
    assert peaks[0] > psi  # the pass at work is seen
    assert psi > 3 * level  # so that one psi kept for each timestep would be seen
    assert peaks[1] - peaks[0] <= 3 * 3 * level
    assert peaks[2] - peaks[0] <= 3 * level


def test_of_many_pictures_few_are_held_until_their_turn(module: KVInversion, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,source\n" + "".join(f"a.png,cat {n}\n" for n in range(12)))
    fits.picture(tmp_path / "a.png")
    data = SourceImages(str(tmp_path / "list.csv"), out=str(tmp_path / "out"))
    shares = Workload(module, data, ["invert"], dry_run=False).shares(
        1, torch.device("cpu"), Progress(quiet=True)
    )
    assert len(shares) == 12 and sum(work._loaded is not None for work in data.images) == KEPT_LOADED < 12


def test_every_device_has_pictures(tmp_path: Path) -> None:
    fits.pictures(tmp_path / "in", "abcde")
    data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    module = fits.model(slots="auto", steps=1)
    module.load_backbone(torch.float32)
    shares = Workload(module, data, ["fit"], dry_run=False).shares(
        2, torch.device("cpu"), Progress(quiet=True)
    )
    assert [members for _, members in shares] == [[0, 1, 2], [3, 4]]


def test_an_optimiser_that_takes_its_own_steps_gets_its_pictures_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits.pictures(tmp_path / "in", "ab")
    data = SourceImages(str(tmp_path / "in"), out=str(tmp_path / "out"))
    settings: dict[str, Any] = {"slots": "auto", "steps": 1, "inner_steps": 1}
    fits.trainer(quiet=False).fit(fits.model(optimizer=torch.optim.LBFGS, **settings), datamodule=data)
    assert all(work.store.done() == {0} for work in data.images)
    assert "tuning b.png" in capsys.readouterr().err
