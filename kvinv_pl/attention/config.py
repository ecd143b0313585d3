"""A variant as class_path and init_args, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.sites import Site
from kvinv_pl.errors import UserError


def class_path(cls: type) -> str:
    """The name by which a class is found again: its module and its name in it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def variant_config(cp: CPAttention) -> dict[str, Any]:
    """The class_path and init_args of a variant."""
    # an option that makes a variant is a wrapped variant
    options: dict[str, Any] = {}
    for name, value in cp.options.items():
        inner: Any = value(cp.site) if callable(value) else None
        options[name] = value if inner is None else variant_config(inner)
    return {"class_path": class_path(type(cp)), "init_args": options}


def variant_from_config(record: Mapping[str, Any]) -> Callable[[Site], CPAttention]:
    """The factory of a variant, from its class_path and init_args.

    Raises UserError with the message of jsonargparse.
    """
    from jsonargparse import ArgumentParser

    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--attention", type=Callable[[Site], CPAttention])
    try:
        read = parser.parse_object({"attention": dict(record)})
        # the second is its name before 4.49
        return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(read).attention
    except Exception as error:  # ArgumentError, and what variants raise
        raise UserError(
            f"{record['class_path']} cannot be made from {record['init_args']}: {error}"
        ) from error
