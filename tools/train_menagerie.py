"""Train the embedded models: the autoencoder, the U-Net with its text encoder, the judge, SAM and CLIP.

Each stage is a command of its own, resumed by giving it again; the next one reads its results in `--work`:

    python tools/train_menagerie.py vae
    python tools/train_menagerie.py unet
    python tools/train_menagerie.py decoder
    python tools/train_menagerie.py judge
    python tools/train_menagerie.py sam
    python tools/train_menagerie.py clip
    python tools/train_menagerie.py export --to kvinv_pl/menagerie/weights
    python tools/report_menagerie.py
    python tools/train_menagerie.py instruct    # an InstructPix2Pix to compare with, begun with an export

The same commands use a GPU where there is one. `tensorboard --logdir work_menagerie/logs` shows the curves.
Training seeds are 0 to 899,999; reports use 1,000,000 and up.
"""

from pathlib import Path

from calling import call

from kvinv_pl.menagerie import SIZE

WORK = Path("work_menagerie")
WEIGHTS = Path(__file__).parents[1] / "kvinv_pl" / "menagerie" / "weights"


def vae(
    work: Path = WORK,
    count: int = 10_000,
    size: int = SIZE,
    channels: tuple[int, ...] = (16, 24, 64, 96),
    latent_channels: int = 12,
    steps: int = 1600,
    batch: int = 8,
    lr: float = 1e-3,
    kl: float = 1e-6,
    begin: Path | None = None,
) -> None:
    """Train the autoencoder and save its averaged weights under `work`/vae-trained.

    Args:
        work: where pictures, checkpoints, logs and results lie
        count: how many training pictures of one animal, and as many of one animal twice
        size: pixels a side
        channels: width at each level; the factor is 2 ** (levels - 1)
        latent_channels: channels of a latent
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
        kl: weight of the Kullback-Leibler term, per picture
        begin: folder of a checkpoint of half the size and one level less, whose autoencoder to begin with
    """
    from menagerie_training import autoencoder

    autoencoder.train(work, count, size, channels, latent_channels, steps, batch, lr, kl, begin)


def unet(
    work: Path = WORK,
    count: int = 10_000,
    size: int = SIZE,
    channels: tuple[int, ...] = (64, 128, 192),
    layers: int = 1,
    text_width: int = 96,
    steps: int = 3200,
    batch: int = 40,
    lr: float = 1e-3,
    begin: Path | None = None,
    processes: int = 1,
) -> None:
    """Train the U-Net together with its text encoder and save the averages under `work`/unet-trained.

    Args:
        work: where the earlier stage's results lie
        count: how many training pictures of one animal, and as many of one animal twice
        size: pixels a side
        channels: width at each level
        layers: residual layers a block
        text_width: width of the text encoder
        steps: training steps
        batch: pictures a step: a fifth of one animal twice, and of the others, pairs, both pictures
        lr: highest learning rate
        begin: folder of a checkpoint whose U-Net, text encoder and words to begin with
        processes: on a CPU, how many to train in, each of one thread and with a batch of its own
    """
    from menagerie_training import denoiser

    denoiser.train(work, count, size, channels, layers, text_width, steps, batch, lr, begin, processes)


def decoder(
    work: Path = WORK,
    count: int = 10_000,
    size: int = SIZE,
    steps: int = 330,
    batch: int = 16,
    lr: float = 3e-4,
) -> None:
    """Train the decoder of the autoencoder further, alone: the latents, and so the U-Net, stay as they are.

    Args:
        work: where the trained autoencoder lies
        count: how many training pictures of one animal, and as many of one animal twice
        size: pixels a side
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
    """
    from menagerie_training import autoencoder

    autoencoder.train_decoder(work, count, size, steps, batch, lr)


def judge(
    work: Path = WORK,
    count: int = 20_000,
    size: int = SIZE,
    steps: int = 1600,
    batch: int = 96,
    lr: float = 2e-3,
    cases: int = 1000,
) -> None:
    """Train the judge of pictures, save it under `work`/judge-trained and print its own accuracy.

    Args:
        work: where the trained autoencoder lies
        count: how many training pictures, each also through the autoencoder
        size: pixels a side
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
        cases: reporting seeds on which the accuracy is measured
    """
    from menagerie_training import judging

    judging.train(work, count, size, steps, batch, lr, cases)


def sam(
    work: Path = WORK,
    count: int = 60_000,
    size: int = SIZE // 2,
    width: int = 64,
    layers: int = 4,
    steps: int = 1100,
    batch: int = 32,
    lr: float = 1e-3,
    cases: int = 200,
) -> None:
    """Train the SAM that finds animals, save it under `work`/sam-trained and print its own IoU.

    Args:
        work: where pictures, checkpoints, logs and results lie
        count: how many training pictures
        size: pixels a side to which it brings a picture
        width: of the vision encoder and the mask decoder
        layers: of the vision encoder
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
        cases: reporting seeds on which the IoU is measured
    """
    from menagerie_training import segmenting

    segmenting.train(work, count, size, width, layers, steps, batch, lr, cases)


def clip(
    work: Path = WORK,
    count: int = 60_000,
    size: int = SIZE // 2,
    width: int = 96,
    layers: int = 4,
    steps: int = 2000,
    batch: int = 96,
    lr: float = 1e-3,
    cases: int = 200,
) -> None:
    """Train the CLIP of pictures and prompts, save it under `work`/clip-trained and print its own accuracy.

    Args:
        work: where pictures, checkpoints, logs and results lie
        count: how many training pictures
        size: pixels a side to which it brings a picture
        width: of both encoders, and of what they have in common
        layers: of the vision encoder; the text encoder has two
        steps: training steps
        batch: pictures a step
        lr: highest learning rate
        cases: reporting seeds on which the accuracy is measured
    """
    from menagerie_training import contrasting

    contrasting.train(work, count, size, width, layers, steps, batch, lr, cases)


def instruct(
    work: Path = WORK,
    count: int = 10_000,
    steps: int = 2000,
    batch: int = 40,
    lr: float = 5e-4,
    begin: Path = WEIGHTS,
) -> None:
    """Train an InstructPix2Pix on pairs; `work`/instruct-trained is a folder that `instruct_pix2pix` loads.

    Its U-Net begins as that of the checkpoint and sees a true picture beside the noise of another; it is told
    "make it" and what the other shows. Autoencoder and text encoder stay those of the checkpoint.

    Args:
        work: where pictures, checkpoints, logs and results lie
        count: how many pairs of an animal and its true picture in another action
        steps: training steps
        batch: pairs a step
        lr: highest learning rate
        begin: folder of a checkpoint, as the stage export writes it
    """
    from menagerie_training import instructing

    instructing.train(work, count, steps, batch, lr, begin)


def export(to: Path, work: Path = WORK) -> None:
    """Write what was trained as a Stable Diffusion folder that diffusers loads, with the judge, SAM and CLIP.

    Args:
        to: the folder; that of the package is kvinv_pl/menagerie/weights
        work: where the results of the stages lie
    """
    from menagerie_training import exporting

    exporting.export(work, to)


def main(args: list[str] | None = None) -> None:
    """Run one stage."""
    stages = [vae, unet, decoder, judge, sam, clip, instruct, export]
    call({stage.__name__: stage for stage in stages}, args)


if __name__ == "__main__":
    main()
