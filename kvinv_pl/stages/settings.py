"""The settings of the three stages, as validated frozen dataclasses.

`KVInversion`, from whose parameters they are made, documents them and has the defaults.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal, get_origin

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from kvinv_pl.algorithm.editing import Guidance, negative_at
from kvinv_pl.attention.config import variant_config
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.mixing import Mixing
from kvinv_pl.data.runs.records import optimizer_record
from kvinv_pl.data.runs.tensors import StoreDtype
from kvinv_pl.errors import UserError
from kvinv_pl.stages.curriculum import Curriculum, Pass
from kvinv_pl.stages.validation import (
    above_0,
    at_least_0,
    at_least_1,
    mean_squared_error,
    one_of,
    plain,
    require_kind,
    share,
)

Reading = Literal["frozen", "blend"]
KeyValues = Literal["stored", "replayed"]
Background = Literal["free", "kept"]


def options_of(setting: Field[Any]) -> tuple[str, ...]:
    """The parameters of KVInversion that a field comes from: the first of them that is given."""
    return setting.metadata.get("options", (setting.name,))


@dataclass(frozen=True)
class Settings:
    """The settings of one stage."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From the parameters of KVInversion, by their names."""
        values = dict[str, Any]()
        for setting in fields(cls):
            candidates = (options[name] for name in options_of(setting) if options[name] is not None)
            value = plain(next(candidates, None))
            is_whole = isinstance(value, int) and setting.type in (float, float | None)
            values[setting.name] = float(value) if is_whole else value
        return cls(**values)

    def __post_init__(self) -> None:
        """Refuse values of another kind, texts that are no choice, and what the field checks."""
        for setting in fields(self):
            name, value = options_of(setting)[0], getattr(self, setting.name)
            require_kind(name, value, setting.type)
            if get_origin(setting.type) is Literal:
                one_of(name, value, setting.type)
            if "check" in setting.metadata and value is not None:
                setting.metadata["check"](name, value)


@dataclass(frozen=True)
class InversionSettings(Settings):
    """The settings of stage 1."""

    guidance: float = field(metadata={"options": ("inversion_guidance",), "check": at_least_0})
    negative: str

    def record(self) -> dict[str, Any]:
        """The field "inversion" of run.json."""
        return {"guidance": self.guidance, "negative": negative_at(self.guidance, self.negative)}


@dataclass(frozen=True)
class TuningSettings(Settings):
    """The settings of stage 2."""

    guidance: float = field(
        metadata={"options": ("tuning_guidance", "source_guidance", "guidance"), "check": at_least_0}
    )
    negative: str
    curriculum: Curriculum
    inner_steps: int = field(metadata={"check": at_least_1})
    settle_steps: int = field(metadata={"check": at_least_1})
    tolerance: float = field(metadata={"check": mean_squared_error})
    tolerance_growth: float = field(metadata={"check": mean_squared_error})
    carry: bool
    kv: KeyValues
    seed: int
    store_dtype: StoreDtype
    required_psnr: float
    retries: int

    def __post_init__(self) -> None:
        """Refuse attempts that no picture could pass, or fewer than none."""
        super().__post_init__()
        if math.isnan(self.required_psnr) or self.retries < 0:
            raise UserError(
                "required_psnr and retries: expected dB and a number of 0 or more, got "
                f"{self.required_psnr} and {self.retries}"
            )

    def has_converged(
        self, mean_errors: Float[Tensor, " slots"], steps: Int[Tensor, " slots"]
    ) -> Bool[Tensor, " slots"]:
        """Algorithm 1's "until converged": which slots may stop, each at its step, counted from noise.

        Null-text inversion (Mokady et al., 2023) lets the tolerance grow with the step: errors late in the
        process have fewer steps left to grow in.
        """
        return mean_errors <= (self.tolerance + self.tolerance_growth * steps.double()).to(mean_errors)

    def passes(self, learns: bool) -> tuple[Pass, ...]:
        """The passes over the timesteps, in order; a variant that learns nothing has none at the pivots."""
        return ("pivots", "roll-out") if learns and self.curriculum == "pivot" else ("roll-out",)

    def steps_at_most(self, which: Pass) -> int:
        """Optimiser steps for one timestep at most, in this pass."""
        settles = which == "roll-out" and self.curriculum == "pivot"
        return self.settle_steps if settles else self.inner_steps

    def record(
        self, cps: Sequence[CPAttention], max_grid: int | None, optimizer: Optimizer | None
    ) -> dict[str, Any]:
        """The field "tuning" of run.json.

        Args:
            cps: The variant at every site.
            max_grid: The bound on the size of sites.
            optimizer: None for a variant that learns nothing.
        """
        return {
            "guidance": self.guidance,
            "negative": negative_at(self.guidance, self.negative),
            "attention": variant_config(cps[0]),
            "sites": [cp.site.path for cp in cps],
            "max_grid": max_grid,
            "kv": self.kv,
            "optimizer": optimizer_record(optimizer) if optimizer else None,
            "curriculum": self.curriculum,
            "inner_steps": self.inner_steps if optimizer else 0,
            "settle_steps": self.settle_steps if optimizer and self.curriculum == "pivot" else 0,
            "tolerance": [self.tolerance, self.tolerance_growth],
            "carry": self.carry,
            "seed": self.seed,
            "store_dtype": self.store_dtype,
        }


@dataclass(frozen=True)
class EditSettings(Settings):
    """The settings of stage 3; the records of edits are made of the fields.

    A "range" in its metadata is what a page has its slider run over.
    A field that was added after the first runs were made has the value at which it does nothing as
    metadata "idle", and is left out of every record at that value: edits made before stay the same edits.
    """

    guidance: float = field(metadata={"range": (0.0, 20.0), "check": at_least_0})
    reading: Reading
    kv: KeyValues
    start: float = field(metadata={"range": (0.0, 1.0), "check": share})
    negative: str
    subject: str | None
    source_guidance: float | None = field(metadata={"idle": None, "check": at_least_0})
    sharpness: float = field(metadata={"idle": 1.0, "range": (0.5, 3.0), "check": above_0})
    mixing: Mixing = field(metadata={"idle": "replace"})
    background: Background = field(metadata={"idle": "free"})
    ahead: float = field(metadata={"idle": 0.0, "range": (0.0, 1.0), "check": share})
    reading_guidance: float = field(metadata={"idle": 1.0, "range": (0.0, 4.0), "check": at_least_0})

    def __post_init__(self) -> None:
        """Refuse what reading blend would ignore."""
        super().__post_init__()
        for name, value, idle in (("sharpness", self.sharpness, 1), ("mixing", self.mixing, "replace")):
            if value != idle and self.reading != "frozen":
                raise UserError(f"{name}: expected {idle} with reading {self.reading}, got {value}")

    @property
    def guide(self) -> Guidance:
        """The branches of an edit and how they become one."""
        return Guidance(
            self.guidance,
            self.guidance if self.source_guidance is None else self.source_guidance,
            self.reading_guidance if self.reading == "frozen" else 1.0,
        )

    def for_run(self) -> dict[str, Any]:
        """The field "editing" of run.json, for the next edit of the run; kv is in "tuning"."""
        return {name: value for name, value in self._without_idle().items() if name != "kv"}

    def record(self) -> dict[str, Any]:
        """The settings that an edit depends on, for its record."""
        unused = ("kv", "ahead", "reading_guidance") if self.reading == "blend" else ()
        used = {name: value for name, value in self._without_idle().items() if name not in unused}
        return {name: value for name, value in used.items() if value is not None}

    def _without_idle(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value != IDLE.get(name, MISSING)}


IDLE = {
    setting.name: setting.metadata["idle"] for setting in fields(EditSettings) if "idle" in setting.metadata
}
"""The settings of an edit that were added later, and the value at which each does nothing."""


def defaults_for(checkpoint: str) -> dict[str, float]:
    """What is left out: as measured for the embedded model, or as usual with Stable Diffusion.

    Settings that it does not name do nothing where they are left out.
    """
    if checkpoint == "menagerie":
        return {"guidance": 3.0, "source_guidance": 1.0, "ahead": 0.7, "reading_guidance": 2.0}
    return {"guidance": 7.5}
