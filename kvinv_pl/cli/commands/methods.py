"""`kvinv methods`. The docstring is the help."""

import textwrap
from dataclasses import MISSING

from kvinv_pl.attention.config import class_path
from kvinv_pl.attention.registry import arguments_of
from kvinv_pl.bench import methods as registry


def methods(name: str | None = None) -> None:
    """List the methods to compare with: inversions, edits, and wholes, which are both; or show one of them.

    Args:
        name: Which one to show, with its options; `kvinv methods NAME` does as well.
    """
    found = registry.methods()
    if name is not None and name not in found:
        raise registry.unknown_method(name, "method", found)
    shown = list(found.values()) if name is None else [found[name]]
    order = [*registry.KINDS.values(), None]
    for method in sorted(shown, key=lambda method: order.index(method.kind)):
        where = class_path(method.cls) if method.cls else "broken"
        print(f"{method.name:<18}{method.kind or '-':<11}{where}  ({method.distribution})")
        print(f"{'':<18}{method.error or method.summary}")
        if method.cls is not None and name is not None:
            print("\n".join(_details(method)))
    print(
        "\nA row of `kvinv bench`: INVERSION+EDIT or a whole, options in brackets, 'direct+masactrl(layer=3)'"
    )


def _details(method: registry.Method) -> list[str]:
    rest = method.text.partition("\n")[2].strip()
    lines = [*textwrap.indent(rest, " " * 18).splitlines(), ""]
    texts = arguments_of(method.cls) if method.cls else {}
    for name, default in method.options.items():
        shown = "must be given" if default is MISSING else f"default: {default if default != '' else 'none'}"
        lines.append(f"  {name} ({shown})")
        lines += textwrap.wrap(texts.get(name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines
