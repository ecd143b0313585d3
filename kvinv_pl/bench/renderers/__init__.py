"""Methods that are inversion and edit in one."""
