r"""What web UIs write into a prompt besides words: weights in brackets, escapes and BREAK.

`(word:1.3)` weighs 1.3, `(word)` 1.1 and `[word]` 1 / 1.1; brackets in brackets multiply. `\(` is a bracket
of the text, and BREAK ends a chunk of tokens.
"""

import re
from typing import Literal, NamedTuple

from kvinv_pl.errors import UserError

PromptSyntax = Literal["plain", "webui"]
FACTORS = {"(": 1.1, "[": 1 / 1.1}
CLOSES = {"(": ")", "[": "]"}
HEAVIEST = 5.0

_PIECES = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
    |(?P<opens>[(\[])
    |:\s*(?P<weight>[-+]?[\d.,]+)\s*(?=\))  # before the bracket that it is the weight of
    |(?P<closes>[)\]])
    |(?P<break>\bBREAK\b)
    |(?P<text>(?:(?!\bBREAK\b)[^\\()\[\]:])+|.)""",
    re.VERBOSE | re.DOTALL,
)
_UNSUPPORTED = {
    r"<(?:lora|lyco|hypernet):[^>]*>": "names a network, which a prompt cannot: give a LoRA by --model.loras",
    r"\bAND\b": "joins two prompts, which is not supported: leave it out, or write it small",
}
_SCHEDULE = re.compile(r":\s*[\d.]+\s*$|(?<!\\)\|")


class WeightedText(NamedTuple):
    """Words of a prompt, and their weight."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str, syntax: PromptSyntax) -> list[list[WeightedText]]:
    """The parts of a prompt, which BREAK parts, each of words with their weights; never empty.

    A plain prompt is one part of weight 1, whatever is in it. What the syntax does not have, or a weight that
    is not between 0 and 5, is a UserError.
    """
    if syntax == "plain":
        return [[WeightedText(prompt)]]
    for pattern, why in _UNSUPPORTED.items():
        if other := re.search(pattern, prompt):
            raise _syntax_error(prompt, other.start(), f"{other[0]} {why}")
    parts: list[list[WeightedText]] = [[]]
    for piece in _weighted(prompt):
        if piece is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == piece.weight:  # tokens are of whole texts
            parts[-1][-1] = WeightedText(parts[-1][-1].text + piece.text, piece.weight)
        else:
            parts[-1].append(piece)
    return [part for part in parts if any(words.text.strip() for words in part)] or [[WeightedText("")]]


def _weighted(prompt: str) -> list[WeightedText | None]:
    """Words with their weights in order; None is a BREAK."""
    found: list[WeightedText | None] = []
    opened: list[tuple[str, int, int]] = []  # each bracket, its place, and how much is found before it
    number: str | None = None
    for piece in _PIECES.finditer(prompt):
        kind, text, at = str(piece.lastgroup), piece[str(piece.lastgroup)], piece.start()
        if kind == "opens":
            opened.append((text, at, len(found)))
        elif kind == "weight":
            if not (opened and opened[-1][0] == "("):
                raise _syntax_error(prompt, at, f"the weight {text} belongs to no bracket (")
            number = text
        elif kind == "closes":
            if not opened or CLOSES[opened[-1][0]] != text:
                expected = f"{CLOSES[opened[-1][0]]} before it" if opened else "a bracket that it closes"
                raise _syntax_error(prompt, at, f"{text} has no counterpart, expected {expected}")
            bracket, begin, first = opened.pop()
            if bracket == "[" and _SCHEDULE.search(prompt[begin + 1 : at]):
                what = "words that change with the steps, as in [a:b:0.5] and [a|b], are not supported"
                raise _syntax_error(prompt, begin, f"{what}: name one of them")
            factor = FACTORS[bracket] if number is None else _number(prompt, begin, number)
            found[first:] = [
                words and WeightedText(words.text, words.weight * factor) for words in found[first:]
            ]
            number = None
        else:
            found.append(None if kind == "break" else WeightedText(text))
    if opened:
        bracket, at, _ = opened[-1]
        raise _syntax_error(prompt, at, f"{bracket} is never closed, expected {CLOSES[bracket]}")
    for words in found:
        if words and not 0 <= words.weight <= HEAVIEST:
            what = f"the weight of {words.text.strip()!r} is {words.weight:g}, expected 0 to {HEAVIEST:g}"
            raise _syntax_error(prompt, prompt.find(words.text), what)
    return found


def _number(prompt: str, at: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _syntax_error(prompt, at, f"expected a weight such as 1.3, got {text}") from None


def _syntax_error(prompt: str, at: int, what: str) -> UserError:
    begin, end = max(0, at - 20), at + 30
    shown = f"{'...' if begin else ''}{prompt[begin:end]}{'...' if end < len(prompt) else ''}"
    shown = " ".join(shown.split())
    escape = r"; \( and \) are brackets of the text" if "bracket" in what or "closed" in what else ""
    return UserError(f"prompt_syntax webui: at '{shown}' of the prompt: {what}{escape}")
