"""What is read from a working model without changing a bit: hooks, and captures that use them."""
