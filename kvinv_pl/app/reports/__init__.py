"""A run as one page, and how to do it again."""
