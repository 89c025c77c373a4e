"""What a recording proves of itself: each check of `probe.verify`, from checksums to the model
asked again.
"""
