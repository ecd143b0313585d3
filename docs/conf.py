"""The site that `make docs` builds: the README, the pages that it names, docstrings of the public names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = re.compile(r"\]\(((?:docs/)?[\w-]+)\.md[)#]")
NAME = re.compile(r"^\| `(kvinv_pl[\w.]*)` \|", re.M)

project = "KV Inversion"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# the sources are the repository, so that links between its pages are the same here and there
root_doc = "README"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [each.name for each in ROOT.iterdir() if each.is_dir() and each.name != "docs"]
myst_heading_anchors = 4
default_role = "literal"  # docstrings have one backtick around code
autodoc_member_order = "bysource"
autodoc_typehints, autodoc_typehints_description_target = "description", "documented"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = project
html_copy_source = html_show_sourcelink = False


def pages() -> list[str]:
    """The pages beside the README, in the order in which it names them; they are the navigation."""
    documentation = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Documentation\n")[2]
    return list(dict.fromkeys(PAGE.findall(documentation)))


def public_names() -> list[str]:
    """What the page of the Python names lists, with modules."""
    return NAME.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))


def _docstring_of(name: str) -> str:
    """What has autodoc put a docstring there, with those of a class's methods unless they are Lightning's."""
    module, _, last = name.rpartition(".")
    kind = "class" if last[0].isupper() else "function"
    members = "   :members:\n   :special-members: __call__\n"
    shown = kind == "class" and last not in ("KVInversion", "SourceImages")
    return f".. auto{kind}:: {module}.{last}\n{members if shown else ''}"


def _complete(_app: Any, page: str, source: list[str]) -> None:
    """Add what only the site has: its navigation, and the docstrings."""
    if page == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n" + "\n".join(pages()) + "\n```\n"
    elif page == "docs/python":
        source[0] += (
            "\n## Docstrings\n\n```{eval-rst}\n" + "\n".join(map(_docstring_of, public_names())) + "```\n"
        )


def _take_as_it_is(_app: Any, what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """A bar is a bar in docstrings, |eps|, FILE:WEIGHT is no address, a colon tells no type."""
    lines[:] = [line.replace("|", r"\|").replace("FILE:", r"FILE\:") for line in lines]
    if what in ("attribute", "property"):
        lines[:1] = [line.replace(": ", " - ") for line in lines[:1]]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _complete)
    app.connect("autodoc-process-docstring", _take_as_it_is, priority=400)  # before napoleon
