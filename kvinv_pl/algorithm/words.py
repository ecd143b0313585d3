"""What two prompts have in common."""

from kvinv_pl.errors import UserError

STRUCTURE = frozenset(
    ["a", "an", "the", "is", "are", "was", "were", "that", "which", "of", "in", "on", "at", "and"]
)
"""Words that cannot be the subject."""


def common_subject(source: str, target: str, remedy: str) -> str:
    """The last word that both prompts have before they differ, as the target has it.

    "a cat standing on grass" and "a cat running on grass" are both of a cat. A UserError with the remedy
    where both begin with nothing in common, or do not differ.
    """
    source_words, target_words = (
        [word.strip(",.;:") for word in prompt.split()] for prompt in (source, target)
    )
    equal = [a.lower() == b.lower() for a, b in zip(target_words, source_words, strict=False)]
    common = target_words[: [*equal, False].index(False)]
    words = [word for word in common if word.lower() not in STRUCTURE]
    same = all(equal) and len(source_words) == len(target_words)
    if same or not words:
        raise UserError(
            f"subject: cannot tell which word of {target!r} is the subject by comparing it with {source!r}: "
            f"{remedy}"
        )
    return words[-1]
