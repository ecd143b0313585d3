"""What tuning costs, one table a command.

    python tools/bench_tuning.py front                # the frozen front: FLOPs, time, memory of an inner step
    python tools/bench_tuning.py overhead             # what Lightning adds to an inner step
    python tools/bench_tuning.py edit                 # an edit against plain DDIM sampling
    python tools/bench_tuning.py curves --cases 4     # reconstruction against FLOPs, with null-text inversion
    python tools/bench_tuning.py stores --cases 2     # bytes and reconstruction of each store dtype
    python tools/bench_tuning.py throughput           # two ranks against two single processes
    python tools/bench_tuning.py devices              # one picture's timesteps, on one device and on two
    python tools/bench_tuning.py profile              # where the seconds of a fit go, before and after

Alternatives run in turn in one process; times are medians with the distance between their quartiles, and
ratios are medians over the rounds. FLOPs are counted by torch.utils.flop_counter, for Stable Diffusion 1.5 on
tensors without memory. Seeds from 1,000,000 up are for reporting; settings are chosen on 900,000 to 999,999.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from kvinv_pl.errors import UserError


def front(
    geometry: str = "sd15-quarter", where: str = "decoder", branches: Literal[1, 2] = 2, rounds: int = 9
) -> None:
    """One inner step with and without the frozen front.

    Args:
        geometry: of the U-Net that is timed; the FLOPs of sd15 are counted besides
        where: the sites, in the words of target_modules
        branches: 2 with guidance
        rounds: how often each is timed
    """
    from tuning_costs import measuring
    from tuning_costs.models import GEOMETRIES, Tuning

    if geometry not in GEOMETRIES:
        raise UserError(f"geometry: expected {', '.join(GEOMETRIES)}, got {geometry}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counted = Tuning.of("sd15", where, branches, "meta", torch.bfloat16)
    held = (list(counted.unet.parameters()), counted.psi, counted.inputs)
    with counted.attachment.blend():
        plain = measuring.flops(counted.inner_step)
        with measuring.FusedAttention(), measuring.LiveMemory(*held) as plain_memory:
            counted.inner_step()
        with counted.cache.kept():
            counted.inner_step()
            kept = measuring.flops(counted.inner_step)
            counted.cache.forget()
            with measuring.FusedAttention(), measuring.LiveMemory(*held) as kept_memory:
                counted.inner_step()
                counted.inner_step()
    print(f"sd15 at 512 px, {where} sites, bf16, {branches} branches, one inner step, counted")
    print(f"  without the front {plain / 1e9:8.0f} GFLOP, peak {plain_memory.peak / 2**30:.2f} GiB")
    print(f"  with it           {kept / 1e9:8.0f} GFLOP, peak {kept_memory.peak / 2**30:.2f} GiB")
    print(f"  ratio             {kept / plain:8.3f}")
    timed = Tuning.of(geometry, where, branches, device, torch.float32)

    def with_front() -> None:
        with timed.cache.kept():
            timed.inner_step()

    with timed.attachment.blend():
        times = measuring.in_turn({"without": timed.inner_step, "with": with_front}, rounds)
    print(f"{geometry}, fp32, on {device}, {rounds} rounds")
    print(f"  without the front {times['without']}")
    print(f"  with it           {times['with']}")
    print(f"  ratio             {measuring.ratio(times['with'], times['without']):.3f}")


def overhead(inner_steps: int = 60, rounds: int = 5) -> None:
    """Milliseconds that an inner step takes in Lightning over the same loop in plain torch.

    Args:
        inner_steps: steps of each of two phases
        rounds: how often each is run
    """
    import statistics

    from tuning_costs.models import tiny_checkpoint
    from tuning_costs.runs import steps_with_and_without_lightning

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder) / "checkpoint")
        found = steps_with_and_without_lightning(checkpoint, Path(folder), inner_steps, rounds)
    added = [1e3 * (lightning - plain) for lightning, plain in found]
    print(f"a step in Lightning  {1e3 * statistics.median(pair[0] for pair in found):.2f} ms")
    print(f"a step in plain torch {1e3 * statistics.median(pair[1] for pair in found):.2f} ms")
    print(f"overhead {statistics.median(added):.2f} ms, of the rounds {min(added):.2f} to {max(added):.2f}")


def edit(
    checkpoint: str = "menagerie",
    geometry: str | None = None,
    steps: int = 50,
    targets: int = 4,
    rounds: int = 5,
) -> None:
    """An edit that reads K-bar and V-bar in every step, against plain DDIM sampling of as many pictures.

    Args:
        checkpoint: the model
        geometry: of a U-Net with random weights, in place of a checkpoint
        steps: DDIM steps
        targets: how many are rendered at once with kv replayed, up to 5
        rounds: how often each is run
    """
    from tuning_costs import measuring
    from tuning_costs.models import GEOMETRIES, checkpoint_of
    from tuning_costs.runs import edits

    if geometry is not None and geometry not in GEOMETRIES:
        raise UserError(f"geometry: expected {', '.join(GEOMETRIES)}, got {geometry}")
    if not 1 <= targets <= 5:
        raise UserError(f"targets: expected 1 to 5, got {targets}")
    with tempfile.TemporaryDirectory() as folder:
        size = None
        if geometry is not None:
            checkpoint = str(checkpoint_of(geometry, Path(folder) / "checkpoint"))
            size = 8 * GEOMETRIES[geometry]["sample_size"]
        prepared = edits(checkpoint, Path(folder), steps, size)
        ways: dict[Literal["stored", "replayed"], int] = {"stored": 1, "replayed": targets}
        for kv, count in ways.items():
            works = {f"kv {kv}": prepared(kv, count), "plain DDIM": prepared(None, count)}
            flops = {name: measuring.flops(work) / count for name, work in works.items()}
            seconds: dict[str, list[float]] = {name: [] for name in works}
            for _ in range(rounds):
                for name, work in works.items():
                    seconds[name].append(work())
            times = {name: measuring.Times(taken) for name, taken in seconds.items()}
            print(f"{count} at once; of one")
            for name in works:
                print(f"  {name:14s} {times[name]}, {flops[name] / 1e9:.1f} GFLOP")
            ours, plain = works
            ratio = measuring.ratio(times[ours], times[plain])
            print(f"  ratio          {ratio:.3f}, of FLOPs {flops[ours] / flops[plain]:.3f}")


def curves(
    cases: int = 4, seed_base: int = 900_000, guidance: float = 9.0, within: float = 0.5, steps: int = 50
) -> None:
    """Reconstruction against FLOPs, of tuning and of null-text inversion, on the embedded model.

    Args:
        cases: how many animals
        seed_base: seed of the first one
        guidance: w, of tuning and of null-text inversion
        within: dB below the VAE round trip that count as reached
        steps: DDIM steps
    """
    from tuning_costs.curves import NULL_TEXT, WAYS, cheapest, points

    found = points(range(seed_base, seed_base + cases), guidance, list(WAYS), NULL_TEXT, steps)
    print(f"{cases} animals from seed {seed_base}, {steps} steps, guidance {guidance:g}")
    print(f"{'':34s} GFLOP a picture, dB below the VAE round trip, dB to the VAE round trip")
    for point in sorted(found, key=lambda point: point.gflops):
        print(f"{point.way:34s} {point.gflops:10.0f} {point.below_ceiling:10.2f} {point.to_round_trip:10.1f}")
    theirs = [point for point in found if point.way.startswith("null-text")]
    best = cheapest([point for point in found if point not in theirs], within)
    # where null-text inversion never gets there, its full recipe counts
    other = cheapest(theirs, within) or max(theirs, key=lambda point: point.gflops)
    if best is None:
        print(f"no way of tuning comes within {within} dB")
    else:
        print(f"{best.way} over {other.way}: {best.gflops / other.gflops:.2f} of its FLOPs")


def stores(
    cases: int = 2,
    seed_base: int = 900_000,
    checkpoint: str = "menagerie",
    model: dict[str, Any] | None = None,
) -> None:
    """Bytes of a picture and reconstruction with each store dtype.

    Args:
        cases: how many animals
        seed_base: seed of the first one
        checkpoint: the model
        model: arguments of KVInversion, such as {"steps": 20}
    """
    from tuning_costs.runs import kept_as

    from kvinv_pl.data.tensors import DTYPES

    settings = {"checkpoint": checkpoint, **(model or {})}
    seeds = range(seed_base, seed_base + cases)
    with tempfile.TemporaryDirectory() as folder:
        found = {dtype: [kept_as(dtype, Path(folder), seed, settings) for seed in seeds] for dtype in DTYPES}
    print("store dtype     MiB a picture   dB to the VAE round trip   lost against float32 (standard error)")
    for dtype, rows in found.items():
        quality = sum(row[1] for row in rows) / cases
        lost = torch.tensor([whole[1] - row[1] for whole, row in zip(found["float32"], rows, strict=True)])
        error = float(lost.std()) / cases**0.5 if cases > 1 else 0.0
        size = sum(row[0] for row in rows) / cases / 2**20
        print(f"{dtype:14s} {size:12.1f} {quality:22.2f} {float(lost.mean()):24.2f} ({error:.2f})")


def throughput(pictures: int = 48, slots: int = 2, steps: int = 50, rounds: int = 3) -> None:
    """A folder of pictures tuned by two ranks, against two processes at once that have half of it each.

    Both are timed from the command to its end, with one core for each process.

    Args:
        pictures: in the folder
        slots: pictures tuned side by side in each process
        steps: DDIM steps
        rounds: how often each is run
    """
    from tuning_costs import measuring
    from tuning_costs.runs import two_processes

    with tempfile.TemporaryDirectory() as folder:
        works = two_processes(Path(folder), pictures, slots, steps)
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                seconds[name].append(work())
    times = {name: measuring.Times(taken) for name, taken in seconds.items()}
    for name in works:
        print(f"{name:24s} {times[name]}")
    ranks, single = works
    print(f"throughput {measuring.ratio(times[single], times[ranks]):.3f} of two processes'")


def devices(slots: int = 4, inner_steps: int = 30, steps: int = 50, rounds: int = 3) -> None:
    """One picture tuned with the curriculum pivot, whose timesteps fill one device or two, of one core each.

    Args:
        slots: timesteps side by side on each
        inner_steps: of each timestep at its pivot
        steps: DDIM steps
        rounds: how often each is run
    """
    from tuning_costs import measuring
    from tuning_costs.runs import one_picture

    with tempfile.TemporaryDirectory() as folder:
        works = one_picture(Path(folder), slots, inner_steps, steps)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                seconds[name].append(work())
    for n, what in enumerate(("from the command to its end", "the pass at the pivots")):
        times = {name: measuring.Times([taken[n] for taken in seconds[name]]) for name in works}
        two, one = times.values()
        print(what)
        for name, taken in times.items():
            print(f"  {name:12s} {taken}")
        print(f"  ratio        {measuring.ratio(two, one):.3f}")


def profile(checkpoint: str = "menagerie", seed: int = 900_000, steps: int = 50, rounds: int = 3) -> None:
    """Where the seconds of tuning one picture go, as first built and by default, without the inversion.

    As first built: ten steps of Adam at 1e-2 for each timestep, every forward computed as a whole.

    Args:
        checkpoint: the model
        seed: of the animal
        steps: DDIM steps
        rounds: how often each is run
    """
    import statistics

    from tuning_costs.parts import WAYS, seconds_of_parts

    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(seconds_of_parts(checkpoint, seed, way, Path(folder), steps))
    medians = {
        way: {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        for way, rows in found.items()
    }
    print(f"{'seconds (share)':46s}" + "".join(f"{way:>24s}" for way in medians))
    for part in next(iter(medians.values())):
        shares = [(row[part], row[part] / sum(row.values())) for row in medians.values()]
        print(f"{part:46s}" + "".join(f"{f'{spent:.2f} ({share:.0%})':>24s}" for spent, share in shares))
    print(f"{'in all':46s}" + "".join(f"{sum(row.values()):24.2f}" for row in medians.values()))


def main(args: list[str] | None = None) -> None:
    """Run one command; a user's mistake is one line and exit code 2."""
    given = sys.argv[1:] if args is None else args
    commands = {
        "front": front, "overhead": overhead, "edit": edit, "curves": curves, "stores": stores,
        "throughput": throughput, "devices": devices, "profile": profile,
    }  # fmt: skip
    try:
        auto_cli(commands, args=[_as_declared(arg) for arg in given], as_positional=False)
    except UserError as error:
        print(f"bench_tuning: {error}", file=sys.stderr)
        sys.exit(2)


def _as_declared(arg: str) -> str:
    """--seed-base as --seed_base."""
    name, equals, value = arg.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if arg.startswith("--") else arg


if __name__ == "__main__":
    main()
