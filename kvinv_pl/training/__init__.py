"""Lightning: the module, the trainer, and the ranks of a machine."""
