"""Measures what was delivered: the mean of a variable over each period of a promise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from federation.twin import Vector


def means(
    times_ns: Sequence[int], values: Sequence[float], start_ns: int, periods_ns: Sequence[int]
) -> Vector:
    """The time-weighted mean in each period of what holds from each instant until the next; what
    holds before the first is 0, and the last value holds on. Instants ascend."""
    edges = np.cumsum([start_ns, *periods_ns])
    if not times_ns:
        return np.zeros(len(periods_ns))
    at, value = np.array(times_ns, dtype=np.int64), np.array(values, dtype=np.float64)
    # whole nanoseconds are exact in float64 up to a hundred days; sums are from the first edge on
    points = np.unique(np.concatenate([at, edges]))
    points = points[(points >= edges[0]) & (points <= edges[-1])]
    held = np.searchsorted(at, points[:-1], side="right") - 1
    level = np.where(held >= 0, value[np.maximum(held, 0)], 0.0)
    which = np.searchsorted(edges, points[:-1], side="right") - 1
    spans = np.diff(points).astype(np.float64)
    total = np.bincount(which, level * spans, minlength=len(periods_ns))
    return np.asarray(total / np.diff(edges), dtype=np.float64)
