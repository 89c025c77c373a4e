"""The recording's contract: variables, dimensions and attributes. Without torch."""
