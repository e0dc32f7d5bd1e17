"""Trees over the row budget: the order of passes over rows, and the tensors that opened rows keep for those below."""
