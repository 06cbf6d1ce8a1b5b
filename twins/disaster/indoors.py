"""Says how hot homes get without air conditioning, and how much more that hurts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from federation.twin import Vector

SLICES = 20
"""The homes of a load point in so many equal parts, of which each has its own temperature."""


def dark_share(kept_out: Vector, rotated: Vector, offset: Vector) -> Vector:
    """The share of the time that each slice is without power; load points x `SLICES`.

    Of the homes of a load point the first `kept_out` (a share) are without power all the time;
    of the others a window of `rotated` is, which begins at `offset` and goes round.
    """
    edge = np.arange(SLICES + 1) / SLICES
    first, window = kept_out[:, None], rotated[:, None]
    left = 1.0 - first
    begin = first + np.mod(offset[:, None], np.maximum(left, 1e-12))
    end = begin + window

    def below(x: Vector) -> Vector:
        """How much of the dark lies below a place x."""
        first_part = np.minimum(x, first)
        straight = np.clip(np.minimum(x, 1.0) - begin, 0.0, np.minimum(end, 1.0) - begin)
        wrapped = np.clip(x - first, 0.0, np.maximum(end - 1.0, 0.0))
        return np.asarray(first_part + straight + wrapped)

    share = np.diff(below(np.broadcast_to(edge, (kept_out.size, edge.size))), axis=1) * SLICES
    return np.asarray(np.clip(share, 0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Homes:
    r"""How homes warm up and cool down, and the risk of those in them.

    The temperature of a home without power tends to what is outside plus `gain_c` with the
    time constant `warm_h`, that of a cooled home to `comfort_c` with `cool_h`. The risk of
    whoever usually has air conditioning is, relative to that with it,

    .. math::
        M = 1 + (OR - 1) \frac{\max(T - T_{safe}, 0)}{T_{full} - T_{safe}}

    so that at `full_c` it is that of people without air conditioning, OR times as much, and
    goes on with the same slope above.
    """

    gain_c: float
    warm_h: float
    cool_h: float
    comfort_c: float
    safe_c: float
    full_c: float
    odds: float

    @classmethod
    def of(cls, p: Mapping[str, float]) -> Homes:
        return cls(
            p["indoor_gain_c"],
            p["indoor_warm_h"],
            p["indoor_cool_h"],
            p["indoor_comfort_c"],
            p["indoor_safe_c"],
            p["indoor_full_c"],
            p["no_cooling_odds"],
        )

    def after(self, indoor_c: Vector, dark: Vector, outdoor_c: float, span_h: float) -> Vector:
        """Temperatures after a span in which `dark` is the share of time without power. Exact."""
        warm, cool = dark / self.warm_h, (1.0 - dark) / self.cool_h
        rate = warm + cool
        outside_c = max(outdoor_c + self.gain_c, self.comfort_c)
        goal = (warm * outside_c + cool * self.comfort_c) / rate
        return np.asarray(goal + (indoor_c - goal) * np.exp(-rate * span_h))

    def risk(self, indoor_c: Vector | float) -> Vector:
        """M, from 1."""
        above = np.maximum(np.asarray(indoor_c) - self.safe_c, 0.0) / (self.full_c - self.safe_c)
        return np.asarray(1.0 + (self.odds - 1.0) * above)


@dataclass(frozen=True, slots=True)
class Exposure:
    r"""Excess deaths of a population in the heat, and the cases that go with them.

    A day of mean temperature T_24 has so many times the usual deaths in excess:

    .. math:: E = s \max(T_{24} - T_{95}, 0)

    (Anderson and Bell, Environ Health Perspect 119 (2011) 210: 2.49 % per degree Fahrenheit of
    a heat wave's intensity). That is the mean of a population of which `cooled` have air
    conditioning and the others OR times their risk.
    """

    slope_per_c: float
    threshold_c: float
    deaths_per_person_h: float
    cooled: float
    odds: float

    @classmethod
    def of(cls, p: Mapping[str, float]) -> Exposure:
        return cls(
            p["mortality_per_c"],
            p["mortality_threshold_c"],
            p["deaths_per_100k_year"] / 1e5 / 8766.0,
            p["cooled_share"],
            p["no_cooling_odds"],
        )

    def deaths_per_cooled_h(self, mean_24h_c: float) -> float:
        """Excess deaths per hour and person whose air conditioning works."""
        excess = self.slope_per_c * max(mean_24h_c - self.threshold_c, 0.0)
        mixed = self.cooled + (1.0 - self.cooled) * self.odds
        return self.deaths_per_person_h * excess / mixed

    def deaths_per_person(self, mean_24h_c: float, risk: Vector) -> Vector:
        """Excess deaths per hour and person, at the risk of those who usually have cooling."""
        mixed = self.cooled * risk + (1.0 - self.cooled) * self.odds
        return np.asarray(self.deaths_per_cooled_h(mean_24h_c) * mixed)
