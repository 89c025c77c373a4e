"""Stable Diffusion run by hand: its parts, getting them safely, and the loop.

Knows nothing of hooks or files.
"""
