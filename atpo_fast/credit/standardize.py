"""Group means and standard deviations of weighted samples."""

from __future__ import annotations

import numpy as np

from atpo_fast.tree.forest import Floats, Ints, group_sum

EPSILON = 1e-6  # added to a standard deviation
WHITEN_EPSILON = 1e-8  # added to a variance over tokens


def group_mean_std(
    values: Floats,  # (S,)
    multiplicity: Floats,  # (S,) how often each value counts
    group: Ints,  # (S,) group number
    *,
    ddof: int,
) -> tuple[Floats, Floats, Floats]:
    """Compute mean, standard deviation and size of each entry's group: three arrays of (S,).

    `ddof` 0 is the population, 1 the sample standard deviation; it is 0 where the group has too few values. A group
    of equal values has exactly the standard deviation 0.
    """
    _, index = np.unique(group, return_inverse=True)
    size = group_sum(index, multiplicity)
    # deviations from one member of the group: equal values give exactly 0
    origin = np.zeros(len(size))
    origin[index] = values
    centred = values - origin[index]
    shift = group_sum(index, multiplicity * centred) / np.maximum(size, 1.0)
    squares = group_sum(index, multiplicity * (centred - shift[index]) ** 2)
    std = np.sqrt(squares / np.maximum(size - ddof, 1.0))
    return (origin + shift)[index], std[index], size[index]


def standardize(values: Floats, multiplicity: Floats, group: Ints) -> Floats:
    """Standardise (S,) `values` within groups, with the sample std; a group of one has mean 0 and std 1: (S,)."""
    mean, std, size = group_mean_std(values, multiplicity, group, ddof=1)
    alone = size <= 1
    return (values - np.where(alone, 0.0, mean)) / (np.where(alone, 1.0, std) + EPSILON)


def whiten(values: Floats, tokens: Floats) -> Floats:
    """Whiten (S,) `values`, each carried by its (S,) number of `tokens`, over tokens, by the sample variance: (S,)."""
    mean, std, _ = group_mean_std(values, tokens, np.zeros(len(values), dtype=np.int64), ddof=1)
    return (values - mean) / np.sqrt(std**2 + WHITEN_EPSILON)
