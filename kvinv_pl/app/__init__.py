"""Ways in besides the command line: a diffusers pipeline, a report, a page in the browser."""
