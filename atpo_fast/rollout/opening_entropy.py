"""The entropy of the first tokens of a turn, by which ARPO and AEPO branch (docs/design.md#entropy-branching)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

CANDIDATES = 10  # likeliest tokens whose log-probs are asked for (published)
_FIRST_TOKENS = 20  # tokens of a turn that count (published)


def opening_entropy(
    top_logprobs: Sequence[Sequence[float]],  # for each token, those of its candidates, the sampled token among them
    vocabulary: int,
) -> float:
    """Sum `-p ln p / ln(vocabulary)` over the candidates of a turn's first 20 tokens; 0 without any token.

    It is a sum over tokens, not a mean, and the probabilities are not normalised: as published (ARPO,
    arXiv:2507.19849).
    """
    logprobs = np.array([value for token in islice(top_logprobs, _FIRST_TOKENS) for value in token])
    return float(-(np.exp(logprobs) * logprobs).sum() / np.log(vocabulary))
