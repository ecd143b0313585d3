"""The disk: photographs in, run folders out."""
