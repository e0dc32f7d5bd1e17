"""Layers with a state (Gated DeltaNet, Mamba2, short convolutions) on packed rows (docs/design.md#recurrent-layers).

Trainer and `paged` engine run the same functions: a row is cut into segments, and each starts from the state in which
the tokens before it on its path have left the layer.
"""
