"""The losses of a tuning, timestep by timestep, as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 56, 34, 12
COLOURS = {"loss_start": "#c2410c", "loss_end": "#1d4ed8"}
LEAST = 1e-12  # a loss of zero has a place on a scale of powers, too


def loss_curves(phases: Sequence[Mapping[str, Any]], timesteps: Sequence[int]) -> str:
    """Loss at the start and the end of every timestep, from noise on, over a scale of powers of ten."""
    values = [max(LEAST, phase[name]) for phase in phases for name in COLOURS]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - 8) * (i / max(1, len(phases) - 1))

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(max(LEAST, value))) / (high - low)

    marks = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">1e{power}</text>'
        for power in range(low, high + 1, max(1, (high - low) // 4))
    )
    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
        + " ".join(f"{x(i):.1f},{y(phase[name]):.1f}" for i, phase in enumerate(phases))
        + '"/>'
        for name, colour in COLOURS.items()
    )
    legend = "".join(
        f'<text x="{WIDTH - 8}" y="{TOP + 14 + 16 * n}" text-anchor="end" style="fill:{colour}">{text}</text>'
        for n, (colour, text) in enumerate(zip(COLOURS.values(), ("before", "after"), strict=True))
    )
    ends = (
        f'<text x="{LEFT}" y="{HEIGHT - 8}">timestep {timesteps[0]}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{timesteps[len(phases) - 1]}</text>'
    )
    label = f"Loss before and after the inner steps of each of {len(phases)} timesteps"
    return (
        f'<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{marks}{lines}{legend}{ends}</svg>"
    )
