"""Several devices: processes, what they share, and how they end."""
