"""Prompts of any length and with weights, as the text model and the U-Net read them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import checkpoints
import fits
import pytest
import torch
from checkpoints import Kind
from torch import Tensor

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.models.input_warnings import refuse_same_prompts, truncated_prompts
from kvinv_pl.models.load_options import LoadOptions
from kvinv_pl.models.prompts import attention_to_word, subject_words, word_positions
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.models.text.prompt_reader import PromptReader, Token, in_chunks
from kvinv_pl.training.datamodule import SourceImages

LONG = "a cat on the grass " * 6 + "running "  # 31 tokens, of which the tiny model's chunk holds 22


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(str(fits.checkpoint()), options=LoadOptions(prompt_syntax="webui"))


def reader(kind: Kind, syntax: Any = "webui") -> PromptReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = checkpoints.text_encoder(kind).eval()
    return PromptReader(checkpoints.tokenizer(kind), text, syntax)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("kind", ["tiny", "sd15", "sd21"])
def test_plain_prompts_are_read_as_the_tokenizer_cuts_and_fills_them(kind: Kind) -> None:
    plain, prompts = reader(kind, "plain"), ["", "a (cat:1.3)", "a cat on the grass " * 20]
    filled: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = plain.tokenizer(prompts, max_length=plain.length, **filled)["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain.embed(prompts), plain.text_encoder(ids)[0])
    assert plain.truncated(prompts[2]).startswith("on" if kind == "tiny" else "a cat")


@pytest.mark.parametrize("kind", ["tiny", "sd15", "sd21"])
def test_a_prompt_is_read_chunk_after_chunk_each_with_its_start_and_end(kind: Kind) -> None:
    webui, plain = reader(kind), reader(kind, "plain")
    short = ["", "a cat running", "a cat, a dog, (a horse:1.0)"]
    assert torch.equal(webui.embed(short), plain.embed([*short[:2], "a cat, a dog, a horse"]))
    words = (LONG * 3).replace("running", "").split()
    size = webui.length - 2
    chunks = [" ".join(words[at : at + size]) for at in range(0, len(words), size)]
    assert len(chunks) == (5 if kind == "tiny" else 2)
    close(webui.embed([" ".join(words)])[0], plain.embed(chunks).flatten(0, 1))
    assert webui.truncated(" ".join(words)) == ""
    close(webui.embed(["a cat BREAK a dog"])[0], plain.embed(["a cat", "a dog"]).flatten(0, 1))


def as_web_uis_do(names: list[str], size: int) -> list[list[str]]:
    """Token after token, as their own loop goes."""
    chunks: list[list[str]] = []
    chunk: list[str] = []
    comma = -1
    for name in names:
        if name == ",</w>":
            comma = len(chunk)
        elif len(chunk) == size and comma != -1 and len(chunk) - comma <= size * 20 // 75:
            chunks.append(chunk[: comma + 1])
            chunk, comma = chunk[comma + 1 :], -1
        if len(chunk) == size:
            chunks.append(chunk)
            chunk, comma = [], -1
        chunk.append(name)
    return [*chunks, chunk]


@pytest.mark.parametrize("size", [75, 30, 22])
def test_a_full_chunk_ends_at_a_comma_near_its_end_as_in_web_uis(size: int) -> None:
    drawn = random.Random(0)
    for _ in range(40):
        names = drawn.choices([",</w>", "cat</w>"], [1, drawn.choice([3, 15, 60])], k=4 * size)
        chunks = in_chunks([[Token(0, name, 1.0)] for name in names], size)
        ours = [[token.name for token in chunk] for chunk in chunks]
        assert [name for chunk in ours for name in chunk] == names and max(map(len, ours)) <= size
        assert ours == as_web_uis_do(names, size)


def test_no_word_is_cut_but_one_that_is_longer_than_a_chunk() -> None:
    words = [[Token(0, f"{word}.{n}", 1.0) for n in range(3)] for word in range(5)]
    assert [len(chunk) for chunk in in_chunks(words, 8)] == [6, 6, 3]
    assert [len(chunk) for chunk in in_chunks([[Token(0, "x", 1.0)] * 20], 8)] == [8, 8, 4]
    assert in_chunks([], 8) == [[]]


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("kind", ["tiny", "sd21"])
def test_a_weight_scales_its_tokens_and_the_chunk_keeps_its_magnitude(kind: Kind) -> None:
    webui = reader(kind)
    plain, weighted = webui.embed(["a cat running", "a (cat:1.5) running"])
    factors = weighted / plain
    assert (factors - factors[:, :1]).abs().max() < 1e-4  # one for each token
    close(factors[2] / factors[1], torch.full((16,), 1.5))
    assert (factors[[0, 1, 3, 4, -1], 0] - factors[0, 0]).abs().max() < 1e-5 and factors[0, 0] < 1
    close(weighted.abs().mean(), plain.abs().mean())


def test_a_weight_changes_its_own_chunk_alone_and_no_prompt_beside_it(backbone: Backbone) -> None:
    rest = "running on the (grass:1.4)"
    plain, weighted, beside = backbone.embed([LONG, LONG.replace("running", rest), "a cat"])
    close(plain[:24], weighted[:24])
    assert not torch.allclose(plain[24:], weighted[24:])
    assert torch.equal(beside[:24], beside[24:])
    close(beside[:24], backbone.embed(["a cat"])[0])


# ------------------------------------------------------------------------------------------ what reads them


def test_a_prompt_means_the_same_beside_a_longer_one(backbone: Backbone) -> None:
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    alone = backbone.predict(z, t, backbone.embed(["a cat running"]))
    for longer in (LONG, LONG * 2):  # of two chunks, and of three
        beside = backbone.embed(["a cat running", LONG, longer])
        assert beside.shape[1] == (48 if longer == LONG else 6 * 24)
        close(backbone.predict(z, t, beside[:1]), alone)
        close(backbone.predict(z, t, beside[1:2]), backbone.predict(z, t, backbone.embed([LONG])))


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a (cat:1.3) standing", "cat", [2]),
        ("a ((red) cat:0.5) standing", "red cat", [2, 3]),
        (LONG, "running", [24 + 9]),
        (LONG, "cat", [2, 7, 12, 17, 22, 24 + 5]),
        ("a cat BREAK a dog", "dog", [24 + 2]),
        (r"a cat \(red\)", "red", [4]),
        ("a (cat:1.3)", "(cat:1.1)", [2]),
    ],
)
def test_a_word_stands_at_its_tokens_in_whichever_chunk(
    backbone: Backbone, prompt: str, word: str, expected: list[int]
) -> None:
    assert word_positions(backbone, prompt, word) == expected
    z_0 = torch.zeros(1, 4, 8, 8)
    seen = attention_to_word(backbone, z_0, prompt, word, (8, 8))
    assert seen.shape == (8, 8) and bool((seen > 0).all())


def test_a_word_that_is_in_no_chunk_is_refused_with_the_words_that_are(backbone: Backbone) -> None:
    with pytest.raises(UserError, match=r"expected one of a, cat, standing$"):
        word_positions(backbone, "a (cat:1.3) [standing]", "dog")


def test_weights_do_not_hide_the_subject(backbone: Backbone) -> None:
    source, targets = "a (cat:1.2) standing", ["a cat (running:1.3)", "a [cat] jumping"]
    assert subject_words(backbone, source, targets, None) == ["cat", "cat"]


def test_nothing_is_lost_and_nothing_reads_alike(backbone: Backbone) -> None:
    others = [LONG.replace("running", word) for word in ("jumping", "(running:1.2)")]
    assert not list(truncated_prompts(backbone, [("source prompt", LONG), ("negative prompt", LONG * 3)]))
    refuse_same_prompts(backbone, LONG, others)
    assert len({tuple(reading.flatten().tolist()) for reading in backbone.embed([LONG, *others])}) == 3


def test_the_syntax_is_of_the_models_identity_and_one_of_two(backbone: Backbone) -> None:
    plain = Backbone.load(str(fits.checkpoint()))
    assert backbone.identity["prompt_syntax"] == "webui" and "prompt_syntax" not in plain.identity
    assert backbone.identity["sha256"] != plain.identity["sha256"]
    with pytest.raises(UserError, match="prompt_syntax: expected plain or webui, got 'compel'"):
        reader("tiny", "compel")


# ------------------------------------------------------------------------------------------------- a run


def test_a_run_reads_long_and_weighted_prompts_in_every_stage(tmp_path: Path) -> None:
    source, action = LONG.replace("running", "standing"), "(running:1.3)"
    targets = [LONG, LONG.replace("running", action), "a cat running", LONG * 2]
    settings: dict[str, Any] = {
        "prompt_syntax": "webui",
        "steps": 2,
        "inner_steps": 1,
        "negative": "(red:1.2), " * 12,
    }
    module = fits.model(**settings, background="kept", source_guidance=1.5)
    image, out = fits.picture(tmp_path / "cat.png"), tmp_path / "run"
    fits.trainer().run(module, SourceImages(str(image), source, targets, out=str(out)))
    pictures = [fits.opened(path) for path in module.last_edits]
    assert len(pictures) == 4 and len({picture.tobytes() for picture in pictures}) == 4
    store = RunStore(out)
    assert store.read_run()["model"]["prompt_syntax"] == "webui"
    assert all(record["model"] == store.read_run()["model"]["sha256"] for record, _ in store.edits())
    # the source is one of other lengths beside its edits than in tuning, and reads the same
    replayed = fits.edit(store, targets[0], module=module, kv="replayed")
    assert fits.levels(replayed[0], pictures[0]) <= 1
    with pytest.raises(UserError, match=r"made with prompt_syntax = 'webui', not nothing"):
        fits.edit(store, "a cat", module=fits.model(steps=2))


def test_a_mistake_in_a_prompt_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    image, out = fits.picture(tmp_path / "cat.png"), tmp_path / "run"
    for source, target, negative in (
        ("a (cat", "a dog", ""),
        ("a cat", "a (cat:99)", ""),
        ("a cat", "a dog", "[red|cat]"),
    ):
        module = fits.model(prompt_syntax="webui", negative=negative)
        data = SourceImages(str(image), source, [target], out=str(out))
        with pytest.raises(UserError, match="prompt_syntax webui: at '"):
            fits.trainer().run(module, data)
        assert not out.exists()
