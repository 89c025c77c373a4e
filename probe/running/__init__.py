"""A recorded run: what it will hold, the run itself, going on with one that was interrupted, asking
it afterwards.
"""
