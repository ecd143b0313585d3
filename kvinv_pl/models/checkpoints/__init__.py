"""Checkpoints on disk and on the hub: what there is, and its tensors."""
