"""How many forwards of the U-Net the stages of one picture are, before any is run."""

from dataclasses import dataclass

from kvinv_pl.algorithm.editing import branches_at
from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.stages.settings import EditSettings, InversionSettings, TuningSettings


@dataclass(frozen=True)
class Forwards:
    """Forwards of each stage of a picture, and the rows of each: one a branch."""

    inversion: int
    inversion_rows: int
    tuning: int
    """Where every timestep takes all of its inner steps."""
    tuning_least: int
    """Where every timestep has converged before its first."""
    inner_steps: int
    """Those of `tuning` that have a backward."""
    tuning_rows: int
    edit: int
    """For any number of targets."""
    edit_rows: int
    """For each target."""
    source_rows: int
    """Of the source beside its targets, with kv replayed."""


def count_forwards(
    steps: int,
    inverting: InversionSettings,
    tuning: TuningSettings,
    editing: EditSettings,
    variant: CPAttention,
) -> Forwards:
    """Count the forwards of a picture that is inverted, tuned once and edited."""
    learns = any(True for _ in variant.parameters())
    passes = tuning.passes(learns)
    inner = sum(steps * tuning.steps_at_most(which) for which in passes) if learns else 0
    ends = len(passes) * steps * (2 if variant.at_pivot else 1)
    starts = 0
    if variant.observes:  # where psi starts
        starts = 1 if passes == ("roll-out",) and tuning.carry else steps
    source_rows = branches_at(tuning.guidance)
    return Forwards(
        inversion=steps,
        inversion_rows=branches_at(inverting.guidance),
        tuning=inner + ends + starts,
        tuning_least=(len(passes) * steps if learns else 0) + ends + starts,
        inner_steps=inner,
        tuning_rows=source_rows,
        edit=steps,
        edit_rows=len(editing.guide.branches) + (editing.guide.reading_scale != 1),
        source_rows=source_rows if (editing.reading, editing.kv) == ("frozen", "replayed") else 0,
    )
