"""What web UIs write into prompts, and what is no such thing."""

from __future__ import annotations

import pytest

from kvinv_pl.errors import UserError
from kvinv_pl.models.text.prompt_syntax import parse_prompt


def weights(prompt: str) -> list[tuple[str, float]]:
    (part,) = parse_prompt(prompt, "webui")
    return [(words.text, words.weight) for words in part]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat, running", [("a cat, running", 1)]),
        ("", [("", 1)]),
        ("a (cat) runs", [("a ", 1), ("cat", 1.1), (" runs", 1)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat : .5 )", [("cat ", 0.5)]),
        ("(a [red] cat:1.5)", [("a ", 1.5), ("red", 1.5 / 1.1), (" cat", 1.5)]),
        ("((a cat:0.5) runs:2)", [("a cat", 1), (" runs", 2)]),
        ("(cat:0)", [("cat", 0)]),
        (r"cat \(animal\), \[x\]", [("cat (animal), [x]", 1)]),
        (r"(cat \(animal\):1.2)", [("cat (animal)", 1.2)]),
        (r"\\(cat)", [("\\", 1), ("cat", 1.1)]),
        ("16:9, :d, re:zero", [("16:9, :d, re:zero", 1)]),
        ("(re:zero)", [("re:zero", 1.1)]),
        ("a cat and a dog, BREAKFAST | <sks>", [("a cat and a dog, BREAKFAST | <sks>", 1)]),
    ],
)
def test_brackets_weigh_what_is_in_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_break_parts_a_prompt_within_brackets_too() -> None:
    parts = parse_prompt("BREAK a (cat BREAK runs:2) BREAK", "webui")
    assert parts == [[(" a ", 1.0), ("cat ", 2.0)], [(" runs", 2.0), (" ", 1.0)]]


@pytest.mark.parametrize("prompt", ["a (cat:1.3)", "((", "[a|b] AND BREAK", "(cat:99)"])
def test_a_plain_prompt_is_taken_as_it_is(prompt: str) -> None:
    assert parse_prompt(prompt, "plain") == [[(prompt, 1.0)]]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a (cat running", "at 'a (cat running' of the prompt: ( is never closed, expected )"),
        ("a [cat", "[ is never closed, expected ]"),
        ("a cat)", ") has no counterpart, expected a bracket that it closes; \\( and \\) are brackets of"),
        ("(a [cat)", ") has no counterpart, expected ] before it"),
        ("a cat :3)", "the weight 3 belongs to no bracket ("),
        ("(cat:1,3)", "expected a weight such as 1.3, got 1,3"),
        ("(cat:1.2.3)", "expected a weight such as 1.3, got 1.2.3"),
        ("a (cat:13) runs", "the weight of 'cat' is 13, expected 0 to 5"),
        ("(cat:-1)", "the weight of 'cat' is -1, expected 0 to 5"),
        ("((cat:3):3)", "the weight of 'cat' is 9, expected 0 to 5"),
        ("a [cat:dog:0.5] runs", "at 'a [cat:dog:0.5] runs' of the prompt: words that change with the steps"),
        ("a [cat|dog]", "words that change with the steps"),
        ("a cat AND a dog", "AND joins two prompts, which is not supported"),
        ("a cat <lora:pixel:0.8>", "<lora:pixel:0.8> names a network"),
        (
            "word " * 20 + "(cat:13)\n" + "word " * 20,
            "at '...ord word word word (cat:13) word word word",
        ),
    ],
)
def test_what_the_syntax_does_not_have_is_said_in_one_line(prompt: str, says: str) -> None:
    with pytest.raises(UserError) as found:
        parse_prompt(prompt, "webui")
    assert says in str(found.value) and "\n" not in str(found.value)
    assert str(found.value).startswith("prompt_syntax webui: ")
