"""What a model takes: memory, operations, and time."""
