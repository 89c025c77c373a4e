"""Many runs: the cells of a grid, what they are made of, and who computes them."""
