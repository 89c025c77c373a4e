"""One run: planning it, recording it, going on with it, and asking it afterwards."""
