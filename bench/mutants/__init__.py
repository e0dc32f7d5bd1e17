"""Mutation check: which small faults in the loss, the credit, the packing and the reward the tests do not notice."""
