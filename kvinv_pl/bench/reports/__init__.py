"""What a bench leaves to look at: its page, its fronts, its rank correlations."""
