"""Changing what happens inside a run: edits found in its plan, and made while it runs."""
