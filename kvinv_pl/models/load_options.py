"""What a checkpoint is loaded with, besides its own files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from typing_extensions import Self

from kvinv_pl.models.text.prompt_syntax import PromptSyntax

Prediction = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "linspace", "trailing"]
Precision = Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
"""Of the U-Net and the text model, in Lightning's words; auto: by checkpoint and device."""
LISTS = ("loras", "embeddings")


@dataclass(frozen=True)
class LoadOptions:
    """What is chosen with a checkpoint; `KVInversion` documents it."""

    variant: str | None = None
    vae: str | None = None
    prediction_type: Prediction | None = None
    timestep_spacing: Spacing | None = None
    clip_skip: int = 1
    prompt_syntax: PromptSyntax = "plain"
    loras: str | list[str] | None = None
    embeddings: str | list[str] | None = None
    allow_pickle: bool = False

    @classmethod
    def from_parameters(cls, given: Mapping[str, Any]) -> Self:
        """From the parameters of KVInversion, by their names."""
        return cls(**{name: given[name] for name in asdict(cls())})

    def record(self) -> dict[str, Any]:
        """What was chosen, for run.json; whether a pickle may be opened is asked for every time."""
        given = {
            **asdict(self),
            **{name: as_list(getattr(self, name)) or None for name in LISTS},
            "allow_pickle": False,
        }
        idle = asdict(LoadOptions())
        return {name: value for name, value in given.items() if value != idle[name]}


DEFAULTS = LoadOptions()


def as_list(given: str | list[str] | None) -> list[str]:
    """An option of one or several texts, as a list."""
    return [given] if isinstance(given, str) else list(given or ())
