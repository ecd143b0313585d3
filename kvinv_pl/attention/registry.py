"""The registry of variants, which are found by their entry points."""

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.errors import UserError, near

GROUP = "kvinv_pl.attention"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registered:
    """A class that an entry point names, or why it could not be imported."""

    name: str
    cls: type[Any] | None
    distribution: str
    error: str | None = None

    @property
    def text(self) -> str:
        """The docstring before its Args."""
        return inspect.cleandoc(self.cls.__doc__ or "").partition("Args:\n")[0].strip() if self.cls else ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.text.partition("\n")[0]


class Variant(Registered):
    """One attention variant."""

    cls: type[CPAttention] | None


Kind = TypeVar("Kind", bound=Registered)


def variants() -> dict[str, Variant]:
    """Every variant in the entry-point group `kvinv_pl.attention`, by name; two of one name are an error."""
    return load_group(Variant, GROUP, "attention variants", is_variant, "is not a subclass of CPAttention")


def load_group(
    kind: type[Kind], group: str, what: str, wanted: Callable[[type], bool], otherwise: str
) -> dict[str, Kind]:
    """The classes of an entry-point group by their names, in order; two of one name are an error.

    `wanted` says which classes may be, and `otherwise` what is wrong with the others.
    """
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = points.setdefault(point.name, point)
        if other is not point:
            raise UserError(
                f"two {what} are named {point.name!r}: {other.value} of {_distribution(other)} and "
                f"{point.value} of {_distribution(point)}; uninstall one of them, or have it renamed"
            )
    found: dict[str, Kind] = {}
    for name, point in sorted(points.items()):
        try:
            cls, error = point.load(), None
        except (Exception, SystemExit) as exception:  # other people's modules may raise anything on import
            cls, error = None, f"{point.value} cannot be imported ({_reason(exception)})"
        if error is None and not (isinstance(cls, type) and wanted(cls)):
            cls, error = None, f"{point.value} {otherwise}"
        found[name] = kind(name, cls, _distribution(point), error)
    return found


def load_all() -> dict[str, Variant]:
    """As `variants`, and log a warning for broken ones."""
    found = variants()
    for variant in found.values():
        if variant.error:
            log.warning("skipped the variant %r of %s: %s", variant.name, variant.distribution, variant.error)
    return found


def resolve(name: str) -> type[CPAttention]:
    """The class of a variant by its registered name or its class's name; a broken one is an error now."""
    variant = find_variant(name)
    if variant.cls is None:
        raise UserError(f"the variant {name!r} of {variant.distribution} is broken: {variant.error}")
    return variant.cls


def find_variant(name: str) -> Variant:
    """A variant, broken or not, by its registered name or its class's name."""
    found = variants()
    by_class = {variant.cls.__name__: variant for variant in found.values() if variant.cls}
    if name in found or name in by_class:
        return found.get(name) or by_class[name]
    guess = near(name, [*found, *by_class])
    raise UserError(f"no attention variant {name!r}: expected one of {', '.join(found) or '(none)'}{guess}")


@dataclass(frozen=True)
class Option:
    """One option of a variant: its annotation, default and docstring."""

    name: str
    kind: Any
    default: Any
    text: str


def options(cls: type[CPAttention]) -> list[Option]:
    """The arguments of a variant besides the site, from its signature and the Args of its docstring."""
    try:
        signature = inspect.signature(cls.__init__, eval_str=True)
    except NameError:  # types imported under TYPE_CHECKING
        signature = inspect.signature(cls.__init__)
    parameters = list(signature.parameters.values())[2:]  # without self and the site
    texts = arguments(cls.__init__.__doc__) | arguments(cls.__doc__)
    return [Option(p.name, p.annotation, p.default, texts.get(p.name, "")) for p in parameters]


def arguments(docstring: str | None) -> dict[str, str]:
    """The Args section of a Google-style docstring, by name."""
    _, _, section = inspect.cleandoc(docstring or "").partition("Args:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        if found := re.match(r" {1,7}(\w+)(?: \([^)]*\))?: (.*)", line):
            name, text = found.groups()
            texts[name] = text.strip()
        elif name and line.strip():
            texts[name] += f" {line.strip()}"
    return texts


def arguments_of(cls: type) -> dict[str, str]:
    """The Args of a class and of those that it builds on, by name; the nearest says what a name means."""
    texts = [arguments(each.__dict__.get("__doc__")) for each in reversed(cls.__mro__)]
    return {name: text for found in texts for name, text in found.items()}


def is_variant(cls: type) -> bool:
    """Whether a class is one."""
    return issubclass(cls, CPAttention)


def find_class(target: str, wanted: Callable[[type], bool] = is_variant) -> type[Any]:
    """The class for a registered name, a class path, or FILE.py:CLASS; `wanted` says which classes may be."""
    place, colon, name = target.rpartition(":")
    if not (colon and place.endswith(".py")):
        place, _, name = target.rpartition(".")
        if not place:
            return resolve(target)
        if name == "py":
            raise UserError(f"{target} is a file: name a class in it, {target}:CLASS")
        module = _import(place, Path.cwd())
    else:
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"there is no file {place}; expected FILE.py:CLASS")
        module = _import(file.stem, file.parent)
        if module.__file__ is None or Path(module.__file__).resolve() != file:
            raise UserError(f"{place} has the name of another module, {module.__file__}: rename the file")
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and wanted(cls)):
        classes = [(key, value) for key, value in vars(module).items() if isinstance(value, type)]
        defined = [key for key, value in classes if value.__module__ == module.__name__ and wanted(value)]
        raise UserError(f"{place} has no variant {name!r}; expected one of {', '.join(defined) or '(none)'}")
    return cls


def _import(name: str, folder: Path) -> ModuleType:
    """Import a module, which may be in `folder`."""
    if os.fspath(folder) not in sys.path:
        sys.path.insert(0, os.fspath(folder))
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:  # other people's modules may raise anything on import
        raise UserError(f"{name} cannot be imported ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
