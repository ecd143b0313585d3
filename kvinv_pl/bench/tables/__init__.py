"""What a bench found, as tables."""
