"""Keeps what is broken in a network, and the repair work that it has caused so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.twin import HOUR_NS, Vector
from twins.disaster import fragility
from twins.disaster.sites import NETWORKS
from twins.repair import MOST_CREWS

REPAIR_STREAM, STRENGTH_STREAM, DIVERGED_STREAM = 13, 15, 16


def strengths(seed: int, kind: str, rebuilt: int, size: int) -> Vector:
    """One uniform number per thing: the share of its like that are weaker.

    A thing keeps its strength from shock to shock, for what stood a strong shock does not
    fall in a weak one by a fresh draw; it has another once it has been repaired.
    """
    stream = [seed, STRENGTH_STREAM, (*NETWORKS, "hospital").index(kind), rebuilt]
    return np.random.default_rng(stream).random(size)


def narrowed(bounds: Vector, reached: Vector, state: NDArray[np.int64]) -> Vector:
    """The least and the greatest strength that fit, after a shock has left these states.

    `bounds` are two columns; `reached[i, s - 1]` is the chance of state s or worse.
    """
    size = np.arange(len(state))
    edges = np.hstack([np.ones((len(state), 1)), reached, np.zeros((len(state), 1))])
    low = np.maximum(bounds[:, 0], edges[size, state + 1])
    high = np.minimum(bounds[:, 1], edges[size, state])
    return np.stack([np.minimum(low, high), high], axis=1)


def whole_range(size: int) -> Vector:
    """Bounds of strengths of which nothing is known."""
    return np.stack([np.zeros(size), np.ones(size)], axis=1)


def within(bounds: Vector, uniform: Vector) -> Vector:
    """Strengths anew, somewhere in what is known of them."""
    return np.asarray(bounds[:, 0] + uniform * (bounds[:, 1] - bounds[:, 0]))


@dataclass(slots=True)
class Damage:
    """What is broken in one network, and the work that it takes (crew-hours)."""

    seed: int
    network: str
    strength: Vector
    rebuilt: NDArray[np.int64]
    """How often each component has been repaired."""
    patience: Vector
    """Quantile of the time that a repair takes at each component, for the whole run."""
    state: NDArray[np.int64]
    """0..4 as last published."""
    present_h: Vector
    """The work of the damage that is not yet repaired as a whole."""
    caused_h: Vector
    """All work caused since the run began."""
    added_h: Vector
    added_ns: NDArray[np.int64]
    """The last addition to `caused_h`, and when."""
    bounds: Vector
    """The least and the greatest strength that shocks and states so far allow."""

    @classmethod
    def none(cls, seed: int, network: str, size: int) -> Damage:
        whole = np.zeros(size, dtype=np.int64)
        zeros = np.zeros(size)
        return cls(
            seed,
            network,
            strengths(seed, network, 0, size),
            whole,
            np.random.default_rng([seed, REPAIR_STREAM, NETWORKS.index(network)]).random(size),
            whole.copy(),
            zeros,
            zeros.copy(),
            zeros.copy(),
            whole.copy(),
            whole_range(size),
        )

    def diverge(self, seed: int) -> None:
        """Draw what nobody knows anew: strengths within their bounds, times of repairs to come."""
        self.seed = seed
        size = len(self.strength)
        network = NETWORKS.index(self.network)
        draws = np.random.default_rng([seed, DIVERGED_STREAM, network])
        self.strength = within(self.bounds, draws.random(size))
        self.patience = np.random.default_rng([seed, REPAIR_STREAM, network]).random(size)

    def repaired(self, intact: Vector, now_ns: int) -> NDArray[np.bool_]:
        """The components that crews have made whole since they were damaged.

        `intact` may be older than the damage (couplings may delay it): it only counts
        when as many crews as can work at one place could have done the work.
        """
        possible_h = MOST_CREWS * (now_ns - self.added_ns) / HOUR_NS
        damaged = self.state >= fragility.OUT_OF_SERVICE
        return np.asarray(damaged & (intact >= 1.0) & (possible_h >= self.added_h))

    def rebuild(self, repaired: NDArray[np.bool_]) -> None:
        """Take note of repairs: no damage, and a strength of its own to what was rebuilt."""
        self.rebuilt = self.rebuilt + repaired
        self.state = np.where(repaired, 0, self.state)
        self.present_h = np.where(repaired, 0.0, self.present_h)
        self.strength = self.strength.copy()
        self.bounds = np.where(repaired[:, None], whole_range(len(repaired)), self.bounds)
        for i in np.flatnonzero(repaired).tolist():
            fresh = strengths(self.seed, self.network, int(self.rebuilt[i]), len(repaired))
            self.strength[i] = fresh[i]

    def strike(
        self, state: NDArray[np.int64], work_h: Vector, now_ns: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Take the damage of one shock; the components made worse, and those with more work.

        A whole component takes all of it, a damaged one what is worse than it had.
        """
        worse = state > self.state
        more_h = np.where(worse, np.maximum(work_h - self.present_h, 0.0), 0.0)
        self.state = np.where(worse, state, self.state)
        self.present_h = self.present_h + more_h
        self.caused_h = self.caused_h + more_h
        self.added_h = np.where(more_h > 0.0, more_h, self.added_h)
        self.added_ns = np.where(more_h > 0.0, now_ns, self.added_ns)
        return np.flatnonzero(worse), np.flatnonzero(more_h > 0.0)
