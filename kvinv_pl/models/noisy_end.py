"""The noisiest timesteps, which few steps leave out where their spacing is leading."""

from kvinv_pl.algorithm.schedule import Schedule
from kvinv_pl.models.stable_diffusion import Backbone

WORTH_SAYING = 0.03
"""Of the timesteps; the usual 50 steps leave out 2%, and 20 steps 5%, which many edits miss."""


def left_out(backbone: Backbone, table: Schedule) -> str | None:
    """A line for the user, where steps begin well before the last timestep that has signal; or else None.

    The spacings are those of Lin et al. (arXiv 2305.08891, Table 2).
    """
    alphas = backbone.scheduler.alphas_cumprod
    signal = len(alphas) if backbone.predicts_v else int((alphas > 0).sum())
    first = int(table.timesteps[0])
    share = (signal - 1 - first) / len(alphas)
    if share <= WORTH_SAYING:
        return None
    # epsilon carries no information about the picture where there is no signal: there, trailing is refused
    other = ", or --model.timestep_spacing trailing" if signal == len(alphas) else ""
    return (
        f"--steps {len(table)} begins at timestep {first} of {signal - 1}, and the noisiest {share:.0%} of "
        f"the timesteps are left out: take more{other}"
    )
