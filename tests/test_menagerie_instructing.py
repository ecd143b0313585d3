"""The training of an InstructPix2Pix of the drawn world: its beginning, what it sees, what it leaves."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fits
import pytest
import torch
from few_words import learn_words
from safetensors.torch import load_file
from torch import Tensor, nn

import kvinv_pl
from kvinv_pl.bench.methods import make
from kvinv_pl.bench.running import run_method
from kvinv_pl.menagerie import Animal, acting_otherwise

ROOT = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


@pytest.fixture(scope="module")
def instructing() -> Iterator[Any]:
    """tools/menagerie_training/instructing.py as a module."""
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tools"))
    learn_words()
    yield importlib.import_module("menagerie_training.instructing")
    sys.path[:] = path


@pytest.fixture(scope="module")
def begin(instructing: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, for 32 pixels."""
    denoiser = importlib.import_module("menagerie_training.denoiser")
    folder, tokenizer = tmp_path_factory.mktemp("begin") / "checkpoint", denoiser.build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = importlib.import_module("menagerie_training.autoencoder").build_vae(32, (8, 8, 8), 3)
        vae.register_to_config(scaling_factor=0.5)
        vae.save_pretrained(folder / "vae")
        denoiser.build_unet(8, 3, (16, 16), 1, 16).save_pretrained(folder / "unet")
        denoiser.build_text_encoder(tokenizer, 16).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def run(begin: Path, work: Path, steps: int) -> None:
    command: Any = importlib.import_module("train_menagerie")
    options = [f"--work={work}", f"--begin={begin}", f"--steps={steps}", "--count=8", "--batch=4"]
    with torch.random.fork_rng(devices=[]):
        command.main(["instruct", *options])


@torch.no_grad()
def test_it_begins_as_the_u_net_that_it_was_and_blind_to_the_picture(instructing: Any, begin: Path) -> None:
    known = instructing.UNet2DConditionModel.from_pretrained(begin / "unet").eval()
    wider = instructing.widened(known).eval()
    assert (wider.config["in_channels"], wider.config["out_channels"]) == (6, 3)
    z, t, context = torch.randn(2, 6, 8, 8), torch.tensor([3, 700]), torch.randn(2, 4, 16)
    torch.testing.assert_close(wider(z, t, context).sample, known(z[:, :3], t, context).sample)


def test_words_picture_and_both_are_left_out_as_often_as_in_the_paper(instructing: Any) -> None:
    wordless, blind = instructing.dropped((torch.arange(1000) + 0.5) / 1000)
    found = [int(which.sum()) for which in (wordless & ~blind, wordless & blind, ~wordless & blind)]
    assert found == [50, 50, 50]


class Seen(nn.Module):
    """In the place of a network; keeps what it is given."""

    def forward(self, given: Tensor, t: Tensor | None = None, context: Tensor | None = None) -> Any:
        self.given, self.context = given, context
        return SimpleNamespace(sample=given[:, :3], last_hidden_state=given)


def test_it_sees_the_source_beside_the_noisy_target_and_is_told_what_that_shows(
    instructing: Any, begin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = instructing.CLIPTokenizer.from_pretrained(begin / "tokenizer")
    module = instructing.InstructTraining(Seen(), Seen(), tokenizer, 0.5, 1e-3, 10)
    module.log = lambda *_, **__: None
    module.alphas.fill_(1.0)  # no noise: the target itself
    seeds = torch.arange(64)
    firsts, seconds = torch.randn(2, 64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.training_step([firsts, seconds, seeds], 0)
    z, source = module.nets["unet"].given.chunk(2, 1)
    back = (z == firsts).flatten(1).all(1)
    assert torch.equal(z, torch.where(back.view(-1, 1, 1, 1), firsts, seconds)) and 16 < back.sum() < 48
    blind = (source == 0).flatten(1).all(1)
    other = torch.where(back.view(-1, 1, 1, 1), seconds, firsts) / 0.5  # as diffusers encodes a picture
    assert torch.equal(source[~blind], other[~blind]) and 0 < blind.sum() < 20
    assert torch.equal(module.nets["unet"].context, module.text[0].given)
    wordless = 0
    for seed, own, ids in zip(seeds.tolist(), back.tolist(), module.text[0].given.tolist(), strict=True):
        said = tokenizer.decode(ids, skip_special_tokens=True).strip()
        target = Animal.sample(seed) if own else acting_otherwise(seed)
        wordless += not said
        assert not said or (said.startswith("make it a") and target.action in said and target.species in said)
    assert 0 < wordless < 20


def test_what_is_trained_is_loaded_by_the_method_and_the_stage_goes_on_where_it_was(
    instructing: Any, begin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    run(begin, work, 2)
    folder = work / "instruct-trained"
    capsys.readouterr()
    run(begin, work, 2)
    assert "instruct: finished, 2 steps" in capsys.readouterr().out
    run(begin, work, 3)
    assert "instruct: resuming, to 3 steps" in capsys.readouterr().out

    was, now = (load_file(place / "unet" / WEIGHTS) for place in (begin, folder))
    assert {tensor.dtype for tensor in now.values()} == {torch.float16}
    assert now["conv_in.weight"][:, 3:].any() and not torch.equal(
        now["conv_out.bias"], was["conv_out.bias"].half()
    )
    kept = load_file(begin / "vae" / WEIGHTS), load_file(folder / "vae" / WEIGHTS)
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    for file in folder.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8"), file

    model = kvinv_pl.load(str(fits.checkpoint()), accelerator="cpu", **fits.QUICK)
    method = make("instruct_pix2pix", "whole", checkpoint=str(folder), steps=1)
    animal = Animal.sample(900_000)
    edited = run_method(model, animal.render(size=32), animal.prompt(), "a cat running", editor=method)
    assert edited.size == (32, 32)


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(
    instructing: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "nothing", tmp_path / "work", 1)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "nothing has no folder vae" in said
