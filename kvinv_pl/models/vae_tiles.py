"""A large picture through a VAE by tiles, as diffusers does it: as a whole, it would take gigabytes."""

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

WHOLE = 1024 * 1024
"""Pixels of a picture that is taken as a whole."""
TILE = 512
"""Pixels a side of a tile; a quarter of it overlaps the next one and is blended with it."""


def tile(vae: AutoencoderKL, height: int, width: int) -> bool:
    """Have a VAE take a picture of so many pixels by tiles, if it is larger than WHOLE; whether it does.

    Every tile is normalised by itself, so that colours may differ a little from those of the whole. Therefore
    the size alone decides, on every device alike, and what can be taken as a whole is.
    """
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 2 ** (len(vae.config["block_out_channels"]) - 1)
    if tiled := height * width > WHOLE:
        vae.enable_tiling()
    else:
        vae.disable_tiling()
    return tiled
