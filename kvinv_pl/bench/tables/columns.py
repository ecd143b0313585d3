"""What every column of a bench says: one line each, for its page, its tables and docs/bench.md."""

from collections.abc import Mapping

MEANINGS: Mapping[str, str] = {
    "same animal %": (
        "edits that show the very same animal in the target action, of the drawn world, against what "
        "was drawn"
    ),
    "right action %": "edits whose pose is nearest to the target action as it is drawn",
    "named right %": "edits in which the classifier of the embedded model sees the target action",
    "second recall": (
        "how much of the animal's second colour is found, beyond chance: 1 is all, 0 as if it lay "
        "anywhere on the animal, below 0 less"
    ),
    "second precision": (
        "how much of what is found of the second colour is in its place, beyond chance: 1 is all, 0 "
        "as if it lay anywhere on the animal, below 0 less"
    ),
    "accent %": (
        "edits in which tail tip, ears or collar, whichever is the animal's accent, has its colour, "
        "and the two others do not"
    ),
    "body": "error of the body's colour, 0 to 1",
    "marks %": "edits with the right number of stripes or spots",
    "scene %": "edits that keep sun, hill, sky and ground",
    "frame dB": "PSNR of the whole edit against the true picture",
    "animal dB": "PSNR of the edit against the true picture where the animal should be",
    "background dB": "PSNR of the edit against the true picture where the animal neither is nor was",
    "reconstruction dB": (
        "PSNR of the source as the method samples it against the VAE's round trip, in 8 bits"
    ),
    "likeness to the source dB": "PSNR of the whole edit against the source, of `kvinv ablate`",
    "seconds": "of a case, all stages",
    "time x": (
        "the seconds over those of sampling one picture by the same model, timed anew for every row "
        "and size; other work on the machine shifts both, and may bring it below 1"
    ),
    "memory +MiB": "memory at its peak, less that of sampling one picture by the same model",
    "mask given %": (
        "edits whose method was given a mask, of the subject or of what may be edited; empty where none was"
    ),
    "PIE PSNR": (
        "PSNR of the unedited part against the source as PIE-Bench publishes it: both pictures are "
        "black where they may be edited, and the mean is over the whole frame"
    ),
    "PIE MSE x10^4": "squared error, instead of PSNR, of what PIE PSNR compares",
    "PIE SSIM x10^2": "structural similarity (SSIM), instead of PSNR, of what PIE PSNR compares",
    "unedited PSNR": "PSNR against the source over the unedited pixels alone",
    "unedited MSE x10^4": "squared error against the source over the unedited pixels alone",
    "unedited SSIM x10^2": "structural similarity (SSIM) to the source over the unedited pixels alone",
    "CLIP whole": "agreement of the picture with the target prompt by the CLIP of --clip",
    "CLIP edited": (
        "agreement of the part that may be edited, with black around it, with the target prompt by "
        "the CLIP of --clip"
    ),
    "PIE structure x10^3": (
        "distance to the source in structure by the DINO of --dino, of pictures in 0 to 255 as published"
    ),
    "structure x10^3": "distance to the source in structure by the DINO of --dino, of pictures in 0 to 1",
    "PIE LPIPS x10^3": (
        "LPIPS of the unedited part against the source by the SqueezeNet of --lpips, with black where"
        " it may be edited, over the whole frame, as published"
    ),
    "unedited LPIPS x10^3": (
        "LPIPS against the source by the SqueezeNet of --lpips, of the pictures as they are, over the"
        " unedited pixels alone"
    ),
}
"""By column, in the order of the docs."""
CAPPED = 100.0  # dB, of a PSNR of equal pictures
EXACT = "exact: nothing differs; it counts as 100 dB in means, intervals and differences, in CSV and JSON"


def is_psnr(column: str) -> bool:
    """Whether the column is a PSNR in dB, which is capped."""
    return column.endswith(("dB", "PSNR"))


def format_value(column: str, value: float, spec: str = ".2f") -> str:
    """A figure, or a mean of figures, of this column; "exact" for a PSNR at its cap."""
    return "exact" if is_psnr(column) and value >= CAPPED else format(value, spec)
