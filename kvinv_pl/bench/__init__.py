"""Methods to compare with, and how a picture goes through them."""
