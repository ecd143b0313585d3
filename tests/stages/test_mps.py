"""Apple's GPUs, of which there is none here: every operator of a run is one that torch has for them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE, TARGET
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from kvinv_pl.optimizers import GaussNewtonDescent
from kvinv_pl.training.datamodule import SourceImages

COMPOSITE = {
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
}


class Native:
    """What torch has each of its operators for, as its own list of them says."""

    def __init__(self) -> None:
        spec = find_spec("torchgen")
        assert spec is not None and spec.origin is not None
        listed = Path(spec.origin).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
        entries = re.split(r"^- func: ", listed.read_text(encoding="utf-8"), flags=re.M)[1:]
        self.entries = {entry.partition("(")[0]: entry for entry in entries}

    def keys(self, name: str) -> set[str]:
        """The dispatch keys of an operator's kernels; one that has none is made of others."""
        entry = self.entries[name]
        if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.M):
            return self.keys(delegate[1])
        _, found, kernels = entry.partition("\n  dispatch:\n")
        listed = re.findall(r"^    ([\w, ]+): ", kernels.partition("\n  autogen")[0], re.M)
        return (
            {key.strip() for keys in listed for key in keys.split(",")}
            if found
            else {"CompositeImplicitAutograd"}
        )

    def has_mps(self, name: str) -> bool:
        """Whether an operator runs on MPS: by its own kernel, or made of others that do."""
        keys = self.keys(name)
        if "MPS" in keys or not keys & COMPOSITE:
            return "MPS" in keys
        base, _, overload = name.partition(".")
        out = f"{base}.{overload}_out" if overload else f"{base}.out"  # into which some of them only allocate
        return out not in self.entries or bool(self.keys(out) & (COMPOSITE | {"MPS"}))


class Seen(TorchDispatchMode):
    """The operators that were called in this thread; that which writes has its tensors on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            overload = func._overloadname
            self.names.add(
                func._schema.name.removeprefix("aten::") + ("" if overload == "default" else f".{overload}")
            )
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


def test_an_operator_without_mps_is_known_by_the_list_of_torch(native: Native) -> None:
    assert native.has_mps("mul.Tensor") and native.has_mps("isfinite") and native.has_mps("view.dtype")
    assert not native.has_mps("frexp.Tensor") and not native.has_mps("linalg_eigvals")


@pytest.mark.parametrize(
    ("settings", "editing"),
    [
        (
            {"store_dtype": "int8", "target_modules": "all", "slots": 2},
            {"background": "kept", "mixing": "concat"},
        ),
        (
            {
                "curriculum": "pivot",
                "attention": LowRank,
                "store_dtype": "float16",
                "optimizer": GaussNewtonDescent,
            },
            {"kv": "replayed", "source_guidance": 1.5},
        ),
    ],
)
def test_every_operator_of_a_run_is_there_for_mps(
    settings: dict[str, Any], editing: dict[str, Any], native: Native, tmp_path: Path
) -> None:
    fits.pictures(tmp_path / "in", "01")
    module = fits.model(**settings)
    data = SourceImages(str(tmp_path / "in"), SOURCE, out=str(tmp_path / "out"))
    # on MPS, attention is never a kernel of the CPU's
    with Seen() as seen, sdpa_kernel(SDPBackend.MATH):
        fits.trainer().fit(module, datamodule=data)
        fits.edit(data.images[0].store, TARGET, module=module, **editing)
    assert {"native_group_norm", "convolution_backward", "bmm"} <= seen.names
    assert not [name for name in sorted(seen.names) if not native.has_mps(name)]


def test_psi_is_packed_by_operators_that_mps_has(native: Native) -> None:
    from kvinv_pl.data.runs.layout import serialize
    from kvinv_pl.data.runs.tensors import DTYPES, step_tensors

    bars = torch.randn(2, 4, 3)
    for dtype in DTYPES:
        with Seen() as seen:
            serialize(
                step_tensors({"up.k_hat": bars, "up.gamma": bars[:1, :1]}, bars, {"up": (bars, bars)}, dtype)
            )
        assert not [name for name in sorted(seen.names) if not native.has_mps(name)]
