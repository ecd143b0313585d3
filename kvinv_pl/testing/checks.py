"""The checks of the conformance kit, each with the reason for it."""

import json
import tempfile
from dataclasses import replace

import torch
from jaxtyping import config
from torch import Tensor

from kvinv_pl.attention.config import variant_config, variant_from_config
from kvinv_pl.attention.registry import options
from kvinv_pl.attention.sites import Site
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.testing.check import CHECKS, NonconformingError, check, same
from kvinv_pl.testing.harness import (
    PATH,
    SITE,
    Factory,
    Harness,
    attention,
    features,
    fused,
    seeded,
    written_out,
)

__all__ = ["CHECKS"]
SILENT = 1e-7  # a gradient below this is none
GRIDS = ((3, 5), (6, 2), (1, 7))


def _slots_first(harness: Harness) -> None:
    """Raise unless the first axis of every parameter is slots, and that of every buffer that is kept."""
    learned = harness.values()
    for name, value in harness.stored().items():
        if value.ndim == 0 or len(value) != harness.site.slots:
            advice = "" if name in learned else "; a constant is registered persistent=False"
            raise NonconformingError(
                f"{name} has the shape {tuple(value.shape)} for {harness.site.slots} slots: slots come "
                f"first{advice}"
            )


def _harnesses(variant: Factory, site: Site = SITE) -> list[tuple[str, Harness]]:
    """The variant as tuning leaves it, without a mask and, if it takes one, with one."""
    plain = Harness(variant, site).start().shake()
    masked = [Harness(variant, site).start().shake().mask()] if plain.cp.takes_masks else []
    return [("", plain), *((" with a mask", harness) for harness in masked)]


@check("identity at reset", "Tuning starts from the model's own attention, where nothing has been learned.")
def _identity(variant: Factory) -> None:
    harness, x = Harness(variant).start().shake(), features(2)
    harness.cp.reset(seeded(0))
    same(harness.blend(x), harness.bare(x), "attention after reset against the model's own")


@check("alive at reset", "From a start without any gradient no optimiser ever gets away.")
def _alive(variant: Factory) -> None:
    harness = Harness(variant).start()
    _slots_first(harness)
    gradients = harness.gradients(features(2))
    for slot in range(SITE.slots):
        if gradients and max(float(gradient[slot].abs().max()) for gradient in gradients.values()) < SILENT:
            raise NonconformingError(f"no parameter has a gradient at the start (slot {slot})")


@check("every parameter learns", "A parameter without a gradient fills the disk and does nothing.")
def _learning(variant: Factory) -> None:
    harness, x = Harness(variant).start(), features(2)
    if not harness.values():
        return
    optimizer = torch.optim.Adam(harness.values().values(), lr=0.05)
    for name, gradient in harness.gradients(x).items():
        harness.values()[name].grad = gradient
    optimizer.step()
    for name, gradient in harness.gradients(x).items():
        if float(gradient.abs().max()) < SILENT:
            raise NonconformingError(f"{name} has no gradient after the first step")


@check("reset is deterministic", "A run can be repeated or resumed only from the same start.")
def _deterministic(variant: Factory) -> None:
    def started(noise: int) -> tuple[dict[str, Tensor], Tensor]:
        harness = Harness(variant)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            if noise:
                harness.shake()
            harness.start(seed=7)
        return {name: value.detach() for name, value in harness.values().items()}, harness.blend(features(2))

    (first, out), (second, again) = started(noise=0), started(noise=1)
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            raise NonconformingError(f"{name} is not the same after reset with the same generator")
    same(again, out, "attention after reset with the same generator")


@check("slots apart", "Pictures that are tuned side by side must not see each other.")
def _slots(variant: Factory) -> None:
    for how, harness in _harnesses(variant):
        x = features(2)
        _slots_first(harness)
        out = harness.blend(x)
        alone = Harness(variant, replace(SITE, slots=1)).start().read(harness)
        if how:
            alone.mask()
        same(alone.blend(x[:, :1]), out[:, :1], f"slot 0 by itself{how}")

        x.requires_grad_()
        wanted = [x, *harness.values().values()]
        found = torch.autograd.grad(
            harness.blend(x)[:, 0].square().sum(), wanted, allow_unused=True, materialize_grads=True
        )
        if found[0][:, 1:].any() or any(gradient[1:].any() for gradient in found[1:]):
            raise NonconformingError(f"the gradient of slot 0 reaches another slot{how}")

        with torch.no_grad():
            for value in harness.values().values():
                value[1:] += 1
            x[:, 1:] -= 1
            same(harness.blend(x)[:, 0], out[:, 0], f"slot 0 with other slots{how}")


@check("any number of branches", "Tuning has one or two, an edit one to three a target; psi serves all.")
def _branches(variant: Factory) -> None:
    for how, harness in _harnesses(variant):
        x = features(4)
        together = harness.blend(x)
        for some in (slice(0, 1), slice(0, 2), slice(3, 4)):
            same(harness.blend(x[some]), together[some], f"the same branch among {len(x[some])} and 4{how}")


@check("saved and loaded exactly", "Edits and resumed runs load psi from disk.")
def _saved(variant: Factory) -> None:
    harness, x = Harness(variant).start(seed=1).shake(), features(2)
    out, fresh = harness.blend(x), Harness(variant).start(seed=2)
    _slots_first(fresh)
    with tempfile.TemporaryDirectory(prefix="kvinv-check-") as folder, torch.no_grad():
        store = RunStore(folder)
        for slot in range(SITE.slots):  # a file a picture, as in a run
            psi = {f"{PATH}.{name}": value[slot] for name, value in harness.stored().items()}
            store.save_step(slot, psi, torch.zeros(1, 1, 1), None, {})
            for name, value in fresh.stored().items():
                value[slot] = store.step(slot).psi[f"{PATH}.{name}"]
    if not torch.equal(fresh.blend(x), out):
        raise NonconformingError(
            "a variant that reads the saved psi attends otherwise: keep all in parameters and buffers"
        )


@check("half precision", "The U-Net may be in bfloat16 or float16, while psi is in float32.")
def _half(variant: Factory) -> None:
    single = Harness(variant).start().shake()
    wanted = single.blend(features(2))
    for dtype in (torch.bfloat16, torch.float16):
        harness, x = Harness(variant, dtype=dtype).start().read(single), features(2).to(dtype)
        for name, value in harness.values().items():
            if value.dtype != torch.float32:
                raise NonconformingError(f"{name} is in {value.dtype}, expected torch.float32")
        same(harness.blend(x), wanted, f"attention in {dtype}", tolerance=0.05)
        for name, gradient in harness.gradients(x).items():
            if not gradient.isfinite().all():
                raise NonconformingError(f"the gradient of {name} in {dtype} is not finite")


@check("any kernel", "Eq. 2 is computed by whatever kernel is fastest; all of them must mean the same.")
def _kernels(variant: Factory) -> None:
    for how, harness in _harnesses(variant):
        q, k, v = (features(2, seed=seed) for seed in (2, 3, 4))
        k_bar, v_bar = harness.cp(k, v)
        one, other = (
            harness.cp.attend(q, k_bar, v_bar, attention(SITE.heads, core)) for core in (written_out, fused)
        )
        same(one, other, f"softmax(Q K^T / sqrt(d)) V against torch's fused attention{how}")


@check("compiles", "torch.compile turns tuning into one graph, unless the variant breaks it.")
def _compiles(variant: Factory) -> None:
    harness = Harness(variant).start().shake()
    sdpa = attention(SITE.heads, fused)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_bar, v_bar = harness.cp(k, v)
        return harness.cp.attend(q, k_bar, v_bar, sdpa)

    q, k, v = (features(2, seed=seed) for seed in (2, 3, 4))
    checking = config.jaxtyping_disable
    torch.compiler.reset()
    try:  # with the variant, and not the shape checks that tests may have put around it
        config.update("jaxtyping_disable", True)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v)
    finally:
        config.update("jaxtyping_disable", checking)
        torch.compiler.reset()
    same(compiled, attend(q, k, v), "compiled against not compiled")


@check("built from its own record", "run.json names the variant; an edit builds it from there.")
def _built(variant: Factory) -> None:
    cp = variant(SITE)
    record = json.loads(json.dumps(variant_config(cp)))
    again = variant_from_config(record)(SITE)
    if type(again) is not type(cp):
        raise NonconformingError(f"{record['class_path']} is another class")
    if (built := json.loads(json.dumps(variant_config(again)))) != record:
        raise NonconformingError(f"from {record['init_args']} it comes back as {built['init_args']}")


@check("every option documented", "`kvinv variants` and the help show what the docstring says.")
def _documented(variant: Factory) -> None:
    cls = type(variant(SITE))
    if not cls.__doc__:
        raise NonconformingError(f"{cls.__name__} has no docstring")
    if missing := [option.name for option in options(cls) if not option.text]:
        raise NonconformingError(f"the docstring's Args lack {', '.join(missing)}")


@check("grids that are not square", "A photograph is rarely square, and neither is its grid of tokens.")
def _grids(variant: Factory) -> None:
    for grid in GRIDS:
        site = replace(SITE, grid=grid)
        for how, harness in _harnesses(variant, site):
            if not harness.blend(features(2, site)).isfinite().all():
                raise NonconformingError(f"on a grid of {grid}{how} the result is not finite")


@check("reading frozen", "By default an edit reads K-bar and V-bar from disk, and neither psi nor Eq. 1.")
def _frozen(variant: Factory) -> None:
    for how, harness in _harnesses(variant):
        x = features(4)
        out, kv = harness.record(x[:2])
        editing = Harness(variant)
        if how:
            editing.mask()
        edited = editing.frozen(x, kv)
        same(edited[:2], out, f"an edit of the source itself{how}")
        if not edited.isfinite().all():
            raise NonconformingError(f"a second edit is not finite{how}")


@check("a mask comes off", "A mask belongs to one picture; the next one may have none.")
def _unmasked(variant: Factory) -> None:
    harness, x = Harness(variant).start().shake(), features(2)
    if harness.cp.takes_masks:
        out = harness.blend(x)
        harness.mask().cp.bind(None)
        same(harness.blend(x), out, "attention after bind(None)")
