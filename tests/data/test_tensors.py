"""What comes back of psi, K-bar and V-bar once they have been stored."""

from __future__ import annotations

from pathlib import Path

import fits
import pytest
import torch
from torch import nn

from kvinv_pl import CPAttention, Site
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.runs.tensors import DTYPES, quantized, rounded


def values(seed: int, size: float = 1.0) -> torch.Tensor:
    """K-bar as it may be: channels of very unlike size, one of them nothing but zeros."""
    x = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(seed)) * size
    x *= torch.logspace(-6, 3, 12)
    x[..., 3] = 0
    return x


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_again_changes_nothing(dtype: str, seed: int):
    once = rounded(values(seed), dtype)
    assert torch.equal(once, rounded(once, dtype))
    assert once.dtype == torch.float32


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4])
def test_int8_misses_less_than_one_part_in_250_of_each_channels_largest_value(size: float):
    x = values(0, size)
    missed = (rounded(x, "int8") - x).abs()
    assert (missed <= x.abs().amax(-2, keepdim=True) / 250).all()


def test_int8_takes_a_byte_a_value_and_a_scale_a_channel():
    parts = quantized("k", values(0), "int8")
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "k": (torch.int8, (2, 64, 12)),
        "k#scale": (torch.float32, (2, 1, 12)),
    }
    assert int(parts["k"].abs().max()) == 127


@pytest.mark.parametrize("seed", range(5))
def test_int8_needs_no_frexp_and_its_scales_have_the_bits_that_it_would_give(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    """Apple's GPUs lack it; runs that were made with it go on."""
    x = values(seed)
    mantissa, exponent = torch.frexp(x.abs().amax(-2, keepdim=True) / 127)
    scale = torch.ldexp((mantissa * 2**16).ceil() / 2**16, exponent)

    def missing(*args: object) -> None:
        raise NotImplementedError("aten::frexp.Tensor is not implemented for the MPS device")

    monkeypatch.setattr(torch, "frexp", missing)
    assert torch.equal(quantized("k", x, "int8")["k#scale"], scale)


def test_a_scale_that_is_no_number_stays_none_whatever_its_bits():
    for bits in (0x7FC00000, 0x7FFFFFFF, 0x7F800000):  # NaN on a CPU and on a GPU, and infinity
        bad = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        x = torch.zeros(1, 4, 3)
        x[0, 2, 1] = bad[0]
        assert not quantized("k", x, "int8")["k#scale"][0, 0, 1].isfinite()


def test_slots_are_rounded_apart():
    x = values(0)
    both = rounded(x, "int8")
    x[1] *= 1e3
    assert torch.equal(both[0], rounded(x, "int8")[0])


class Seen(CPAttention):
    """V-hat, and beside it one number a head that is seen of the source, of no tokens."""

    observes = True

    def __init__(self, site: Site):
        super().__init__(site)
        self.v_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, site.dim))
        self.most = nn.Buffer(torch.zeros(site.slots, site.heads))

    def observe(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.most.copy_(v.unflatten(-1, (self.site.heads, -1)).abs().amax((1, 3)))

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k, v + self.v_hat


def test_what_has_no_tokens_is_rounded_apart_as_well(tmp_path: Path):
    fits.pictures(tmp_path / "in", "ab")
    asked = {"attention": Seen, "steps": 1, "inner_steps": 1, "store_dtype": "int8"}
    alone, beside = (fits.fit_all(tmp_path / "in", tmp_path / str(n), slots=n, **asked) for n in (1, 2))
    for name in "ab":
        one, other = (runs[name].step(0).psi for runs in (alone, beside))
        for key in (key for key in one if key.endswith("most")):
            torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=0)


def test_lambda_and_gamma_stay_as_they_are_beside_int8():
    x = torch.tensor([[0.123456789]])
    assert torch.equal(rounded(x, "int8"), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fit_advances_with_the_very_psi_that_it_stores(dtype: str, tmp_path: Path):
    module = fits.model(store_dtype=dtype)
    store = fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "run", module)
    step = store.step(2)
    for name, value in module.denoiser.values().items():
        assert torch.equal(step.psi[name].float(), value[0].detach())
    for pair in (step.kv or {}).values():
        for bar in pair:
            assert torch.equal(rounded(bar, dtype), bar)


def test_a_smaller_dtype_makes_smaller_files(tmp_path: Path):
    sizes = {}
    for dtype in DTYPES:
        kv = {"up.attn1": (values(0), values(1))}
        RunStore(tmp_path / dtype).save_step(0, {"up.k_hat": values(2)[0]}, values(3), kv, {}, dtype)
        sizes[dtype] = (tmp_path / dtype / "steps" / "0.safetensors").stat().st_size
    assert sizes["int8"] < sizes["float16"] < sizes["float32"]


def test_an_edit_reads_int8(tmp_path: Path):
    store = fits.fit(fits.picture(tmp_path / "cat.png"), tmp_path / "run", store_dtype="int8")
    edited = fits.edit(store, fits.SOURCE, start=0.0, store_dtype="int8")[0]
    assert fits.levels(edited, fits.opened(store.folder / "reconstruction.png")) <= 12
