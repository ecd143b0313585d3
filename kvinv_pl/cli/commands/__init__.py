"""A module for each command; a function's signature and docstring are its options and its help."""
