"""Bench of a decoder layer and of the whole update, trees against flat rows."""
