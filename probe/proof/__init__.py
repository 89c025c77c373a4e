"""What a recording proves of itself: the checks of `probe.verify`.

They go from checksums to asking the model again.
"""
