"""A recording being written, so that it survives anything. Without torch."""
