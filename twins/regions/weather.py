"""Says how hot a heat wave is expected to be, for whoever has to plan for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from federation.twin import Entity, Parameter, Vector

HOTTEST_HOUR = 16.0
"""Local hour of the day at which the daily swing is highest (assumption: mid-afternoon)."""

OUTLOOK_PARAMETERS = (
    Parameter(
        "usual_max_c",
        "degC",
        33.2,
        30.0,
        36.0,
        "highest temperature of an ordinary day of the season",
        "NOAA normals 1991-2020, Memphis, July: 91.8 F (from memory, unverified)",
    ),
    Parameter(
        "usual_min_c",
        "degC",
        23.9,
        20.0,
        27.0,
        "lowest temperature of an ordinary day of the season",
        "NOAA normals 1991-2020, Memphis, July: 75.0 F (from memory, unverified)",
    ),
    Parameter(
        "forecast_peak_c",
        "degC",
        40.5,
        34.0,
        44.0,
        "highest temperature of the heat wave, as forecast at the start of the run",
        "assumption; the record of Memphis is 108 F = 42.2, July 1980 (from memory, unverified)",
    ),
    Parameter(
        "forecast_peak_h",
        "h",
        34.0,
        0.0,
        72.0,
        "middle of the heat wave after the start of the run, as forecast",
        "assumption: the second afternoon is the hottest",
    ),
    Parameter(
        "wave_width_h",
        "h",
        40.0,
        12.0,
        96.0,
        "standard deviation of the bell by which the heat wave comes and goes",
        "assumption: some four hot days",
    ),
    Parameter(
        "peak_error_sd_c",
        "degC",
        1.2,
        0.0,
        3.0,
        "deviation of the error of the forecast of the wave's peak",
        "assumption: forecasts of the highest temperature two to three days ahead err by 1-2 C",
    ),
    Parameter(
        "day_error_sd_c",
        "degC",
        0.7,
        0.0,
        2.0,
        "deviation of the error that each day has in addition",
        "assumption: forecasts one day ahead err by about 1 C",
    ),
)


@dataclass(frozen=True, slots=True)
class Outlook:
    r"""The temperature of a heat wave: a daily cosine, and a bell over the days.

    At t hours after a start at `start_hour` of the day:

    .. math::
        T(t) = \frac{T_{max} + T_{min}}{2}
             + \frac{T_{max} - T_{min}}{2} \cos \frac{2 \pi (start + t - 16)}{24}
             + (T_{peak} - T_{max}) \, e^{-(t - t_{peak})^2 / 2 w^2}

    so that T is `peak_c` when the middle of the bell falls on 16 h.
    """

    start_hour: float
    usual_max_c: float
    usual_min_c: float
    peak_c: float
    peak_h: float
    width_h: float
    peak_error_sd_c: float = 0.0
    day_error_sd_c: float = 0.0

    @classmethod
    def of(cls, parameters: Mapping[str, float]) -> Outlook:
        """The forecast at the start of the run, from `OUTLOOK_PARAMETERS` and `start_hour`."""
        return cls(
            parameters["start_hour"],
            parameters["usual_max_c"],
            parameters["usual_min_c"],
            parameters["forecast_peak_c"],
            parameters["forecast_peak_h"],
            parameters["wave_width_h"],
            parameters["peak_error_sd_c"],
            parameters["day_error_sd_c"],
        )

    def usual_c(self, hour: float) -> float:
        """The temperature of an ordinary day, `hour` hours after the start."""
        swing = math.cos(2.0 * math.pi * (self.start_hour + hour - HOTTEST_HOUR) / 24.0)
        return self.usual_mean_c + (self.usual_max_c - self.usual_mean_c) * swing

    @property
    def usual_mean_c(self) -> float:
        """The mean temperature of an ordinary day."""
        return (self.usual_max_c + self.usual_min_c) / 2

    def bell(self, hour: float) -> float:
        """How much of the heat wave is there, 0 to 1."""
        return math.exp(-0.5 * ((hour - self.peak_h) / self.width_h) ** 2)

    def temperature_c(self, hour: float, error_c: float = 0.0) -> float:
        """The temperature when the middle of the wave is `error_c` hotter than expected."""
        excess_c = self.peak_c - self.usual_max_c + error_c
        return self.usual_c(hour) + excess_c * self.bell(hour)

    def temperatures_c(self, hours: Vector) -> Vector:
        """`temperature_c` of many hours."""
        swing = np.cos(2.0 * np.pi * (self.start_hour + hours - HOTTEST_HOUR) / 24.0)
        usual_c = self.usual_mean_c + (self.usual_max_c - self.usual_mean_c) * swing
        bell = np.exp(-0.5 * ((hours - self.peak_h) / self.width_h) ** 2)
        return np.asarray(usual_c + (self.peak_c - self.usual_max_c) * bell)

    def deviation_c(self, hour: float, issued_h: float = 0.0) -> float:
        """The deviation of the error that a forecast issued at `issued_h` has for an hour.

        It falls in proportion to the time left to it (see `HeatWave.forecast_c`).
        """
        spread_c = math.hypot(self.peak_error_sd_c * self.bell(hour), self.day_error_sd_c)
        return spread_c * doubt(hour) * lead(hour, issued_h)


def lead(hour: float, issued_h: float) -> float:
    """The share of the time from the start to an hour that lay ahead when a forecast was issued."""
    return min(max((hour - issued_h) / max(hour, 1.0), 0.0), 1.0)


def doubt(lead_h: float) -> float:
    """The deviation of a forecast so many hours ahead, over that three days ahead.

    Its square grows in proportion to the time, from that of half a day (assumption; forecasts of
    the highest temperature one day ahead err about two thirds as much as three days ahead).
    """
    return math.sqrt(min(max(lead_h, 0.0) + 12.0, 72.0) / 72.0)


FORECAST_HOURS = 96
"""A forecast has a value for each of the first hours of a run."""


def forecast_entities() -> tuple[Entity, ...]:
    """The hours of a run as entities, so that a forecast is a vector."""
    return tuple(Entity(f"h{hour}", "hour") for hour in range(FORECAST_HOURS))
