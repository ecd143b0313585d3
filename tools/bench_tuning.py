"""What tuning costs, one table a command.

    python tools/bench_tuning.py front                # the frozen front: FLOPs, time, memory of an inner step
    python tools/bench_tuning.py curves --cases 4     # reconstruction against FLOPs, with null-text inversion
    python tools/bench_tuning.py beside               # what a fit takes beside its networks

Alternatives run in turn in one process; times are medians with the distance between their quartiles, and
ratios are medians over the rounds. FLOPs are counted by torch.utils.flop_counter, for Stable Diffusion 1.5 on
tensors without memory. Seeds from 1,000,000 up are for reporting; settings are chosen on 900,000 to 999,999.
"""

from typing import Literal

import torch
from calling import call

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

    from kvinv_pl.models.costs import counting

    if geometry not in GEOMETRIES:
        raise UserError(f"geometry: expected {', '.join(GEOMETRIES)}, got {geometry}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counted = Tuning.of("sd15", where, branches, "meta", torch.bfloat16)
    held = (list(counted.unet.parameters()), counted.psi, counted.inputs)
    with counted.attachment.blend():
        plain = counting.flops(counted.inner_step)
        with counting.FusedAttention(), counting.LiveMemory(*held) as plain_memory:
            counted.inner_step()
        with counted.cache.reuse():
            counted.inner_step()
            kept = counting.flops(counted.inner_step)
            counted.cache.clear()
            with counting.FusedAttention(), counting.LiveMemory(*held) as kept_memory:
                counted.inner_step()
                counted.inner_step()
    print(f"sd15 at 512 px, {where} sites, bf16, {branches} branches, one inner step, counted")
    print(f"  without the front {plain / 1e9:8.0f} GFLOP, peak {plain_memory.peak / 2**30:.2f} GiB")
    print(f"  with it           {kept / 1e9:8.0f} GFLOP, peak {kept_memory.peak / 2**30:.2f} GiB")
    print(f"  ratio             {kept / plain:8.3f}")
    timed = Tuning.of(geometry, where, branches, device, torch.float32)

    def with_front() -> None:
        with timed.cache.reuse():
            timed.inner_step()

    with timed.attachment.blend():
        times = measuring.in_turn({"without": timed.inner_step, "with": with_front}, rounds)
    print(f"{geometry}, fp32, on {device}, {rounds} rounds")
    print(f"  without the front {times['without']}")
    print(f"  with it           {times['with']}")
    print(f"  ratio             {measuring.ratio(times['with'], times['without']):.3f}")


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


def beside(
    geometry: str = "sd15-half", pixels: int = 256, steps: int = 10, rounds: int = 1, threads: int = 1
) -> None:
    """The share of a fit, inversion included, that is outside U-Net, VAE and text model.

    Args:
        geometry: of the model, whose weights are random
        pixels: a side of the picture
        steps: DDIM steps, each with all of its inner steps
        rounds: how many fits are timed, after one that is not
        threads: of the CPU
    """
    from tuning_costs import models
    from tuning_costs.beside import BACKWARD, FORWARD, OTHERS, fits

    if geometry not in models.GEOMETRIES:
        raise UserError(f"geometry: expected {', '.join(models.GEOMETRIES)}, got {geometry}")
    torch.set_num_threads(threads)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    found = sorted(fits(geometry, pixels, steps, rounds, device), key=lambda fit: fit.share)
    middle = found[len(found) // 2]
    print(f"{geometry} at {pixels} px, {steps} steps, fp32, on {device}, {threads} threads, {rounds} fits")
    for part in (FORWARD, BACKWARD, OTHERS):
        print(f"  {part:20s} {middle.parts[part]:9.2f} s {middle.parts[part] / middle.whole:7.1%}")
    print(f"  {'all else':20s} {middle.rest:9.2f} s {middle.share:7.1%}")


COMMANDS = {"front": front, "curves": curves, "beside": beside}

if __name__ == "__main__":
    call(COMMANDS)
