"""Stage 2: the phases of a pass, their slots, and what is kept."""
