"""Frozen networks: Stable Diffusion, SAM, and the denoiser that psi is attached to."""
