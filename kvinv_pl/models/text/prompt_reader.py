"""How the text model reads a prompt: its beginning alone or, in the syntax of web UIs, chunk after chunk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from kvinv_pl.errors import UserError
from kvinv_pl.models.adapters.textual_inversion import multi_vector_words
from kvinv_pl.models.checkpoints.finite import require_finite
from kvinv_pl.models.text.prompt_syntax import PromptSyntax, parse_prompt


class Token(NamedTuple):
    """One token of a prompt."""

    number: int
    name: str
    weight: float


@dataclass(frozen=True, eq=False)
class PromptReader:
    """A tokenizer and a text model, which reads chunks of `length` tokens, start and end included."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    syntax: PromptSyntax = "plain"

    def __post_init__(self) -> None:
        """Refuse a syntax that there is not."""
        if self.syntax not in get_args(PromptSyntax):
            raise UserError(f"prompt_syntax: expected plain or webui, got {self.syntax!r}")

    @property
    def length(self) -> int:
        """The tokens of a chunk, with its start and its end."""
        positions = int(self.text_encoder.config.max_position_embeddings)
        return min(self.tokenizer.model_max_length, positions)

    @cached_property
    def vectors(self) -> dict[int, list[int]]:
        """The tokens of a word that a textual inversion has added with several vectors, by its first."""
        return multi_vector_words(self.tokenizer)

    def text(self, prompt: str) -> str:
        """The words of a prompt, without what its syntax adds to them; a UserError for what is none of it."""
        return " ".join("".join(words.text for words in part) for part in parse_prompt(prompt, self.syntax))

    def tokens(self, prompt: str) -> list[Token]:
        """Every token of a prompt, those that are not read included."""
        return [token for words in self._parts(prompt) for word in words for token in word]

    def chunks(self, prompt: str) -> list[list[Token]]:
        """The tokens that are read, by the chunks that they are read in; at least one, which may be empty."""
        size = self.length - 2
        if self.syntax == "plain":
            return [self.tokens(prompt)[:size]]
        return [chunk for words in self._parts(prompt) for chunk in in_chunks(words, size)]

    def places(self, prompt: str) -> list[range]:
        """The places of these tokens in what `embed` gives for the prompt alone; each start is one before."""
        starts = ((n * self.length + 1, chunk) for n, chunk in enumerate(self.chunks(prompt)))
        return [range(start, start + len(chunk)) for start, chunk in starts]

    def length_of(self, prompts: Iterable[str]) -> int:
        """L of what `embed` gives for these prompts together: so many tokens as whole chunks have."""
        return self.length * lcm(*(len(self.chunks(prompt)) for prompt in prompts))

    def truncated(self, prompt: str) -> str:
        """The end of a prompt that is not read; empty for a prompt that fits."""
        read = sum(map(len, self.chunks(prompt)))
        return str(self.tokenizer.decode([token.number for token in self.tokens(prompt)[read:]])).strip()

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "n L d"]:
        """The text model's reading of prompts, as long as all of them are; see `as_long`."""
        return self.read(prompts)

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "n L d"]:
        """The same, by which gradients may reach what the text model is given."""
        read = [self.chunks(prompt) for prompt in prompts]
        rows = [chunk for chunks in read for chunk in chunks]
        start, end, pad = (int(getattr(self.tokenizer, f"{name}_token_id")) for name in ("bos", "eos", "pad"))
        ids = self._filled([[start, *(token.number for token in chunk), end] for chunk in rows], pad)
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            mask = self._filled([[1] * (len(chunk) + 2) for chunk in rows], 0)
        given = self.text_encoder(ids, attention_mask=mask)[0]
        weights = self._filled([[1.0, *(token.weight for token in chunk)] for chunk in rows], 1.0)
        given = require_finite(weighted(given, weights), "what the text model makes of a prompt", given.dtype)
        each = given.split([len(chunks) for chunks in read])
        return torch.stack(as_long([reading.flatten(0, 1) for reading in each]))

    def _filled(self, rows: Sequence[Sequence[float]], value: float) -> Tensor:
        """Rows filled up to the length of a chunk."""
        filled = [[*row, *[value] * (self.length - len(row))] for row in rows]
        return torch.tensor(filled, device=self.text_encoder.device)

    def _parts(self, prompt: str) -> list[list[list[Token]]]:
        """Tokens, by words, by what BREAK parts."""
        return [
            [word for text, weight in part for word in self._words(text, weight)]
            for part in parse_prompt(prompt, self.syntax)
        ]

    def _words(self, text: str, weight: float) -> Iterator[list[Token]]:
        """Tokens by words; the vectors of a textual inversion's word are one word."""
        numbers = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        added = {*self.tokenizer.get_added_vocab().values()}  # which say no end of a word
        word = list[Token]()
        for number in numbers:
            vectors = self.vectors.get(number, [number])
            names = map(str, self.tokenizer.convert_ids_to_tokens(vectors))
            word += [Token(vector, name, weight) for vector, name in zip(vectors, names, strict=True)]
            if word[-1].name.endswith("</w>") or number in added:
                yield word
                word = []
        if word:
            yield word


def in_chunks(words: Iterable[list[Token]], size: int) -> list[list[Token]]:
    """Words in chunks of `size` tokens at most, none of them cut that is not longer than a chunk itself.

    As in web UIs, a full chunk ends at its last comma, if that is among its last 20 of 75 tokens.
    """
    chunks: list[list[Token]] = [[]]
    for word in (whole[at : at + size] for whole in words for at in range(0, len(whole), size)):
        if len(full := chunks[-1]) + len(word) > size:
            near = max(0, len(full) - size * 20 // 75)
            ends = (at for at in range(len(full), near, -1) if full[at - 1].name == ",</w>")
            cut = len(full) if word[0].name == ",</w>" else next(ends, len(full))
            if len(full) - cut + len(word) > size:
                cut = len(full)
            chunks[-1:] = [full[:cut], full[cut:]]
        chunks[-1] += word
    return chunks


def weighted(
    read: Float[Tensor, "chunks length d"], weights: Float[Tensor, "chunks length"]
) -> Float[Tensor, "chunks length d"]:
    """The tokens of chunks times their weights, and each chunk with the mean magnitude that it had.

    Without the latter a weight would make all of a prompt louder. Web UIs restore the mean itself, which is
    the same where tokens are alike in mean and in magnitude, but of some text models is about 0 (0.0008 in
    the embedded one, beside a magnitude of 0.56): the quotient of two such means is anything.
    """
    if bool((weights == 1).all()):
        return read
    scaled = read.float() * weights[..., None]
    factor = read.float().abs().mean((1, 2), keepdim=True) / scaled.abs().mean((1, 2), keepdim=True)
    unchanged = (weights == 1).all(1)[:, None, None]
    return torch.where(unchanged, read, (scaled * factor).to(read.dtype))


def as_long(readings: Sequence[Float[Tensor, "... _ d"]]) -> list[Float[Tensor, "... L d"]]:
    """Readings of prompts, each repeated until all are of one length, for one forward.

    A cross-attention reads the same from a prompt that is repeated, as its softmax shares out among the
    copies what one would have. Other padding would be read, and a prompt would mean something else beside a
    longer one: psi is tuned beside one negative prompt, and edits with another.
    """
    together = lcm(*(reading.shape[-2] for reading in readings))
    return [torch.cat([reading] * (together // reading.shape[-2]), -2) for reading in readings]
