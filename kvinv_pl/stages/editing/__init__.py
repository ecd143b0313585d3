"""Stage 3: what an edit reads, its pictures, and the search of its settings."""
