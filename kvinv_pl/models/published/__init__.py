"""Networks of published methods, by their own checkpoints."""
