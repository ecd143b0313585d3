"""Where CP-attn may sit: the self-attentions of a U-Net, and the choice among them in peft's words."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from kvinv_pl.attention.unet import BLOCK_LISTS, PRESETS, refuse_other_conditions
from kvinv_pl.errors import UserError


@dataclass(frozen=True)
class Site:
    """One self-attention of the U-Net, and how many work items (slots) are tuned there side by side.

    Args:
        path: The module path inside the U-Net.
        slots: How many independent work items share a forward.
        grid: Height and width of the feature map whose pixels are the tokens.
        dim: Width of K and V, all heads together.
        heads: Number of attention heads.
    """

    path: str
    slots: int
    grid: tuple[int, int]
    dim: int
    heads: int

    @property
    def tokens(self) -> int:
        """Tokens of the sequence: the pixels of the grid, row by row."""
        return self.grid[0] * self.grid[1]


@dataclass
class Selection:
    """Which self-attentions carry CP-attn, in the words of a peft configuration.

    Args:
        target_modules: "encoder", "middle", "decoder" or "all"; or a regex for the whole path; or a list of
            paths, ends of paths and these four words. None means "decoder".
        exclude_modules: The same forms, for what to leave out.
        layers_to_transform: Numbers of blocks: 1 is down_blocks.1 and up_blocks.1. Not with a regex.
        layers_pattern: The module list that `layers_to_transform` counts, if not the list of blocks.
        max_grid: Only self-attentions of at most max_grid x max_grid tokens, in a grid of any sides.
    """

    target_modules: str | list[str] | None = "decoder"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    max_grid: int | None = None


def self_attentions(unet: UNet2DConditionModel, latent_grid: tuple[int, int]) -> list[Site]:
    """Every self-attention that a forward on latents of this size meets, in the order of the forward.

    A copy of the U-Net without weights (meta device) is run, once for all U-Nets of one configuration, so
    grids are seen and never inferred.
    """
    refuse_other_conditions(unet.config)
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return list(_find_sites(type(unet), json.dumps(config), latent_grid))


@cache
def _find_sites(
    kind: type[UNet2DConditionModel], configuration: str, latent_grid: tuple[int, int]
) -> list[Site]:
    config = json.loads(configuration)
    found: dict[str, Site] = {}
    maps: dict[str, tuple[int, int]] = {}  # the last 4-D input that each module saw

    def before(path: str, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        if isinstance(x, Tensor) and x.ndim == 4:
            maps[path] = (x.shape[2], x.shape[3])
        alone = len(args) < 2 and kwargs.get("encoder_hidden_states") is None
        if isinstance(module, Attention) and isinstance(x, Tensor) and alone:
            tokens = x.shape[1] if x.ndim == 3 else x[0, 0].numel()
            found[path] = Site(path, 1, grid_of(path, tokens, maps), module.inner_kv_dim, module.heads)

    with torch.device("meta"), torch.no_grad():
        shadow: Any = kind.from_config(config)
        for path, module in shadow.named_modules():
            module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
        shadow(
            torch.empty(1, config["in_channels"], *latent_grid),
            torch.zeros(1),
            torch.empty(1, 1, context_width(config)),
        )
    return list(found.values())


def context_width(config: Mapping[str, Any]) -> int:
    """The width of what a U-Net of this configuration reads of a prompt."""
    context = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return context if isinstance(context, int) else context[0]


def grid_of(path: str, tokens: int, maps: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Height and width of the feature map that the nearest module around the attention `path` was given.

    `maps` are those of the last 4-D input of modules, by their paths.
    """
    around = path
    while around:
        if around in maps:
            height, width = maps[around]
            if height * width == tokens:
                return height, width
        around = around.rpartition(".")[0]
    raise UserError(
        f"the attention {path} has {tokens} tokens, which no feature map around it has: "
        "CP-attn needs one token for each pixel of the map; leave it out or use another checkpoint"
    )


def select(sites: list[Site], selection: Selection) -> list[Site]:
    """The sites that the selection names, in the order given; that there are none is an error."""
    _refuse_contradictions(selection)
    paths = [site.path for site in sites]
    targets = selection.target_modules or "decoder"
    words = [targets] if isinstance(targets, str) else targets
    presets = [PRESETS[word] for word in words if word in PRESETS]
    regex = isinstance(targets, str) and not presets
    others = targets if regex else [word for word in words if word not in PRESETS]
    config = SimpleNamespace(
        exclude_modules=_expanded(selection.exclude_modules, paths),
        layers_to_transform=selection.layers_to_transform,
        layers_pattern=selection.layers_pattern or BLOCK_LISTS,
        modules_to_save=None,
        target_parameters=None,
    )
    chosen: list[Site] = []
    for site in sites:
        preset = any(part.match(site.path) for part in presets)
        config.target_modules = [site.path.rpartition(".")[2]] if preset else others
        if _peft_chooses(config, site.path):
            chosen.append(site)
    if not chosen:
        raise UserError(
            f"no self-attention matches {selection}: expected {', '.join(PRESETS)}, a regex for the whole "
            f"path, or ends of these paths: {', '.join(paths)}"
        )
    return _bounded(chosen, selection.max_grid)


def _bounded(chosen: list[Site], most: int | None) -> list[Site]:
    """Those of at most `most` x `most` tokens."""
    found = [site for site in chosen if most is None or site.tokens <= most**2]
    if not found:
        height, width = min(chosen, key=lambda site: site.tokens).grid
        raise UserError(
            f"max_grid: expected at least {math.ceil((height * width) ** 0.5)}, got {most}: the smallest of "
            f"the {len(chosen)} self-attentions chosen has {height} x {width} tokens"
        )
    return found


def _refuse_contradictions(selection: Selection) -> None:
    targets, layers = selection.target_modules, selection.layers_to_transform
    if layers is not None and isinstance(targets, str) and targets not in PRESETS:
        raise UserError(
            f"layers_to_transform={layers} cannot be combined with the regex target_modules={targets!r}: "
            f"put the numbers into the regex, or give as target_modules a list or one of {', '.join(PRESETS)}"
        )
    if selection.layers_pattern and layers is None:
        raise UserError(
            f"layers_pattern={selection.layers_pattern!r} says what layers_to_transform counts: give that too"
        )
    if layers == []:
        raise UserError("layers_to_transform=[] chooses nothing: give block numbers, or leave it out")
    if selection.max_grid is not None and selection.max_grid < 1:
        raise UserError(f"max_grid: expected 1 or more, got {selection.max_grid}")
    if targets in ("", []):
        raise UserError(
            f"target_modules={targets!r} chooses nothing: give decoder, for example, or leave it out"
        )


def _expanded(words: str | list[str] | None, paths: list[str]) -> str | list[str] | None:
    """Replace presets by their paths; everything else is unchanged."""
    if words is None or (isinstance(words, str) and words not in PRESETS):
        return words
    expanded: list[str] = []
    for word in [words] if isinstance(words, str) else words:
        expanded += [path for path in paths if PRESETS[word].match(path)] if word in PRESETS else [word]
    return expanded


def _peft_chooses(config: SimpleNamespace, path: str) -> bool:
    """Match as peft does; the one place that knows it."""
    try:
        return bool(check_target_module_exists(config, path))
    except re.error as error:
        raise UserError(
            f"{error.pattern!r} is not a regular expression ({error}): '.*' means anything; or give a list"
        ) from error
