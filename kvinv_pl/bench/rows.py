"""The rows of a bench, as they are typed: `direct+masactrl`, `kv_inversion(attention=low_rank)`, ..."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import dataclass, field
from typing import Any

from kvinv_pl.algorithm.method import Editor, Inversion, Renderer
from kvinv_pl.bench.methods import Kind, make, methods
from kvinv_pl.errors import UserError, near
from kvinv_pl.training.module import KVInversion

EXPECTED = (
    "expected EDIT, INVERSION+EDIT or METHOD, each with options in brackets if any, and @N for N cases; "
    'what is no word or number is in quotes, weights="a.bin"'
)

SETTINGS = tuple(inspect.signature(KVInversion).parameters)
"""What a row may set of the model."""


@dataclass(frozen=True)
class Row:
    """One way of editing: an inversion and an edit, or a method that is both.

    An option that a method does not have is a setting with which the model is loaded for this row.
    """

    text: str
    editor: str
    inversion: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of both methods, by their names."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the model."""
    cases: int | None = None
    """Only the first so many; None: all."""

    @classmethod
    def parse(cls, text: str) -> Row:
        """Read `INVERSION(option=value)+EDIT(option=value)@cases`."""
        name, at, count = text.rpartition("@")
        if at and not (count.strip().isdigit() and int(count) > 0):
            raise UserError(f"{text}: {EXPECTED}")
        name = name if at else text
        try:
            tree = ast.parse(name.strip(), mode="eval").body
            parts = [tree.left, tree.right] if isinstance(tree, ast.BinOp) else [tree]
            if isinstance(tree, ast.BinOp) and not isinstance(tree.op, ast.Add):
                raise ValueError
            calls = [_call(part) for part in parts]
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{text}: {EXPECTED}") from error
        options, settings = dict[str, dict[str, Any]](), dict[str, Any]()
        known = methods()
        for method, given in calls:
            method_options = known[method].options if method in known else {}
            options[method] = {key: value for key, value in given.items() if key in method_options}
            settings |= {key: value for key, value in given.items() if key not in method_options}
        if unknown := [key for key in settings if key not in SETTINGS]:
            own = [option for method in options if method in known for option in known[method].options]
            names = " nor ".join(method for method, _ in calls)
            raise UserError(
                f"{text}: neither {names} nor the model has {unknown[0]!r}"
                f"{near(unknown[0], [*own, *SETTINGS])}; `kvinv methods NAME` lists options"
            )
        (editor, _), *before = reversed(calls)
        inversion = before[0][0] if before else None
        written = "+".join(map(_written, parts))
        found = cls(written, editor, inversion, options, settings, int(count) if at else None)
        found.make_methods()
        return found

    @classmethod
    def name_of(cls, text: str) -> str:
        """The name under which a row stands in tables, as which it may be typed otherwise."""
        try:
            return cls.parse(text).text
        except UserError:  # a row that no method makes
            return text

    def make_methods(self) -> tuple[Inversion | None, Editor | Renderer]:
        """Its methods; raises UserError if there are none of these names, or they do not go together."""
        kinds: tuple[Kind, ...] = ("edit",) if self.inversion else ("edit", "whole")
        editor = make(self.editor, *kinds, **self.options.get(self.editor, {}))
        if self.inversion is None:
            return None, editor
        return make(self.inversion, "inversion", **self.options.get(self.inversion, {})), editor


def _call(part: ast.expr) -> tuple[str, dict[str, Any]]:
    """`name` or `name(option=value, ...)`."""
    if isinstance(part, ast.Name):
        return part.id, {}
    if not (isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and not part.args):
        raise ValueError
    return part.func.id, {str(option.arg): _value(option.value) for option in part.keywords}


def _written(part: ast.expr) -> str:
    """A call as rows are named, however it was typed."""
    if not isinstance(part, ast.Call):
        return ast.unparse(part)
    options = [f"{each.arg}={_value_written(each.value)}" for each in part.keywords]
    return f"{ast.unparse(part.func)}({', '.join(options)})" if options else ast.unparse(part.func)


def _value_written(node: ast.expr) -> str:
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return json.dumps(ast.literal_eval(node), ensure_ascii=False) if is_text else ast.unparse(node)


def _value(node: ast.expr) -> Any:
    """A number, a text, a tuple, ...; a bare word is a text."""
    if isinstance(node, ast.Name):
        return node.id
    return ast.literal_eval(node)
