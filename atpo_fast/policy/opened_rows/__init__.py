"""Trees over the row budget: the order of passes over rows, and what an opened row leaves for those below it."""
