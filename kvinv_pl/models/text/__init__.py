"""Prompts: their syntax, and how the text model reads them."""
