"""Which files of a model's folder have its weights: in full, in half precision, or before the average."""

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

VARIANTS = ("", "fp16", "non_ema")
"""The variants that are taken without being asked for, the best first; "" has no variant in its name."""


class WeightFiles(NamedTuple):
    """The files of one variant."""

    variant: str
    suffix: str
    names: list[str]


def weight_files(names: Collection[str], part: str, variant: str | None = None) -> WeightFiles | None:
    """Of one part of a pipeline: the variant asked for, or else the best that there is; safetensors first.

    Parts that do not have the variant are taken in another, as in diffusers.
    """
    return next(_all(names, part, [*([] if variant is None else [variant]), *VARIANTS]), None)


def variants_in(names: Collection[str], part: str) -> list[str]:
    """The variants that a folder has; "" is the one without a name."""
    return list(dict.fromkeys(found.variant for found in _all(names, part, VARIANTS)))


def _all(names: Collection[str], part: str, variants: Collection[str]) -> Iterator[WeightFiles]:
    stems = ("model", "pytorch_model") if part == "text_encoder" else ("diffusion_pytorch_model",) * 2
    for variant in variants:
        for stem, suffix in zip(stems, (".safetensors", ".bin"), strict=True):
            whole = f"{stem}.{variant}" if variant else stem
            patterns = (f"{whole}{suffix}", f"{whole}-*-of-*{suffix}")
            found = sorted(name for name in names if any(fnmatchcase(name, each) for each in patterns))
            if found:
                yield WeightFiles(variant, suffix, found)
