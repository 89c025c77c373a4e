"""What is read from a working model without changing a bit of it: hooks, and what is captured with
them.
"""
