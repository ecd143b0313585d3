"""The conformance kit: each of its checks fails for a variant that is broken in this one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import pytest
import torch
from commands import kvinv
from torch import Tensor, nn

from kvinv_pl.algorithm.method import Control, Inverted, Scene
from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.errors import UserError
from kvinv_pl.testing import (
    CHECKS,
    METHOD_CHECKS,
    NonconformingError,
    check_method,
    check_variant,
    method_trials,
    report,
    trials,
)

Sdpa = Callable[..., Tensor]


class Sound(CPAttention):
    """A learned V-hat for every token behind one gate; every broken variant is this one with one fault."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.v_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, site.dim))
        self.gate = nn.Parameter(torch.ones(site.slots, 1, 1))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        self.v_hat.zero_()
        self.gate.fill_(1)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat


class Loud(Sound):
    """Is not the model's own attention at its start."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, 1.1 * v + self.gate * self.v_hat


class Saddle(Sound):
    """V-hat and its gate both start at zero: neither has a gradient."""

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        self.v_hat.zero_()
        self.gate.zero_()


class Idle(Sound):
    """Has a parameter that it never reads."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.k_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, site.dim))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.k_hat.zero_()


class Dicey(Sound):
    """Starts at random, from everybody's generator."""

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        self.v_hat.normal_()
        self.gate.zero_()


class Gossip(Sound):
    """What one slot learns is taken from all of them."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * (self.v_hat - 0.5 * self.v_hat.mean(0))


class Mingling(Sound):
    """The branches of a forward leak into each other."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.leak = nn.Parameter(torch.zeros(site.slots, 1, 1))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.leak.zero_()

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat + self.leak * v.mean(0)


class Forgetful(Sound):
    """Keeps a part of psi where no run looks for it."""

    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.direction = torch.randn(self.site.tokens, self.site.dim, generator=generator)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat + (self.gate - 1) * self.direction


class Drawn(Sound):
    """Learns V-hat in a basis that is drawn, and kept in a buffer."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.v_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, 4))
        self.basis = nn.Buffer(torch.zeros(site.slots, 4, site.dim))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.basis.copy_(torch.randn(self.basis.shape, generator=generator))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * (self.v_hat @ self.basis)


class Constant(Sound):
    """Has a buffer that is no slot's, and is kept."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.weights = nn.Buffer(torch.linspace(0.5, 1, site.dim))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v + self.gate * self.v_hat * self.weights


class Single(Sound):
    """Multiplies K with a matrix in float32, whatever K is in."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.mix = nn.Parameter(torch.empty(site.slots, site.dim, site.dim))
        self.reset()

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        if hasattr(self, "mix"):
            self.mix.copy_(torch.eye(self.site.dim).expand_as(self.mix))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k @ self.mix, v + self.gate * self.v_hat


class Masking(Sound):
    """Pixels of the subject look at the subject alone."""

    mask: Tensor | None = None

    def bind(self, mask: Tensor | None) -> None:
        if mask is not None:
            mask = nn.functional.interpolate(mask[None], self.site.grid, mode="area")[0].flatten(1) >= 0.5
        self.mask = mask

    def looks(self, inside: Tensor) -> Tensor:
        return inside[:, None, :] | ~inside[:, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Sdpa) -> Tensor:
        return sdpa(q, k, v) if self.mask is None else sdpa(q, k, v, self.looks(self.mask))


class Blind(Masking):
    """Pixels outside the subject may look nowhere, and every kernel makes something else of it."""

    def looks(self, inside: Tensor) -> Tensor:
        return inside[:, None, :] & inside[:, :, None]


class Sticky(Masking):
    """Keeps the mask of the picture before."""

    def bind(self, mask: Tensor | None) -> None:
        if mask is not None:
            super().bind(mask)


class Peeking(Sound):
    """Decides by what it has learned, in Python."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(k, v) if float(self.gate.detach().max()) > 0 else (k, v)


class Mistyped(Sound):
    """Has an option whose default is not of its type.

    Args:
        site: The self-attention to upgrade.
        rank: How many.
    """

    def __init__(self, site: Site, rank: int = 0.5):  # pyright: ignore[reportArgumentType]
        super().__init__(site)


class Silent(Sound):
    """Has an option of which it says nothing.

    Args:
        site: The self-attention to upgrade.
    """

    def __init__(self, site: Site, rank: int = 4):
        super().__init__(site)


class Square(Sound):
    """Takes the root of the number of tokens for the side of the grid."""

    def __init__(self, site: Site):
        super().__init__(site)
        self.v_hat = nn.Parameter(torch.zeros(site.slots, int(site.tokens**0.5) ** 2, site.dim))


class Stashing(Sound):
    """Eq. 2 needs what Eq. 1 left behind."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.extra = self.gate * self.v_hat + torch.zeros_like(v)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Sdpa) -> Tensor:
        return sdpa(q, k, v) + sdpa(q, k, self.extra)


BROKEN: dict[str, type[CPAttention]] = {
    "identity at reset": Loud,
    "alive at reset": Saddle,
    "every parameter learns": Idle,
    "reset is deterministic": Dicey,
    "slots apart": Gossip,
    "any number of branches": Mingling,
    "saved and loaded exactly": Forgetful,
    "half precision": Single,
    "any kernel": Blind,
    "compiles": Peeking,
    "built from its own record": Mistyped,
    "every option documented": Silent,
    "grids that are not square": Square,
    "reading frozen": Stashing,
    "a mask comes off": Sticky,
}
ALSO = {"alive at reset": {"every parameter learns"}}  # what never gets away learns nothing


class Choosy(Sound):
    """Has options with few values; one of them breaks it, and one does not go with the defaults.

    Args:
        site: The self-attention to upgrade.
        start: Where V-hat begins.
        wide: Whether V-hat is wide.
    """

    def __init__(self, site: Site, start: Literal["zeros", "ones"] = "zeros", wide: bool = False):
        super().__init__(site)
        if wide and start == "zeros":
            raise UserError("wide: expected start ones")
        self.start = start

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        super().reset(generator)
        self.v_hat.fill_(float(self.start == "ones"))


class Excused(Saddle):
    """Says why it has no gradient at the start."""

    exempt: Mapping[str, str] = MappingProxyType(
        dict.fromkeys(("alive at reset", "every parameter learns"), "so")
    )


class Boastful(Sound):
    """Is declared exempt from what it does."""

    exempt: Mapping[str, str] = MappingProxyType({"slots apart": "it need not be"})


class Misnamed(Sound):
    """Is exempt from a check that there is not."""

    exempt: Mapping[str, str] = MappingProxyType({"slot apart": "it need not be"})


class Demanding(Sound):
    """Has an option without a default.

    Args:
        site: The self-attention to upgrade.
        rank: How many.
    """

    def __init__(self, site: Site, rank: int):
        super().__init__(site)


class Wrapping(CPAttention):
    """Is another variant.

    Args:
        site: The self-attention to upgrade.
        inner: The variant inside.
    """

    def __init__(self, site: Site, inner: Callable[[Site], CPAttention] = Sound):
        super().__init__(site)
        self.inner = inner(site)

    def reset(self, generator: torch.Generator | None = None) -> None:
        self.inner.reset(generator)

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(k, v)


class Bare(CPAttention):
    """Has nothing to learn."""

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


@cache
def failing(variant: type[CPAttention]) -> dict[str, str]:
    """The checks that a variant fails, and what each says."""
    return {trial.check.name: error for trial in trials(variant) if (error := trial.failure())}


def test_there_is_a_broken_variant_for_every_check() -> None:
    assert list(BROKEN) == [check.name for check in CHECKS]


@pytest.mark.parametrize("variant", [Sound, Masking, Bare, Wrapping, Excused, Drawn])
def test_a_sound_variant_fails_no_check(variant: type[CPAttention]) -> None:
    assert not failing(variant)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_fails_the_check_of_its_fault_and_no_other(name: str) -> None:
    assert failing(BROKEN[name]).keys() == {name} | ALSO.get(name, set())


def test_a_buffer_that_is_kept_has_its_slots_first() -> None:
    for name in ("alive at reset", "slots apart", "saved and loaded exactly"):
        assert (
            "weights has the shape (16,) for 3 slots: slots come first; a constant" in failing(Constant)[name]
        )


def test_every_check_says_in_a_sentence_why_it_is_asked() -> None:
    for check in CHECKS:
        assert check.why.endswith(".") and 30 < len(check.why) < 90


def test_a_failure_names_the_check_what_happened_and_why_it_matters() -> None:
    with pytest.raises(NonconformingError) as error:
        check_variant(Idle)
    assert "every parameter learns: k_hat has no gradient after the first step" in str(error.value)
    assert "A parameter without a gradient fills the disk" in str(error.value)


def test_a_choice_among_the_options_is_checked_by_itself_unless_it_is_refused() -> None:
    assert {trial.options for trial in trials(Choosy)} == {"", "start=ones"}
    lines, failed = report([trial for trial in trials(Choosy) if trial.check.name != "compiles"])
    assert failed == 1 and lines[0].startswith("FAILED  identity at reset: ")
    assert lines[1].startswith("        - with start=ones: attention after reset")


def test_options_that_are_given_are_the_only_ones_checked() -> None:
    assert {trial.options for trial in trials(Choosy, start="ones")} == {"start=ones"}
    assert {trial.options for trial in trials(partial(Choosy, start="ones"))} == {""}
    with pytest.raises(UserError, match="expected start ones"):
        trials(Choosy, wide=True)


def test_an_exemption_is_shown_with_its_reason() -> None:
    lines, failed = report([trial for trial in trials(Excused) if trial.check.name == "alive at reset"])
    assert not failed and lines[0].startswith("exempt  alive at reset: ") and lines[1] == "        - so"


def test_an_exemption_that_is_not_needed_or_not_known_is_refused() -> None:
    assert failing(Boastful)["slots apart"].startswith("it is declared exempt, and passes")
    with pytest.raises(UserError, match=r"no check 'slot apart'; expected one of .*slots apart"):
        trials(Misnamed)


@pytest.mark.parametrize("name", ["Sound", "Idle"])
def test_kvinv_check_tells_every_check_and_ends_with_1_for_a_variant_that_fails_one(name: str) -> None:
    answer = kvinv("check", f"{__file__}:{name}")
    assert answer.code == (name == "Idle") and not answer.err
    verdicts = [line.split()[0] for line in answer.out.splitlines() if not line.startswith(" ")]
    assert verdicts[:-1] == [
        "FAILED" if name == "Idle" and check.name == "every parameter learns" else "ok" for check in CHECKS
    ]
    assert answer.out.splitlines()[-1] == (
        "Idle fails 1 of 15 checks" if name == "Idle" else "Sound passes 15 checks"
    )


def test_kvinv_check_takes_options_as_yaml_names_them() -> None:
    answer = kvinv("check", "test_testing.Choosy", "--options", '{"start": "ones"}')
    assert answer.code == 1 and "FAILED  identity at reset" in answer.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "no attention variant 'nope'"),
        (["nope.Nope"], "nope cannot be imported (ModuleNotFoundError"),
        (["nope.py"], "nope.py is a file: name a class in it, nope.py:CLASS"),
        (["nope.py:Nope"], "there is no file nope.py"),
        (["test_testing.Site"], "test_testing has no variant 'Site'; expected one of Sound, "),
        (["test_testing.Demanding"], "Demanding cannot be made with its defaults (TypeError: missing"),
        (["full_kv", "--options", '{"stat": 1}'], "kvinv_plugins.full_kv.FullKV takes no argument 'stat'"),
        (["full_kv", "--options", '{"start": "ones"}'], "'ones'"),
    ],
)
def test_what_cannot_be_checked_is_one_line(args: list[str], message: str) -> None:
    answer = kvinv("check", *args)
    assert answer.code == 2 and answer.err.count("\n") == 1 and message in answer.err


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path: Any) -> None:
    (tmp_path / "checkpoints.py").write_text("")
    answer = kvinv("check", f"{tmp_path / 'checkpoints.py'}:Sound")
    assert answer.code == 2 and "has the name of another module" in answer.err


@dataclass(frozen=True)
class Reads:
    """The target reads the source's keys; every broken method is this one with one fault.

    Args:
        start: The share of the steps after which it does.
        guidance: Of the target.
    """

    start: float = 0.0
    guidance: float | None = 7.5
    empty_source = False
    properties = ("keeps equal prompts",)
    idle = {"start": 1.0}  # noqa: RUF012
    control_of: ClassVar[type[Control]]

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        control = self.control_of()
        control.attentions = scene.model.self_attentions
        setattr(control, "first", self.start * len(scene.table))  # noqa: B010
        return control


class Forgets(Reads):
    def control(self, scene: Scene, inverted: Inverted) -> Control:
        return None  # pyright: ignore[reportReturnType]


class SourceKeys(Control):
    first = 0.0

    def attend(self, i: int, at: Any) -> Tensor:
        return at.attend(at.q, at.k[:, :1].expand_as(at.k) if i >= self.first else at.k, at.v)


class Meddling(SourceKeys):
    """The source reads the target's keys."""

    def attend(self, i: int, at: Any) -> Tensor:
        return at.attend(at.q, at.k[:, 1:].expand_as(at.k) if i >= self.first else at.k, at.v)


class Rolling(SourceKeys):
    """Draws everybody's dice."""

    def after(self, i: int, z: Tensor) -> Tensor:
        return z + (0 if i < self.first else 0.1) * torch.rand(1)


class Early(SourceKeys):
    """Begins where it should not."""

    first = property(lambda self: 0.0, lambda self, value: None)  # pyright: ignore[reportAssignmentType]


class Shifting(SourceKeys):
    """Moves the target, whatever the prompts."""

    def after(self, i: int, z: Tensor) -> Tensor:
        return torch.cat([z[:1], z[1:] + 0.1]) if i >= self.first else z


class Infinite(SourceKeys):
    """Runs away."""

    def after(self, i: int, z: Tensor) -> Tensor:
        return z / 0 if i >= self.first else z


Reads.control_of = SourceKeys


class Leaves(Reads):
    """Leaves a hook in the network."""

    def control(self, scene: Scene, inverted: Inverted) -> Control:
        network: Any = scene.model
        network.unet.register_forward_hook(lambda module, args, out: None)
        return super().control(scene, inverted)


class Exact(Reads):
    """Says that it reconstructs."""

    properties = ("reconstructs",)


class Boasts(Reads):
    """Has a property that nobody knows."""

    properties = ("wins",)


def with_control(control: type[Control]) -> type[Reads]:
    return type(control.__name__, (Reads,), {"control_of": control, "__doc__": Reads.__doc__})


def documented(method: type[Reads]) -> type[Reads]:
    method.__doc__ = Reads.__doc__
    return method


@pytest.mark.parametrize(
    ("method", "failing"),
    [
        (Reads, set()),
        (with_control(Meddling), {"the source left alone"}),
        (with_control(Rolling), {"deterministic", "the source left alone"}),
        (with_control(Early), {"idle"}),
        (with_control(Shifting), {"what it states: keeps equal prompts"}),
        (documented(Leaves), {"the network as it was"}),
        (documented(Exact), {"what it states: reconstructs"}),
        (documented(Boasts), {"described"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_method_that_is_broken_in_one_way_fails_the_check_of_it(
    method: type[Reads], failing: set[str]
) -> None:
    asked = method_trials(method)
    if method.__name__ in ("Exact", "Boasts"):  # which differ from Reads in what they state alone
        asked = [trial for trial in asked if trial.check.name.startswith(("described", "what it states"))]
    assert {trial.check.name for trial in asked if trial.failure()} == failing


def test_a_method_is_checked_in_one_call() -> None:
    check_method(Reads, start=0.5)
    with pytest.raises(NonconformingError, match="any guidance and prediction: at guidance 1 of epsilon"):
        check_method(with_control(Infinite))
    with pytest.raises(NonconformingError, match="control returned NoneType, expected a Control"):
        check_method(documented(Forgets))
    with pytest.raises(UserError, match=r"Reads cannot be made with begin=1 \(TypeError"):
        method_trials(Reads, begin=1)
    assert len({check.name for check in METHOD_CHECKS}) == len(METHOD_CHECKS)


def test_the_command_checks_methods_by_name_and_by_class() -> None:
    answer = kvinv("check", "masactrl")
    assert answer.code == 0 and f"MasaCtrl passes {len(METHOD_CHECKS)} checks" in answer.out
    answer = kvinv("check", "test_testing.Boasts", "--options", '{"start": 0.5}')
    assert answer.code == 1 and "FAILED  described" in answer.out and "Boasts fails 1 of" in answer.out
    answer = kvinv("check", "masactrl", "--options", '{"begin": 1}')
    assert answer.code == 2 and "masactrl has no option 'begin'" in answer.err
