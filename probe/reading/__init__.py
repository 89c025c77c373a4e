"""A recording being read: guarded, lazily, labelled, and never with torch."""
