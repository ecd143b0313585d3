"""The training of the embedded model: pairs among its pictures, and beginning with an earlier model."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from few_words import learn_words

from kvinv_pl.menagerie import Animal, Twice, acting_otherwise

ROOT = Path(__file__).parents[1]
CHOOSING = 900_000


@pytest.fixture(scope="module", autouse=True)
def tools() -> Iterator[None]:
    """The programs of tools/ can be imported."""
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tools"))
    learn_words()
    yield
    sys.path[:] = path


def training(name: str) -> Any:
    return importlib.import_module(f"menagerie_training.{name}")


# --- pictures and words ------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [Twice.sample, acting_otherwise])
def test_pictures_are_drawn_with_their_masks(sample: Any) -> None:
    rgb, mask = training("pictures").drawn(range(CHOOSING, CHOOSING + 3), 32, sample)
    for row in range(3):
        scene = sample(CHOOSING + row)
        assert np.array_equal(rgb[row].permute(1, 2, 0), np.asarray(scene.render(size=32)))
        assert np.array_equal(mask[row, 0].bool(), np.asarray(scene.mask(size=32)))


def test_a_batch_of_both_has_the_rows_that_were_asked_for() -> None:
    rows, both = training("pictures").Rows, training("pictures").Both
    first, second = rows(torch.arange(5)), rows(torch.arange(10, 13))
    mixed = both(first, second)
    assert len(mixed) == 8
    assert mixed.__getitems__([6, 0, 4, 7])[0].tolist() == [0, 4, 11, 12]
    for asked in ([1, 2], [5]):  # all from one of them
        assert len(mixed.__getitems__(asked)[0]) == len(asked)


def test_the_second_of_a_pair_is_the_true_picture_of_the_first_in_another_action() -> None:
    for seed in range(CHOOSING, CHOOSING + 20):
        animal, second = Animal.sample(seed), acting_otherwise(seed)
        assert second.action != animal.action
        assert second.render(size=32).tobytes() == animal.render(second.action, 32).tobytes()


def test_a_fifth_of_a_batch_shows_one_animal_twice_and_the_rest_are_pairs() -> None:
    pictures = training("pictures")
    rows = pictures.Side(pictures.Rows(torch.arange(3)), pictures.Rows(torch.arange(20, 28)))
    first, second = rows.__getitems__([7, 0, 1, 6, 3])
    assert (first[0].tolist(), second[0].tolist()) == ([1], [20, 21, 26, 23])


def test_captions_of_one_animal_twice_name_both_actions_and_that_it_is_the_same() -> None:
    scenes = [Twice.sample(CHOOSING + number) for number in range(300)]
    texts = training("denoiser").captions(scenes, np.random.default_rng(0))
    said = [(two, text) for two, text in zip(scenes, texts, strict=True) if text]
    assert 0.05 < 1 - len(said) / len(scenes) < 0.15  # of the empty one
    for two, text in said:
        start, end = text.split(" the same ")
        assert two.first.action in start and two.second.action in end and two.first.species in end
    assert sum(text == two.prompt() for two, text in said) > 0.5 * len(said)


@torch.no_grad()
def test_seconds_of_pairs_read_the_firsts_as_an_edit_reads_its_source() -> None:
    denoiser, pairs = training("denoiser"), training("pairs")
    torch.manual_seed(0)
    unet = denoiser.build_unet(8, 4, (16, 32), 1, 8).eval()
    text = torch.randn(3, 5, 8)
    module = denoiser.UNetTraining(unet, torch.nn.Linear(1, 1), None, None, 1e-3, 10)
    module.on_train_start()
    unet, reading = module.nets["unet"], module.reading
    z = torch.randn(3, 4, 8, 8)  # another picture, a first, and its second
    alone = unet(z, 500, text).sample
    reading.pairs = pairs.Pairs(1)
    read = unet(z, 500, text).sample
    assert torch.allclose(read[:2], alone[:2], atol=1e-6)  # firsts and others read themselves
    assert not torch.allclose(read[2], alone[2], atol=1e-4)
    z[1] = z[2]
    same = unet(z, 500, text[[0, 2, 2]]).sample
    assert torch.allclose(same[1], same[2], atol=1e-5)  # whoever reads its own twin reads itself
    reading.pairs = pairs.Pairs(1, own=True)  # each key twice: the same average of the same values
    assert torch.allclose(unet(z, 500, text[[0, 2, 2]]).sample[2], same[2], atol=1e-5)


def test_the_drawings_know_what_corresponds_in_a_pair_and_what_of_it_counts(tmp_path: Path) -> None:
    known = training("pairs").knowledge(tmp_path, 3, (16, 8))
    for seed in range(3):
        first, second = Animal.sample(seed), acting_otherwise(seed)
        outside = ~np.logical_or(*(np.array(each.mask(size=16)) for each in (first, second))).ravel()
        at = known.corresponding[256][seed]
        assert (at == torch.arange(256))[outside].float().mean() > 0.9  # the scenery stays
        of_first, of_second = (torch.from_numpy(np.array(each.mask(size=16))) for each in (first, second))
        of_animal = at[of_second.flatten()]
        assert of_first.flatten()[of_animal[of_animal >= 0]].float().mean() > 0.6  # a token has some of both
        parts = second.parts(size=64)
        drawn, marked = (
            part.reshape(16, 4, 16, 4).mean((1, 3))
            for part in (np.array(second.mask(size=64)), parts["marks"] | parts["accent"])
        )
        counts = known.weight[seed] / known.weight[seed].min()  # a token of scenery alone counts once
        for_second = counts - 1 - 3 * torch.from_numpy(drawn)
        assert for_second.mean() == pytest.approx(0.3, rel=0.1)  # little of it counts as much as a lot
        assert for_second[torch.from_numpy(marked == 0)].abs().mean() < 0.3
    assert known.corresponding[64].shape == (3, 64) and known.weight.mean(0).mean() == pytest.approx(1)
    again = training("pairs").knowledge(tmp_path, 3, (16, 8))  # from its file
    assert torch.equal(again.of(torch.tensor([2])).corresponding[64][0], known.corresponding[64][2])


@torch.no_grad()
def test_attention_misses_nothing_where_it_lies_on_what_corresponds() -> None:
    """Of attention that is spread evenly, the near share is what a token and its neighbours weigh."""
    pairs = training("pairs")
    attn: Any = Attention(4, heads=1, dim_head=4, bias=False)
    tokens, reading = 16, pairs.ReadingTheFirst()
    hidden = torch.randn(2, tokens, 4)
    at = torch.arange(tokens).roll(1)[None]

    def missed(scale: float, found: torch.Tensor) -> float:
        attn.to_q.weight.copy_(torch.eye(4) * scale)
        attn.to_k.weight.copy_(torch.eye(4) * scale)
        reading.pairs = pairs.Pairs(1, known=pairs.Known({tokens: found}, torch.ones(1, 4, 4)))
        reading(attn, hidden)
        return float(reading.pairs.missed())

    hidden[:] = torch.nn.functional.normalize(torch.randn(tokens, 4), dim=-1)
    hidden[1] = hidden[1][at[0]]  # the second shows at a token what the first shows at the one before
    assert missed(100.0, at) < 0.01 < missed(100.0, at.roll(7, 1))
    near = pairs.nearness(tokens).sum(1)[at] / tokens
    assert missed(0.0, at) == pytest.approx(-near.log().mean().item(), rel=1e-4)
    unknown = at.clone()
    unknown[0, 3:] = -1  # counts for nothing
    assert missed(0.0, unknown) == pytest.approx(-near[0, :3].log().mean().item(), rel=1e-4)


def test_every_word_of_a_pair_is_one_token_of_the_tokenizer_and_the_prompt_fits() -> None:
    tokenizer = training("denoiser").build_tokenizer()
    for number in range(20):
        prompt = Twice.sample(CHOOSING + number).prompt()
        assert len(tokenizer(prompt)["input_ids"]) == len(prompt.split()) + 2 < tokenizer.model_max_length


# --- the autoencoder ---------------------------------------------------------------------------------

SMALL, LARGE = (16, (8, 16), 3), (32, (8, 8, 16), 5)  # size, channels, latent channels


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Any, Any]:
    """An autoencoder, and one of twice the size that was begun with it."""
    small, large = (training("autoencoder").build_vae(*shape) for shape in (SMALL, LARGE))
    small.save_pretrained(tmp_path / "vae")
    training("autoencoder").begun_from(large, tmp_path)
    return small, large


@torch.no_grad()
def test_the_inner_levels_of_a_begun_autoencoder_are_those_of_the_earlier_one(begun: Any) -> None:
    small, large = begun
    x = torch.randn(2, 8, 16, 16)
    y, z = x, x
    for inner, same in (
        (small.encoder.down_blocks[0], large.encoder.down_blocks[1]),
        (small.encoder.down_blocks[1], large.encoder.down_blocks[2]),
        (small.encoder.mid_block, large.encoder.mid_block),
    ):
        y, z = inner(y), same(z)
        assert torch.equal(y, z)
    # and of what they find, the first channels are the same
    known, wider = (
        net.quant_conv(net.encoder.conv_out(net.encoder.conv_act(net.encoder.conv_norm_out(y)))).chunk(2, 1)
        for net in begun
    )
    for half, wide in zip(known, wider, strict=True):
        torch.testing.assert_close(wide[:, :3], half, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_free_channels_are_normalised_and_the_decoded_picture_stays(begun: Any) -> None:
    vae, rgb = begun[1].eval(), training("pictures").drawn(range(CHOOSING, CHOOSING + 8), 32)[0]
    before, trip = training("autoencoder").means(vae, rgb), training("autoencoder").round_trip(vae, rgb)
    training("autoencoder").normalise_free_channels(vae, 3, rgb, scale=0.5)
    after = training("autoencoder").means(vae, rgb)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    torch.testing.assert_close(after[:, 3:].mean((0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(after[:, 3:].std((0, 2, 3)), torch.full((2,), 2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(training("autoencoder").round_trip(vae, rgb), trip, atol=1e-4, rtol=0)


def loss_of(module: Any, batch: list[torch.Tensor]) -> torch.Tensor:
    module.log_dict = lambda *_, **__: None  # there is no trainer
    torch.manual_seed(0)
    return module.training_step(batch, 0)


def test_a_teacher_draws_the_first_channels_to_its_own_and_is_not_saved(begun: Any) -> None:
    small, large = begun
    batch = list(training("pictures").drawn(range(CHOOSING, CHOOSING + 4), 32))
    make = training("autoencoder").VAETraining
    with torch.random.fork_rng(devices=[]):
        alone, taught = make(large, 1e-3, 9, 1e-6), make(copy.deepcopy(large), 1e-3, 9, 1e-6, small)
        assert taught.state_dict().keys() == alone.state_dict().keys()
        assert loss_of(taught, batch) > loss_of(alone, batch)


def test_training_the_decoder_alone_leaves_every_latent_as_it_was(tmp_path: Path) -> None:
    autoencoder, command = training("autoencoder"), importlib.import_module("train_menagerie")
    before = autoencoder.build_vae(32, (8, 8, 16), 3)
    before.save_pretrained(tmp_path / "vae-trained")
    with torch.random.fork_rng(devices=[]):
        command.main(["decoder", f"--work={tmp_path}", "--count=8", "--size=32", "--steps=2", "--batch=2"])
    after = autoencoder.AutoencoderKL.from_pretrained(tmp_path / "decoder-trained")
    was, now = before.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name, value in now.items() if not torch.equal(value, was[name])}
    assert changed == {"decoder", "post_quant_conv"}


# --- the U-Net and the text encoder ------------------------------------------------------------------


@torch.no_grad()
def test_a_begun_u_net_with_more_channels_predicts_as_the_earlier_one_whatever_they_hold() -> None:
    denoiser = training("denoiser")
    known, wider = (denoiser.build_unet(8, channels, (16, 16), 1, 16).eval() for channels in (3, 5))
    training("beginning").take_over(wider, known.state_dict(), new_inputs=False)
    z, t, context = torch.randn(2, 5, 8, 8), torch.tensor([3, 700]), torch.randn(2, 4, 16)
    before, after = known(z[:, :3], t, context).sample, wider(z, t, context).sample
    torch.testing.assert_close(after[:, :3], before, atol=1e-5, rtol=1e-4)
    assert not after[:, 3:].any()


def test_a_begun_text_encoder_knows_the_words_of_the_earlier_one_by_their_spelling() -> None:
    denoiser, beginning = training("denoiser"), training("beginning")
    tokenizer = denoiser.build_tokenizer()
    known, begun = (denoiser.build_text_encoder(tokenizer, 16).eval() for _ in range(2))
    assert beginning.take_over_words(begun, tokenizer, known, tokenizer) == len(tokenizer)
    ids = tokenizer(Animal.sample(CHOOSING).prompt(), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(begun(ids).last_hidden_state, known(ids).last_hidden_state)


# --- mistakes ----------------------------------------------------------------------------------------


def refusal(stage: str, work: Path, earlier: Path, channels: str, capsys: pytest.CaptureFixture[str]) -> str:
    command = importlib.import_module("train_menagerie")
    tiny = [f"--work={work}", "--steps=1", "--count=8", "--size=32", f"--channels={channels}"]
    with pytest.raises(SystemExit) as caught, torch.random.fork_rng(devices=[]):
        command.main([stage, *tiny, f"--begin={earlier}"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training("autoencoder").build_vae(32, (8, 8, 16), 3).save_pretrained(tmp_path / "work" / "vae-trained")
    for stage, channels, part in (("vae", "[8,8,16]", "vae"), ("unet", "[16,16]", "unet")):
        said = refusal(stage, tmp_path / "work", tmp_path / "nothing", channels, capsys)
        assert f"nothing has no folder {part}" in said


def test_an_autoencoder_of_another_shape_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training("autoencoder").build_vae(16, (8, 8, 16), 3).save_pretrained(tmp_path / "earlier" / "vae")
    said = refusal("vae", tmp_path / "work", tmp_path / "earlier", "[8,8,16]", capsys)
    assert "has 3 levels, 3 latent channels and 16 pixels: expected one more of --channels" in said
