"""Attention variants of KV Inversion, one file each."""
