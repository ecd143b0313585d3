"""How a body is built and held in each action: joints in units of one body length, y up from the ground."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Point = tuple[float, float]


@dataclass(frozen=True)
class Build:
    """The proportions of a species, in body lengths."""

    girth: float  # radius of the trunk
    leg: float  # height of the belly line's joints over the ground when standing
    leg_radius: float
    head: float  # radius
    muzzle: float  # how far the snout reaches beyond the head's centre
    muzzle_radius: float
    ear: tuple[Point, Point]  # base and tip, from the head's centre
    ear_radius: tuple[float, float]
    tail: float  # length
    tail_radius: tuple[float, float]


# fmt: off
BUILDS: Mapping[str, Build] = MappingProxyType(
    {
        "cat": Build(
            0.30, 0.52, 0.085, 0.27, 0.24, 0.11,
            ((-0.06, 0.14), (-0.12, 0.42)), (0.13, 0.02), 0.85, (0.07, 0.06),
        ),
        "dog": Build(
            0.33, 0.56, 0.105, 0.27, 0.44, 0.14,
            ((-0.16, 0.14), (-0.30, -0.22)), (0.09, 0.12), 0.50, (0.09, 0.05),
        ),
        "rabbit": Build(
            0.36, 0.44, 0.090, 0.26, 0.20, 0.12,
            ((-0.06, 0.18), (-0.20, 0.74)), (0.07, 0.09), 0.16, (0.15, 0.15),
        ),
        "fox": Build(
            0.26, 0.50, 0.075, 0.25, 0.48, 0.08,
            ((-0.08, 0.12), (-0.14, 0.48)), (0.17, 0.02), 0.90, (0.09, 0.20),
        ),
    }
)
# fmt: on


@dataclass(frozen=True)
class Pose:
    """Where the joints are. A leg is (knee, foot), in order: hind far, front far, hind near, front near."""

    hip: Point
    shoulder: Point
    bend: float
    head: Point  # from the shoulder
    nod: float  # the head's turn in radians, up is positive
    legs: tuple[tuple[Point, Point], tuple[Point, Point], tuple[Point, Point], tuple[Point, Point]]
    tail: tuple[
        float, float
    ]  # direction of the tail's first and second half, radians from straight back, up positive
    thigh: float  # radius of the hind leg's upper part, as a multiple of the leg's


def pose(action: str, build: Build) -> Pose:
    """The pose of a body of this build.

    Raises:
        KeyError: the world has no such action.
    """
    leg, girth = build.leg, build.girth
    # fmt: off
    poses = {
        "standing": Pose(
            hip=(-0.5, leg + 0.04), shoulder=(0.5, leg + 0.08), bend=0.02, head=(0.34, 0.40), nod=0.0,
            legs=(
                ((-0.34, leg / 2), (-0.30, 0.0)), ((0.36, leg / 2), (0.36, 0.0)),
                ((-0.58, leg / 2), (-0.56, 0.0)), ((0.56, leg / 2), (0.58, 0.0)),
            ),
            tail=(0.9, 1.5), thigh=1.3,
        ),
        "sitting": Pose(
            hip=(-0.34, girth), shoulder=(0.16, girth + 0.72), bend=0.06, head=(0.26, 0.44), nod=0.05,
            legs=(
                ((0.02, girth * 0.9), (0.18, 0.04)), ((0.34, leg * 0.6), (0.36, 0.02)),
                ((-0.06, girth * 0.9), (0.12, 0.0)), ((0.44, leg * 0.6), (0.50, 0.0)),
            ),
            tail=(-0.15, 0.35), thigh=2.0,
        ),
        "running": Pose(
            hip=(-0.54, leg + 0.16), shoulder=(0.50, leg + 0.24), bend=0.05, head=(0.38, 0.26), nod=-0.1,
            legs=(
                ((-0.50, leg * 0.72), (-0.80, 0.02)), ((0.56, leg * 0.62), (0.88, 0.06)),
                ((-0.78, leg * 0.86), (-1.14, 0.16)), ((0.82, leg * 0.92), (1.16, 0.40)),
            ),
            tail=(0.35, 0.15), thigh=1.3,
        ),
        "jumping": Pose(
            hip=(-0.40, leg + 0.34), shoulder=(0.40, leg + 0.80), bend=0.10, head=(0.34, 0.28), nod=0.3,
            legs=(
                ((-0.46, leg * 0.5 + 0.22), (-0.66, 0.20)), ((0.72, leg + 0.54), (0.54, leg + 0.28)),
                ((-0.62, leg * 0.5 + 0.26), (-0.84, 0.30)), ((0.86, leg + 0.66), (0.70, leg + 0.38)),
            ),
            tail=(-0.5, -0.9), thigh=1.3,
        ),
        "lying": Pose(
            hip=(-0.5, girth * 0.92), shoulder=(0.42, girth * 0.88), bend=0.03, head=(0.38, 0.16), nod=-0.15,
            legs=(
                ((-0.12, 0.10), (0.06, 0.08)), ((0.72, 0.12), (0.98, 0.08)),
                ((-0.26, 0.14), (-0.02, 0.06)), ((0.62, 0.10), (0.90, 0.05)),
            ),
            tail=(-0.25, 0.15), thigh=1.9,
        ),
    }
    # fmt: on
    return poses[action]


ACTIONS = ("standing", "sitting", "running", "jumping", "lying")
