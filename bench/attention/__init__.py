"""Bench of attention over a row that holds a tree."""
