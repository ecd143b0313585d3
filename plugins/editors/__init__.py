"""Edits to compare with: one file each, from its paper."""
