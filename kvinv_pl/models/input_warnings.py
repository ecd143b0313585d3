"""Warns of what the model does not use: ends of prompts, unknown words, and the noisiest timesteps."""

import re
from collections.abc import Iterable, Iterator, Sequence

from kvinv_pl.algorithm.schedule import Schedule
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, COATS, COLOURS, GROUNDS, SPECIES
from kvinv_pl.models.stable_diffusion import Backbone

MAX_SKIPPED = 0.03
"""Of the timesteps; the usual 50 steps leave out 2%, and 20 steps 5%, which many edits miss."""


def truncated_prompts(backbone: Backbone, prompts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each prompt (what it is, and its text) that is cut, once, with the words that are lost."""
    for what, prompt in dict.fromkeys(prompts):
        if lost := backbone.prompts.truncated(prompt):
            yield (
                f"the {what} is longer than the model reads, and these words are lost "
                f"(--model.prompt_syntax webui reads them): {lost}"
            )


def unknown_words(backbone: Backbone, prompts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each prompt (what it is, and its text) with words unknown to the embedded model."""
    tokenizer = backbone.prompts.tokenizer
    known = set(tokenizer.get_vocab())  # in which a word that was learned is one token
    for what, prompt in dict.fromkeys(prompts):
        text = backbone.prompts.text(prompt)
        for word in tokenizer.get_added_vocab():  # of textual inversions
            text = text.replace(word, " ")
        words = dict.fromkeys(re.findall(r"[^\W\d_]{2,}", text.lower()))
        if lost := [word for word in words if f"{word}</w>" not in known]:
            yield (
                f"the {what} has words that the embedded model has not learned: {', '.join(lost)}; it knows "
                f"{', '.join((*ACTIONS, *SPECIES, *COATS, *COLOURS, *GROUNDS))}"
            )


def refuse_same_prompts(backbone: Backbone, source: str, targets: Sequence[str]) -> None:
    """Refuse targets that differ from the source, or from each other, only where the model does not read."""
    reader = backbone.prompts
    read = {tuple(map(tuple, reader.chunks(source))): source}
    for target in targets:
        other = read.setdefault(tuple(map(tuple, reader.chunks(target))), target)
        if other != target and (reader.truncated(other) or reader.truncated(target)):
            name = "the source prompt" if other == source else f"the target {other!r}"
            raise UserError(
                f"the target {target!r} differs from {name} only after what the model reads of a prompt "
                f"({reader.length - 2} tokens): put what changes nearer to its beginning, or give "
                "--model.prompt_syntax webui, which reads on"
            )


def skipped_timesteps(backbone: Backbone, table: Schedule) -> str | None:
    """A line for the user, where steps begin well before the last timestep that has signal; or else None.

    The spacings are those of Lin et al. (arXiv 2305.08891, Table 2).
    """
    alphas = backbone.scheduler.alphas_cumprod
    signal = len(alphas) if backbone.predicts_v else int((alphas > 0).sum())
    first = int(table.timesteps[0])
    share = (signal - 1 - first) / len(alphas)
    if share <= MAX_SKIPPED:
        return None
    # epsilon carries no information about the picture where there is no signal: there, trailing is refused
    other = ", or --model.timestep_spacing trailing" if signal == len(alphas) else ""
    return (
        f"--steps {len(table)} begins at timestep {first} of {signal - 1}, and the noisiest {share:.0%} of "
        f"the timesteps are left out: take more{other}"
    )
