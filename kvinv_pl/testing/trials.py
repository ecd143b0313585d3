"""The checks applied to a variant, under its defaults and every choice among its options, or to a method."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.registry import options as options_of
from kvinv_pl.errors import UserError
from kvinv_pl.testing.check import Check, NonconformingError
from kvinv_pl.testing.checks import CHECKS
from kvinv_pl.testing.harness import SITE, Factory
from kvinv_pl.testing.method_checks import DESCRIBED, METHOD_CHECKS


@dataclass(frozen=True)
class Trial:
    """One check of one variant or method; call it, and it raises NonconformingError or returns.

    Args:
        check: The property, and the reason for it.
        variant: Makes the variant for a site, or the method.
        options: In words, what it is made with; empty for its defaults.
        exemption: Its own reason not to pass, if it gives one.
    """

    check: Check
    variant: Callable[..., Any]
    options: str = ""
    exemption: str | None = None

    def __str__(self) -> str:
        """The check and the options, as a test's id."""
        return f"{self.check.name}, {self.options}" if self.options else self.check.name

    def __call__(self) -> None:
        """Run the check; what is exempt must not pass it."""
        if failure := self.failure():
            raise NonconformingError(f"{self}: {failure}. {self.check.why}")

    def failure(self) -> str | None:
        """What is wrong, in one line; None if nothing is."""
        found = None
        try:
            self.check.ask(self.variant)
        except Exception as error:  # whatever a variant or a method does
            found = str(error)
            if not isinstance(error, (NonconformingError, UserError)):  # torch's messages may be a page long
                found = f"{type(error).__name__}: {found.strip().partition(chr(10))[0]}"
        if self.exemption is None:
            return found
        return None if found else "it is declared exempt, and passes: take the exemption away"


def trials(variant: type[CPAttention] | Factory, **options: Any) -> list[Trial]:
    """Every check of a variant, for pytest to be parametrised with.

    Args:
        variant: A subclass of CPAttention, or what makes one for a site.
        **options: What it is made with. Without any, a class is checked with its defaults, and again with
            each other value of each option that is a Literal or a bool, one at a time; values that it
            refuses with a UserError together with its defaults are left out.
    """
    choices = [options] if options or not inspect.isclass(variant) else [{}, *_choices(variant)]
    found = []
    for chosen in choices:
        make = partial(variant, **chosen) if chosen else variant
        words = ", ".join(f"{name}={value}" for name, value in chosen.items())
        try:
            exempt = make(SITE).exempt
        except UserError:
            if not chosen or options:
                raise
            continue
        except Exception as error:  # whatever a variant does
            made = (
                f"{getattr(variant, '__name__', 'the variant')} cannot be made with {words or 'its defaults'}"
            )
            raise UserError(
                f"{made} ({type(error).__name__}: {error}): give it options, or fix it"
            ) from error
        if unknown := exempt.keys() - {check.name for check in CHECKS}:
            names = ", ".join(check.name for check in CHECKS)
            raise UserError(f"exempt: no check {sorted(unknown)[0]!r}; expected one of {names}")
        found += [Trial(check, make, words, exempt.get(check.name)) for check in CHECKS]
    return found


def check_variant(variant: type[CPAttention] | Factory, **options: Any) -> None:
    """Run every trial of a variant; raises one NonconformingError that names all that failed."""
    _run(trials(variant, **options))


def method_trials(method: Callable[..., Any], **options: Any) -> list[Trial]:
    """Every check of a method to compare with, for pytest to be parametrised with.

    Args:
        method: The class of an inversion or an edit, or what makes one. Of a method that is both
            (`render`), only its description is checked: it needs a checkpoint of its own.
        **options: What it is made with; what is left out is its default, or what its `brief` has, with which
            a method that learns for long does so shortly.
    """
    options = {**getattr(method, "brief", {}), **options}
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    make = partial(method, **options) if options else method
    try:
        made = make()
    except Exception as error:  # whatever a method does
        name = getattr(method, "__name__", "the method")
        raise UserError(
            f"{name} cannot be made with {words or 'its defaults'} ({type(error).__name__}: {error})"
        ) from error
    asked = [check for check in METHOD_CHECKS if check.name == DESCRIBED or not hasattr(made, "render")]
    return [Trial(check, make, words) for check in asked]


def check_method(method: Callable[..., Any], **options: Any) -> None:
    """Run every trial of a method; raises one NonconformingError that names all that failed."""
    _run(method_trials(method, **options))


def _run(found: list[Trial]) -> None:
    failures = []
    for trial in found:
        try:
            trial()
        except NonconformingError as error:
            failures.append(str(error))
    if failures:
        raise NonconformingError("\n".join(failures))


def report(found: list[Trial]) -> tuple[list[str], int]:
    """Run trials; a line for each check with what failed below it, and how many checks failed."""
    lines, failed = [], 0
    for check in dict.fromkeys(trial.check for trial in found):
        own = [trial for trial in found if trial.check is check]
        errors = {trial: error for trial in own if (error := trial.failure())}
        reasons = dict.fromkeys(trial.exemption for trial in own if trial.exemption)
        verdict = "FAILED" if errors else "exempt" if reasons else "ok"
        lines.append(f"{verdict:<8}{check.name}: {check.why}")
        for trial, error in errors.items():
            lines.append(f"{'':<8}- {f'with {trial.options}: ' if trial.options else ''}{error}")
        if not errors:
            lines += [f"{'':<8}- {reason}" for reason in reasons]
        failed += bool(errors)
    return lines, failed


def _choices(cls: type[CPAttention]) -> list[Mapping[str, Any]]:
    """Every value but the default of every option with few values."""
    found = []
    for option in options_of(cls):
        literal = get_args(option.kind) if get_origin(option.kind) is Literal else ()
        values = (False, True) if option.kind is bool else literal
        found += [{option.name: value} for value in values if value != option.default]
    return found
