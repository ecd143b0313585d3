"""The checks of methods to compare with, on a tiny network, each with the reason for it."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvinv_pl.algorithm.method import Control, Inverted, Scene, sample
from kvinv_pl.attention.registry import arguments_of
from kvinv_pl.testing.check import METHOD_CHECKS, NonconformingError, check, same
from kvinv_pl.testing.tiny import TinyModel, latents, table

__all__ = ["DESCRIBED", "METHOD_CHECKS"]
SOURCE, TARGET = "a cat standing", "a cat running"
DESCRIBED = "described"
PROPERTIES = ("reconstructs", "keeps equal prompts")
"""What a method may state of itself, and is then checked for."""
Make = Callable[[], Any]
listed = partial(check, among=METHOD_CHECKS)


def scene_for(method: Any, guidance: float = 5.0, predicts_v: bool = False, model: Any = None) -> Scene:
    """A picture and its prompts, with the source prompt that the method asks for."""
    source = "" if getattr(method, "empty_source", False) else SOURCE
    return Scene(model or TinyModel(), table(predicts_v), latents(), source, TARGET, guidance)


@torch.no_grad()
def rows(method: Any, scene: Scene) -> Float[Tensor, "2 c h w"]:
    """Source and target by an inversion without an edit, or by an edit after DDIM inversion."""
    inverted = method.invert(scene) if hasattr(method, "invert") else Inverted(scene, scene.pivots()[0])
    if not isinstance(inverted, Inverted):
        raise NonconformingError(f"invert returned {type(inverted).__name__}, expected an Inverted")
    control = method.control(scene, inverted) if hasattr(method, "control") else Control()
    if not isinstance(control, Control):
        raise NonconformingError(f"control returned {type(control).__name__}, expected a Control")
    return sample(scene, inverted, control)


def plain(scene: Scene) -> Float[Tensor, "2 c h w"]:
    """The same without a method."""
    return rows(object(), scene)


@listed(DESCRIBED, "`kvinv methods` shows the docstring, and a bench asks for the published guidance.")
def _described(make: Make) -> None:
    method = make()
    cls = type(method)
    texts = arguments_of(cls)
    options = [name for name in inspect.signature(cls).parameters if not texts.get(name)]
    if not cls.__doc__ or options:
        raise NonconformingError(f"the docstring's Args lack {', '.join(options) or 'everything'}")
    wanted = () if hasattr(method, "render") else ("guidance",)
    wanted += ("empty_source",) if hasattr(method, "control") else ()
    if missing := [name for name in wanted if not hasattr(method, name)]:
        raise NonconformingError(f"it has no {missing[0]}")
    if unknown := set(getattr(method, "properties", ())) - set(PROPERTIES):
        raise NonconformingError(f"properties: expected some of {', '.join(PROPERTIES)}, got {min(unknown)}")


@listed("any guidance and prediction", "It is compared on checkpoints of either kind, at any scale.")
def _any(make: Make) -> None:
    for guidance, predicts_v in ((1.0, False), (5.0, False), (5.0, True)):
        scene = scene_for(make(), guidance=guidance, predicts_v=predicts_v)
        found = rows(make(), scene)
        if found.shape != (2, *scene.z_0.shape[1:]) or not found.isfinite().all():
            how = f"at guidance {guidance:g} of {'v' if predicts_v else 'epsilon'}"
            raise NonconformingError(f"{how}: expected finite latents of source and target")


@listed("deterministic", "A bench that goes on where it was must give what it would have given.")
def _deterministic(make: Make) -> None:
    method, found = make(), list[Tensor]()
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(rows(method, scene_for(method)))
    if not torch.equal(*found):
        raise NonconformingError("the same picture twice, by one instance, comes out otherwise")


@listed("the network as it was", "The next method has the same network, after an error as well.")
def _restored(make: Make) -> None:
    counting = Failing()
    before = state(counting)
    rows(make(), scene_for(make(), model=counting))
    if state(counting) != before:
        raise NonconformingError("it leaves something behind in the network")
    failing = Failing(counting.calls)
    before = state(failing)
    with suppress(ZeroDivisionError):
        rows(make(), scene_for(make(), model=failing))
    if state(failing) != before:
        raise NonconformingError("after an error in the network it leaves something behind there")


class Failing(TinyModel):
    """A network that fails in its last call."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last, self.calls = last, 0

    def predict(self, z: Tensor, t: Tensor, contexts: Tensor) -> Tensor:
        """As ever, but for the last call."""
        self.calls += 1
        if self.calls == self.last:
            raise ZeroDivisionError
        return super().predict(z, t, contexts)


def state(model: TinyModel) -> list[Any]:
    """All that a method could leave in a network."""
    found: list[Any] = [(name, value.sum().item()) for name, value in model.unet.state_dict().items()]
    for path, module in model.unet.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((path, id(getattr(module, "processor", None)), hooks, module.training))
    found += [(name, value.requires_grad) for name, value in model.unet.named_parameters()]
    return found


@listed("the source left alone", "What an edit reads of the source is the source as its inversion has it.")
def _source(make: Make) -> None:
    method = make()
    if hasattr(method, "control"):
        scene = scene_for(method)
        same(rows(method, scene)[:1], plain(scene)[:1], "the source beside the edit against the source alone")


@listed("what it states: reconstructs", "A method is listed as exact where it says so.")
def _reconstructs(make: Make) -> None:
    method = make()
    if "reconstructs" in getattr(method, "properties", ()):
        for predicts_v in (False, True):
            scene = scene_for(method, guidance=7.5, predicts_v=predicts_v)
            same(rows(method, scene)[:1], scene.z_0, "the source at the end against the picture")


@listed("what it states: keeps equal prompts", "Where no word changes, nothing should.")
def _keeps(make: Make) -> None:
    method = make()
    if "keeps equal prompts" in getattr(method, "properties", ()):
        scene = scene_for(method)
        scene = Scene(scene.model, scene.table, scene.z_0, scene.source, scene.source, scene.guidance)
        source, target = rows(method, scene)
        same(target, source, "the target against the source with equal prompts")


@listed("idle", "With the options of `idle` it is plain sampling; with its own it is not.")
def _idle(make: Make) -> None:
    method = make()
    if idle := getattr(method, "idle", None):
        scene = scene_for(method)
        wanted = plain(scene)
        same(rows(type(method)(**idle), scene), wanted, f"with {idle} against plain sampling")
        if torch.allclose(rows(method, scene), wanted):
            raise NonconformingError("it makes no difference to plain sampling")
