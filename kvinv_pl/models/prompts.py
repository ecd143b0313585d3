"""Words and their tokens in a prompt: the subject's word, and a mask from the attention to it."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.words import common_subject
from kvinv_pl.attention.cross_attention import cross_attentions, recording_maps
from kvinv_pl.attention.unet import in_decoder
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.finite import require_finite
from kvinv_pl.models.stable_diffusion import Backbone

SHARES = (0.2, 0.4, 0.6)  # of the noise schedule, at which attention maps are taken
START = (0,)  # the prompt's first token, to compare with


def word_positions(backbone: Backbone, prompt: str, word: str) -> list[int]:
    """The token positions of a word (or several in a row) in a prompt, at every occurrence.

    A word that is not in the prompt, or comes after the last token that the model reads, is a UserError.
    """
    reader = backbone.prompts
    tokens, word_ids = reader.tokens(prompt), [token.number for token in reader.tokens(word)]
    ids = [token.number for token in tokens]
    # such as a textual inversion's, which say no end of a word; in upper case, their names are others
    added = {*backbone.tokenizer.get_added_vocab().values()}

    def begins() -> Iterator[int]:
        for at in range(len(ids) - len(word_ids) + 1):
            whole = not at or tokens[at - 1].name.endswith("</w>") or ids[at - 1] in added
            if word_ids and whole and ids[at : at + len(word_ids)] == word_ids:
                yield at

    found = sorted({at + n for at in begins() for n in range(len(word_ids))})
    if not found:
        words = ", ".join(dict.fromkeys(reader.text(prompt).split())) or "no words"
        raise UserError(f"{word!r} is not in the prompt {prompt!r}: expected one of {words}")
    places = [place for chunk in reader.places(prompt) for place in chunk]
    if found[-1] >= len(places):
        raise UserError(f"{word!r} comes after the end of what the model reads of the prompt: put it earlier")
    return [places[at] for at in found]


@torch.no_grad()
def mask_from_word(
    backbone: Backbone, pixels: Float[Tensor, "3 h w"], prompt: str, word: str
) -> Float[Tensor, "h w"]:
    """A mask of 0 and 1 from the attention map of a word of the prompt.

    The decoder's cross-attention to the word, against that to the prompt's start, is averaged over noised
    versions of the picture (always the same ones) and cut midway between its least and its most.

    Args:
        backbone: the model.
        pixels: the picture as the model takes it, in -1..1.
        prompt: what it shows.
        word: which word of the prompt; it may be several in a row.
    """
    z_0 = backbone.encode(pixels[None].to(backbone.alphas_cumprod.device))
    attention = attention_to_word(backbone, z_0, prompt, word, (pixels.shape[1], pixels.shape[2])).cpu()
    return (attention > (attention.min() + attention.max()) / 2).float()


@torch.no_grad()
def attention_to_word(
    backbone: Backbone, z_0: Float[Tensor, "1 c h w"], prompt: str, word: str, grid: tuple[int, int]
) -> Float[Tensor, "i j"]:
    """The mean cross-attention, on a grid, to a word of the prompt in noised versions of a latent."""
    positions = word_positions(backbone, prompt, word)
    alphas = backbone.alphas_cumprod
    t = torch.tensor([int(share * len(alphas)) for share in SHARES], device=alphas.device)
    noise = torch.randn(len(t), *z_0.shape[1:], generator=torch.Generator().manual_seed(0)).to(z_0.device)
    z_t = backbone.noised(z_0, noise, t)
    paths = in_decoder(cross_attentions(backbone.unet))
    with recording_maps(backbone.unet, [positions], START, paths) as maps:
        backbone.predict(z_t, t, backbone.embed([prompt]).expand(len(t), -1, -1))
    attention = maps.current(grid)
    if attention is None:
        raise UserError("this checkpoint has no cross-attention to read a mask from: give a mask or use SAM")
    return require_finite(attention.mean(0), "the model's attention to the word", backbone.unet.dtype)


def subject_of(source: str, target: str) -> str:
    """The word for the subject where none is given; a UserError where the prompts do not tell it."""
    return common_subject(source, target, "give --model.subject")


def subject_positions(
    backbone: Backbone, source: str, targets: Sequence[str], subject: str | None
) -> list[list[int]]:
    """The token positions of the subject's word in each target; raises UserError if it is not there.

    Without a word, see `subject_of`.
    """
    words = subject_words(backbone, source, targets, subject)
    return [word_positions(backbone, target, word) for target, word in zip(targets, words, strict=True)]


def subject_words(backbone: Backbone, source: str, targets: Sequence[str], subject: str | None) -> list[str]:
    """The subject's word of each target, whatever weight it has; see `subject_positions`."""
    text = backbone.prompts.text
    return [subject or subject_of(text(source), text(target)) for target in targets]
