"""Fit a law of cost to measured points: a + b N + c N^2 in the number of places N."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

LEAST_POINTS = 4  # three coefficients pass through any three points


def fit_law(
    places: Sequence[float], values: Sequence[float]
) -> tuple[tuple[float, float, float], float]:
    """Return a, b, c of a + b N + c N^2, none negative, and the largest relative error.

    Relative errors are squared and added, so that small values count as much as large ones. Raise
    ValueError for fewer than four different N, or a value that is not above zero.
    """
    n, y = np.asarray(places, float), np.asarray(values, float)
    if len(np.unique(n)) < LEAST_POINTS or not (y > 0).all():
        raise ValueError("a law needs four different numbers of places, and values above zero")
    terms = np.stack([np.ones_like(n), n, n**2], axis=1) / y[:, None]
    scale = np.abs(terms).max(axis=0)
    best, least = np.zeros(3), np.inf
    for count in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), count)):
            solution = np.linalg.lstsq(terms[:, chosen] / scale[chosen], np.ones_like(y))[0]
            error = float(((terms[:, chosen] / scale[chosen] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[chosen] = solution / scale[chosen]
    worst = float(np.abs(terms @ best - 1).max())
    return (float(best[0]), float(best[1]), float(best[2])), worst
