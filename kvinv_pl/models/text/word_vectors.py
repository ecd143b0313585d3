"""Words of a prompt that are read by other vectors than the text model's own, which gradients may reach."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.text.prompt_reader import PromptReader


def vectors_of_word(reader: PromptReader, word: str) -> Float[Tensor, "tokens e"]:
    """The text model's own vectors of a word's tokens, in fp32."""
    return _table(reader).weight.detach()[_numbers(reader, word)].float().clone()


def embed_with_vectors(
    reader: PromptReader, prompts: Sequence[str], words: Mapping[str, Float[Tensor, "_ e"]]
) -> Float[Tensor, "n L d"]:
    """The prompts as `PromptReader.embed` reads them, with these vectors for the tokens of these words."""
    numbers = {word: _numbers(reader, word) for word in words}

    def exchange(table: nn.Module, given: Any, out: Tensor) -> Tensor:
        ids = given[0]
        for word, vectors in words.items():
            begins = _begins(ids, numbers[word])
            for n, vector in enumerate(vectors):
                place = begins.roll(n, -1)[..., None]  # none begins so late that it would come round
                out = torch.where(place, vector.to(out.dtype), out)
        return out

    with _table(reader).register_forward_hook(exchange):
        return reader.read(prompts)


def _begins(ids: Tensor, numbers: Sequence[int]) -> Tensor:
    """Where these tokens stand in a row, True at the first of them; like ids."""
    found = torch.ones_like(ids, dtype=torch.bool)
    for n, number in enumerate(numbers):
        found &= (ids == number).roll(-n, -1)
    found[:, ids.shape[1] - len(numbers) + 1 :] = False
    return found


def _numbers(reader: PromptReader, word: str) -> list[int]:
    numbers = [token.number for token in reader.tokens(word)]
    if not numbers:
        raise UserError(f"word: expected a word, got {word!r}")
    return numbers


def _table(reader: PromptReader) -> nn.Embedding:
    found: Any = reader.text_encoder.get_input_embeddings()
    return found
