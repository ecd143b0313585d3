"""Textual inversions: read as diffusers reads them, every vector counted; what is none is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from checkpoints import make
from commands import QUICK, kvinv
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.load_options import LoadOptions
from kvinv_pl.models.prompts import word_positions
from kvinv_pl.models.stable_diffusion import Backbone

WORD, VECTORS = "<my-cat>", torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"a {WORD} running on the grass", "a cat", f"the dog, {WORD}", ""]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def checkpoint(home: Path) -> Path:
    return make("tiny", home)


def saved(path: Path, tensors: Mapping[str, Tensor]) -> str:
    save_file(dict(tensors), path)
    return str(path)


def load(checkpoint: Path, *embeddings: str, **options: Any) -> Backbone:
    return Backbone.load(str(checkpoint), torch.float32, LoadOptions(embeddings=list(embeddings), **options))


@pytest.fixture(scope="module")
def file(home: Path) -> str:
    return saved(home / "learned_embeds.safetensors", {WORD: VECTORS})


@pytest.fixture(scope="module")
def taught(checkpoint: Path, file: str) -> Backbone:
    return load(checkpoint, file)


def test_prompts_are_read_as_by_the_pipeline_of_diffusers(
    checkpoint: Path, file: str, taught: Backbone, tmp_path: Path
) -> None:
    with quiet():
        pipe: Any = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
        pipe.load_textual_inversion(file)
        theirs = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)[0]
        pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(taught.embed(PROMPTS), theirs)
    assert torch.equal(Backbone.load(str(tmp_path / "saved")).embed(PROMPTS), theirs)
    assert taught.notes == [f"words added to the tokenizer: {WORD} (3 vectors)"]
    plain = Backbone.load(str(checkpoint))
    assert torch.equal(taught.embed(["a cat"]), plain.embed(["a cat"]))
    assert not torch.equal(taught.embed(PROMPTS[:1]), plain.embed(PROMPTS[:1]))


def test_every_vector_of_a_word_counts_where_the_words_of_a_prompt_are(taught: Backbone) -> None:
    assert word_positions(taught, PROMPTS[0], WORD) == [2, 3, 4]
    assert word_positions(taught, PROMPTS[0], "running") == [5]
    assert word_positions(taught, PROMPTS[0], f"{WORD} running") == [2, 3, 4, 5]
    assert taught.prompts.truncated(f"a cat {WORD} " * 4 + "a red") == ""  # 22 tokens, as many as are read
    assert taught.prompts.truncated(f"a cat {WORD} " * 4 + "a red cat") == "cat"
    assert len(taught.prompts.chunks(f"{WORD} " * 8)[0]) == 22
    webui = replace(taught.prompts, syntax="webui")  # which cuts no word
    assert [len(chunk) for chunk in webui.chunks(f"({WORD}:1.2) " * 8)] == [21, 3]


def test_every_layout_is_the_same_word(checkpoint: Path, taught: Backbone, tmp_path: Path) -> None:
    expected, ours = taught.embed(PROMPTS), list[Backbone]()
    web = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "x", "step": 5}
    torch.save(web, tmp_path / "web.pt")
    torch.save({WORD: VECTORS}, tmp_path / "learned_embeds.bin")
    with pytest.raises(UserError, match="can run code"):
        load(checkpoint, f"{WORD}={tmp_path / 'web.pt'}")
    (tmp_path / "folder").mkdir()
    saved(tmp_path / "folder" / "learned_embeds.safetensors", {"<other>": VECTORS})
    for given in (
        f"{WORD}={saved(tmp_path / 'emb.safetensors', {'emb_params': VECTORS})}",
        f"{WORD}={tmp_path / 'web.pt'}",
        f"{WORD}={tmp_path / 'folder'}",
        str(tmp_path / "learned_embeds.bin"),
    ):
        ours.append(load(checkpoint, given, allow_pickle=True))
        assert torch.equal(ours[-1].embed(PROMPTS), expected), given
    named = load(checkpoint, saved(tmp_path / "EasyNegative.safetensors", {"emb_params": VECTORS[0]}))
    tokens = [token.name for token in named.prompts.tokens("a easynegative, easynegatives")]
    assert tokens[1] == "easynegative" and tokens.count("easynegative") == 1
    assert word_positions(named, "a EasyNegative cat", "cat") == [3]
    assert word_positions(named, "a easynegative cat", "EasyNegative") == [2]


def test_the_identity_is_of_the_file_and_its_word(
    checkpoint: Path, file: str, taught: Backbone, tmp_path: Path
) -> None:
    other = saved(tmp_path / "other.safetensors", {WORD: VECTORS + 1})
    of = {given: load(checkpoint, given).identity["sha256"] for given in (f"<my-dog>={file}", other)}
    plain = Backbone.load(str(checkpoint)).identity["sha256"]
    assert len({*of.values(), plain, taught.identity["sha256"]}) == 4
    assert taught.identity["embeddings"] == [file]
    copy = saved(tmp_path / "copy.safetensors", {WORD: VECTORS})
    assert load(checkpoint, copy).identity["sha256"] == taught.identity["sha256"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({WORD: (2, 1024)}, "has vectors of width 1024 (Stable Diffusion 2's), and the text model of this"),
        ({WORD: (2, 768)}, "reads 16: take one that was made for it"),
        ({"cat": (16,)}, "the word 'cat' is known already: give it another, as WORD="),
        ({"clip_l": (2, 16), "clip_g": (2, 20)}, "for SDXL"),
        ({"lora_unet_mid.lora_up.weight": (2, 2)}, "contains a LoRA: give it to --model.loras"),
        ({"encoder.weight": (2, 2, 3)}, "contains 'encoder.weight', which is not a word with its vectors"),
        ({"two words": (16,)}, "contains 'two words'"),
        ({}, "has 0 words"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_what_is_no_word_of_this_text_model_is_refused(
    tensors: dict[str, tuple[int, ...]], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = saved(tmp_path / "x.safetensors", {name: torch.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        load(checkpoint, path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_word_is_one_word_and_of_one_file(checkpoint: Path, file: str, tmp_path: Path) -> None:
    several = saved(tmp_path / "several.safetensors", {"<a>": VECTORS, "<b>": VECTORS + 1})
    assert len(load(checkpoint, several).prompts.tokens("<a> <b>")) == 6
    for given, words in [
        ([f"two words={file}"], "expected FILE or WORD=FILE with one word"),
        ([f"={file}"], "expected FILE or WORD=FILE with one word"),
        ([f"<c>={several}"], "has 2 words"),
        ([file, file], "is known already"),
        ([saved(tmp_path / "nan.safetensors", {WORD: VECTORS * torch.nan})], "not finite"),
        ([str(tmp_path / "nowhere.safetensors")], "there is no file"),
    ]:
        with pytest.raises(UserError, match=words):
            load(checkpoint, *given)


def test_a_mask_is_made_from_such_a_word_and_with_what_else_is_chosen(
    checkpoint: Path, file: str, tmp_path: Path
) -> None:
    picture, out = fits.picture(tmp_path / "cat.png"), tmp_path / "mask.png"
    mask = ("mask", picture, "--word", WORD, "--source", f"a {WORD}", "--checkpoint", checkpoint, "-o", out)
    made = kvinv(*mask, "--model.embeddings", file)
    assert made.code == 0 and out.exists(), made
    for options, words in [
        (("--model.clip_skip", 2), "--model.clip_skip: expected 1 to 1"),
        (("--model.clip_skip", "x"), "--model.clip_skip: expected a whole number, got 'x'"),
        (("--model.lora", "x"), "no option"),
    ]:
        answer = kvinv(*mask, *options)
        assert answer.code == 2 and words in answer.err, answer


def test_a_run_keeps_to_its_words(checkpoint: Path, file: str, tmp_path: Path) -> None:
    picture, out = fits.picture(tmp_path / "cat.png"), tmp_path / "run"
    fit = ("fit", "--checkpoint", checkpoint, "--image", picture, "--source", f"a {WORD} standing")
    fit = (*fit, "--out", out, *QUICK, "--model.required_psnr", 0)
    fitted = kvinv(*fit, "--model.embeddings", file)
    assert fitted.code == 0, fitted.err
    assert f"words added to the tokenizer: {WORD} (3 vectors)" in fitted.out + fitted.err
    assert json.loads((out / "run.json").read_text())["model"]["embeddings"] == [file]
    edited = kvinv("edit", "--run", out, "--target", f"a {WORD} running")
    assert edited.code == 0, edited.err
    answer = kvinv(*fit)
    assert answer.code == 2 and "was made with" in answer.err, answer
