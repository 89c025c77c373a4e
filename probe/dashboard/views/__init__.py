"""One view a file: select, slice, figure, show."""
