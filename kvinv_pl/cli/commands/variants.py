"""`kvinv variants`, `kvinv sites` and `kvinv check`. The docstrings are the help."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from kvinv_pl.attention import registry
from kvinv_pl.attention.config import class_path, variant_from_config
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.sites import Selection, Site, select, self_attentions
from kvinv_pl.bench.methods import KINDS, is_method, make, methods
from kvinv_pl.cli.messages import describe_type, explain_parser_error
from kvinv_pl.data.images.geometry import fit_geometry
from kvinv_pl.data.runs.tensors import StoreDtype, stored_bytes
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoint import load_on_meta

MIB = 2**20
BRANCHES = 2  # unconditional and conditional


def variants(name: str | None = None, checkpoint: str | None = None, allow_pickle: bool = False) -> None:
    """List the attention variants that are installed; or show one of them, with its options.

    Args:
        name: Which one to show, by its name, class path or FILE.py:CLASS; `kvinv variants NAME` does as well.
        checkpoint: The model for whose decoder the values of psi are counted; default: menagerie.
        allow_pickle: Read the tensors of a pickled checkpoint (.ckpt), which is refused otherwise.
    """
    decoder_sites, problem = list[Site](), ""
    try:
        unet, sizes, _ = load_on_meta(checkpoint or "menagerie", allow_pickle)
        height, width = (side // sizes.vae_factor for side in sizes.sample)
        decoder_sites = select(self_attentions(unet, (height, width)), Selection("decoder"))
    except UserError as error:
        if checkpoint is not None:
            raise
        problem = f"how many values of psi they have is not known: {error}"
    shown = [_find(name)] if name is not None else list(registry.variants().values())
    for variant in shown:
        where = class_path(variant.cls) if variant.cls else "broken"
        print(f"{variant.name:<12}{where}  ({variant.distribution})")
        print(f"{'':<12}{variant.error or variant.summary}")
        if variant.cls and decoder_sites:
            print(f"{'':<12}{_psi_size(variant.cls, decoder_sites, checkpoint or 'menagerie')}")
        if variant.cls and name is not None:
            print("\n".join(_details(variant, variant.cls)))
    if problem:
        print(problem)


def _find(name: str) -> registry.Variant:
    """The variant of this name, class path or FILE.py:CLASS, which need not be installed."""
    if "." not in name:
        return registry.find_variant(name)
    cls = registry.find_class(name)
    return registry.Variant(cls.__name__, cls, "not installed")


def _psi_size(cls: type[CPAttention], sites: list[Site], checkpoint: str) -> str:
    """How many values a variant learns at one timestep, with its default options."""
    missing = [option.name for option in registry.options(cls) if option.default is inspect.Parameter.empty]
    if missing:
        return f"values of psi: it depends on {', '.join(missing)}, which must be given"
    count = sum(_values(cls(site)) for site in sites)
    return f"{count:,} values of psi for one timestep on {checkpoint} (decoder)"


def _details(variant: registry.Variant, cls: type[CPAttention]) -> list[str]:
    lines = textwrap.indent(variant.text.partition("\n")[2].strip(), " " * 12).splitlines()
    options = registry.options(cls)
    lines += ["", f"options, after --model.attention {variant.name}:" if options else "It has no options."]
    for option in options:
        required = option.default is inspect.Parameter.empty
        default = "must be given" if required else f"default: {option.default}"
        lines.append(f"  --model.attention.{option.name}  {describe_type(option.kind)} ({default})")
        lines += textwrap.wrap(option.text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def sites(
    checkpoint: str = "menagerie",
    attention: Callable[[Site], CPAttention] | None = None,
    target_modules: str | list[str] = "decoder",
    exclude_modules: str | list[str] | None = None,
    layers_to_transform: int | list[int] | None = None,
    layers_pattern: str | list[str] | None = None,
    max_grid: int | None = None,
    steps: int = 50,
    size: str | None = None,
    store_dtype: StoreDtype = "int8",
    allow_pickle: bool = False,
) -> None:
    """Show every self-attention of a checkpoint, what psi takes there, and which of them are chosen (*).

    Args:
        checkpoint: "menagerie" (the embedded model), a diffusers folder, a .safetensors file, or a hub id.
        attention: The CP-attn variant, as for --model.attention; default: full_kv.
        target_modules: Which self-attentions carry psi: encoder, middle, decoder or all, or a regex or list
            of paths as in peft's LoraConfig.
        exclude_modules: Which of these to leave out, in the same form.
        layers_to_transform: Keep only the blocks with these indices, as in peft's LoraConfig.
        layers_pattern: The name of the module list whose indices layers_to_transform gives.
        max_grid: Only self-attentions of at most max_grid x max_grid tokens.
        steps: Number of DDIM steps T of the run.
        size: The size of the picture, as WIDTHxHEIGHT in pixels; default: what the checkpoint was made for.
        store_dtype: The type in which psi, K-bar and V-bar are stored on disk; int8 has a scale per channel.
        allow_pickle: Read the tensors of a pickled checkpoint (.ckpt), which is refused otherwise.
    """
    if steps < 1:
        raise UserError(f"steps: expected 1 or more, got {steps}")
    make = attention or registry.resolve("full_kv")
    unet, sizes, _ = load_on_meta(checkpoint, allow_pickle)
    picture = (sizes.sample[1], sizes.sample[0]) if size is None else _size(size)
    width, height = fit_geometry(picture, sizes.sample, sizes.multiple, "keep").resized
    grid = height // sizes.vae_factor, width // sizes.vae_factor
    every = self_attentions(unet, grid)
    selection = Selection(target_modules, exclude_modules, layers_to_transform, layers_pattern, max_grid)
    chosen = select(every, selection)
    values, psi, bars = dict[Site, int](), dict[Site, float](), dict[Site, float]()
    for site in every:
        cp = make(site)
        values[site] = _values(cp)
        psi[site] = _stored(cp.state_dict().values(), store_dtype) * steps / MIB
        bars[site] = _stored([torch.zeros(BRANCHES, site.tokens, site.dim)] * 2, store_dtype) * steps / MIB
    row = f"{{}} {{:<{max(len(site.path) for site in every)}}}  {{:>9}}  {{:>6}}  {{:>5}}  {{:>5}}  {{:>13}}"
    row += "  {:>9}  {:>14}"
    print(f"{checkpoint}: a picture of {width} x {height}, latents of {grid[1]} x {grid[0]}")
    heads = ("path", "grid", "tokens", "width", "heads", "psi, 1 step", "psi, MiB", "psi, K, V, MiB")
    print(row.format(" ", *heads))
    for site in every:
        shape = (site.path, f"{site.grid[0]}x{site.grid[1]}", site.tokens, site.dim, site.heads)
        amounts = (f"{values[site]:,}", f"{psi[site]:.2f}", f"{psi[site] + bars[site]:.2f}")
        print(row.format("*" if site in chosen else " ", *shape, *amounts))
    count, psi_alone, key_values = (sum(of[site] for site in chosen) for of in (values, psi, bars))
    print(f"* {len(chosen)} of {len(every)} chosen: {count:,} values of psi a step; {steps} steps take")
    print(f"  with kv replayed: {psi_alone:.2f} MiB on disk, psi as {store_dtype}")
    print(
        f"  with kv stored: {psi_alone + key_values:.2f} MiB, K-bar and V-bar of two branches (one: half) too"
    )


def _values(cp: CPAttention) -> int:
    """How many values of psi the store keeps for one slot."""
    return sum(value.numel() for value in cp.state_dict().values())


def _stored(values: Iterable[torch.Tensor], dtype: StoreDtype) -> int:
    """The bytes of one step's values on disk."""
    return sum(stored_bytes(value.detach(), dtype) for value in values)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text.strip().lower())
    if found is None:
        raise UserError(f"size: expected WIDTHxHEIGHT in pixels such as 512x768, got {text!r}")
    return int(found.group(1)), int(found.group(2))


def check(target: str, options: dict[str, Any] | None = None) -> None:
    """Check that an attention variant, or a method, does what every one must; the exit code is 1 if not.

    Args:
        target: FILE.py:CLASS, a class path, or a name that `kvinv variants` or `kvinv methods` lists;
            `kvinv check NAME` does as well.
        options: Its arguments, as JSON, such as '{"rank": 4}'; default: its own defaults, and for a variant
            also every other choice of its options.
    """
    from kvinv_pl.testing import method_trials, report, trials

    known = methods()
    if target in known and target not in registry.variants():
        cls = type(make(target, *KINDS.values(), **(options or {})))
    else:
        cls = registry.find_class(target, lambda found: registry.is_variant(found) or is_method(found))
    if is_method(cls):
        found = method_trials(cls, **(options or {}))
    else:
        record = {"class_path": class_path(cls), "init_args": options}
        found = trials(_built(record) if options else cls)
    lines, failed = report(found)
    print("\n".join(lines))
    count = len({trial.check.name for trial in found})
    if failed:
        print(f"{cls.__name__} fails {failed} of {count} checks")
        raise SystemExit(1)
    print(f"{cls.__name__} passes {count} checks")


def _built(record: Mapping[str, Any]) -> Callable[[Site], CPAttention]:
    """The variant's factory; raises UserError with a readable reason."""
    try:
        return variant_from_config(record)
    except UserError as error:
        cause = str(error.__cause__)
        raise UserError(str(error).replace(cause, explain_parser_error(cause, {}, {}, {}))) from error
