"""The frozen front of the network: what a forward computes before psi is computed once and then reused.

While psi_t is tuned, z-tilde_t, t and the prompts stay constant, and so does everything that the U-Net
computes before the first upgraded layer. Nothing here knows how a U-Net is built: the order in which its
modules finish is seen in the first forward, and the largest of those that finish before psi is met are not
run again. What lies between modules (joining feature maps, reshaping) runs every time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

Forward = Callable[..., Any]
_Stamp = list[tuple[Tensor, int]]
"""Tensors, and how often each had been changed in place."""


class FeatureCache:
    """The outputs of a network's modules that finish before one of `late` is first called.

    Args:
        network: The network, frozen and deterministic; outside `reuse` it is unchanged.
        late: Modules whose parameters change between forwards.
    """

    def __init__(self, network: nn.Module, late: Iterable[nn.Module]) -> None:
        self._network, self._late = network, list(late)
        self._inputs: tuple[Any, ...] | None = None
        self._stamp: _Stamp = []
        self._kept: dict[nn.Module, list[_Call]] = {}

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that are not run again."""
        return [module for module, calls in self._kept.items() if any(call.whole for call in calls)]

    def clear(self) -> None:
        """Clear the cache; the next forward fills it."""
        self._inputs, self._stamp, self._kept = None, [], {}

    @contextmanager
    def reuse(self, *made_of: Tensor) -> Iterator[None]:
        """Share the front between the forwards in this context; no gradient reaches it.

        A forward on other inputs than the last fills the cache anew. To compare them bit for bit waits for
        the device: where all inputs follow from the tensors of `made_of`, it is enough that these are the
        very same ones as at the last forward, and unchanged.
        """
        now = [(tensor, tensor._version) for tensor in made_of]
        with _replaced_forwards({self._network: partial(self._cached_forward, self._network.forward, now)}):
            yield

    def _cached_forward(self, forward: Forward, now: _Stamp, *args: Any, **kwargs: Any) -> Any:
        """The network's own forward, with its front recorded or reused."""
        pairs = zip(now, self._stamp, strict=False)
        same = all(a is b and version == other for (a, version), (b, other) in pairs)
        known = bool(now) and len(now) == len(self._stamp) and same
        if self._inputs is not None and (known or _same(self._inputs, (args, kwargs))):
            replays = {
                module: partial(_reuse, iter(calls), module.forward) for module, calls in self._kept.items()
            }
            with _replaced_forwards(replays):
                return forward(*args, **kwargs)
        self.clear()
        self._stamp = now
        inputs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
        watch = _Recorder()
        watched = {
            module: partial(watch.call, module, module.forward)
            for module in self._network.modules()
            if module is not self._network
        }
        met = {module: partial(watch.reach_late, module.forward) for module in self._late}
        with _replaced_forwards({**watched, **met}):
            output = forward(*args, **kwargs)
        for call in watch.front:
            call.inspect()
            self._kept.setdefault(call.module, []).append(call)
        self._inputs = inputs
        return output


class _Call:
    """One call of a module that is watched."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inside: list[_Call] = []
        """Finished calls made by this one, until it is finished itself."""
        self.whole = False
        """Whether the output can be reused."""

    def finish(self, output: Any) -> None:
        """Keep what the module returned; calls inside no longer matter."""
        self.inside = []
        self.output = tree_map_only(Tensor, Tensor.detach, output)
        self.versions = _versions(self.output)

    def inspect(self) -> None:
        """After the forward: an output that was changed in place is not what the module returned."""
        self.whole = self.versions is not None and self.versions == _versions(self.output)
        if not self.whole:
            self.output = None


class _Recorder:
    """The calls of one forward, until a late module is met."""

    def __init__(self) -> None:
        self.front: list[_Call] = []
        """What had finished when a late module was met, and was part of nothing that had; in order."""
        self._outside: list[_Call] = []
        self._open: list[_Call] = []
        self._reached_late = False

    def call(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Called in place of a module's forward."""
        if self._reached_late:
            return forward(*args, **kwargs)
        call = _Call(module)
        self._open.append(call)
        output = forward(*args, **kwargs)
        if not self._reached_late:
            self._open.pop()
            call.finish(output)
            (self._open[-1].inside if self._open else self._outside).append(call)
        return output

    def reach_late(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Called in place of a late module's forward: from here on, everything may change."""
        if not self._reached_late:
            self._reached_late = True
            self.front = [*self._outside, *(call for around in self._open for call in around.inside)]
        return forward(*args, **kwargs)


def _reuse(calls: Iterator[_Call], forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """The recorded output of this call, or the module's own forward where there is none."""
    call = next(calls, None)
    if call is None or not call.whole:
        return forward(*args, **kwargs)
    return tree_map_only(Tensor, Tensor.detach, call.output)  # containers of its own for every forward


@contextmanager
def _replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Replace the forwards of some modules, and restore them afterwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, original in before.items():
            if original is not None:  # an instance's own forward, as other libraries put there
                module.forward = original
            elif "forward" in vars(module):
                del module.forward


def _versions(output: Any) -> list[int] | None:
    """How often each tensor has been changed in place; None if there is more than tensors in it."""
    leaves = tree_leaves(output)
    if not all(isinstance(leaf, Tensor | bool | int | float | str | None) for leaf in leaves):
        return None
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _same(before: Any, now: Any) -> bool:
    """Whether the inputs of two forwards are equal, bit for bit."""
    (leaves, spec), (others, other_spec) = tree_flatten(before), tree_flatten(now)
    return spec == other_spec and all(map(_equal, leaves, others))


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b))
    if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
        return False
    return a.is_meta or torch.equal(a, b)  # there are no values on meta
