"""A recording being written, so that it survives anything. Nothing here imports torch."""
