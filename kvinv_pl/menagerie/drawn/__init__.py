"""How animals are drawn."""
