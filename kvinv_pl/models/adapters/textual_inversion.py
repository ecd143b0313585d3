"""Textual inversions: words that a file adds to the tokenizer, each with one vector or several."""

from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextModel, CLIPTokenizer

from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.hub import resolve_file
from kvinv_pl.models.checkpoints.loading import REDOWNLOAD, digest
from kvinv_pl.models.checkpoints.single_file import LORA, read_state_dict, refuse_pickle

NEEDED = "expected a textual inversion"
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}
Words = dict[str, Tensor]


def add_embeddings(
    given: Sequence[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, allow_pickle: bool
) -> tuple[dict[str, str], list[str]]:
    """Add textual inversions, each FILE or WORD=FILE; their digests with their words, and a line of them."""
    digests, added = dict[str, str](), list[str]()
    for n, text in enumerate(given, 1):
        word, name = _word_and_name(text)
        path = resolve_file(name, "a textual inversion")
        words = _read(path, word, allow_pickle)
        for each, vectors in words.items():
            _add(path, each, vectors, tokenizer, text_encoder)
            added.append(f"{each} ({len(vectors)} vector{'s' * (len(vectors) > 1)})")
        digests[f"embedding {n}"] = f"{digest(path)} {' '.join(words)}"
    return digests, [f"words added to the tokenizer: {', '.join(added)}"] if added else []


def multi_vector_words(tokenizer: CLIPTokenizer) -> dict[int, list[int]]:
    """The tokens that one token stands for: of WORD, WORD_1, WORD_2 and so on, as diffusers names them."""
    added = tokenizer.get_added_vocab()
    found = dict[int, list[int]]()
    for word, first in added.items():
        further = takewhile(lambda name: name in added, (f"{word}_{n}" for n in count(1)))
        found[first] = [first, *(added[name] for name in further)]
    return {first: tokens for first, tokens in found.items() if len(tokens) > 1}


def _word_and_name(text: str) -> tuple[str | None, str]:
    word, equals, name = text.partition("=")
    if not equals or Path(text).expanduser().exists():
        return None, text
    if not word.strip() or len(word.split()) != 1:
        raise UserError(f"--model.embeddings: expected FILE or WORD=FILE with one word, got {text!r}")
    return word.strip(), name


def _read(path: Path, word: str | None, allow_pickle: bool) -> Words:
    """The words of a file, each with its vectors; those of a web UI are called as their file is."""
    refuse_pickle(path, allow_pickle)
    state = read_state_dict(path)
    if any("lora_" in name or ".lora." in name for name in state):
        raise UserError(f"{path} contains {LORA}; {NEEDED}")
    if "clip_g" in state:
        raise UserError(f"{path} contains a textual inversion for SDXL, which is not supported; {NEEDED}")
    of_web_ui = state.get("string_to_param", state)  # of one word, whose name it lacks, in either form
    if vectors := [of_web_ui[name] for name in ("*", "emb_params") if name in of_web_ui]:
        found = {path.stem: vectors[0]}
    else:
        found = dict(state)
    for name, vectors in found.items():
        if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or len(name.split()) != 1:
            raise UserError(f"{path} contains {name!r}, which is not a word with its vectors; {NEEDED}")
    if not found or (word is not None and len(found) > 1):
        raise UserError(f"{path} has {len(found)} words ({', '.join(found)}); {NEEDED} of one, for WORD=FILE")
    return {word or name: torch.atleast_2d(vectors.detach().float()) for name, vectors in found.items()}


def _add(
    path: Path, word: str, vectors: Tensor, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    """One word: a token for each of its vectors, and a row of the text model's table for each token."""
    table = text_encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    if vectors.shape[1] != table.embedding_dim:
        raise UserError(
            f"{path} has vectors of width {_width(vectors.shape[1])}, and the text model of this checkpoint "
            f"reads {_width(table.embedding_dim)}: take one that was made for it"
        )
    if not vectors.isfinite().all():
        raise UserError(f"{path} is damaged: its vectors are not finite; {REDOWNLOAD}")
    names = [word, *(f"{word}_{n}" for n in range(1, len(vectors)))]
    known = {name.lower() for name in tokenizer.get_vocab()}
    if taken := [name for name in names if {name.lower(), f"{name.lower()}</w>"} & known]:
        raise UserError(f"{path}: the word {taken[0]!r} is known already: give it another, as WORD={path}")
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=True) for name in names])
    tokens = cast(list[int], tokenizer.convert_tokens_to_ids(names))
    rows = max(table.num_embeddings, max(tokens) + 1)
    weight = table.weight.new_zeros(rows, table.embedding_dim)
    weight[: table.num_embeddings] = table.weight.data
    weight[tokens] = vectors.to(weight)
    table.weight, table.num_embeddings = nn.Parameter(weight, requires_grad=False), rows
    text_encoder.config.vocab_size = rows


def _width(width: int) -> str:
    return f"{width} ({WIDTHS[width]}'s)" if width in WIDTHS else str(width)
