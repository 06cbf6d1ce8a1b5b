"""Lists what a scenario may set of the windstorm, with the source of each default."""

from __future__ import annotations

from federation.twin import Parameter

DERECHO_2003 = (
    "McNeil et al., National Weather Service Memphis: 84, 61, 77 and 102 mph measured in the "
    "county on 22 July 2003"
)
POLES = (
    "pole curve of Ouyang and Dueñas-Osorio, Structural Safety 48 (2014) 15, as digitised in "
    "temoatools (Bennett et al., Nature Energy 6 (2021) 240), to which a lognormal one is fitted: "
    "half at 58.2 m/s, a tenth at 45.3, nine tenths at 75"
)
SUBSTATIONS = (
    "substation curve of the same, between 28 and 50 m/s: 6.4 % at 38.8 m/s, 13 % at 50; its steep "
    "part beyond 56 m/s is left out"
)

STORM_PARAMETERS = (
    Parameter("storm_h", "h", 1.0, 0.0, 1e6, "when the storm comes after the start", "by choice"),
    Parameter(
        "gust_median_m_s",
        "m/s",
        35.6,
        20.0,
        60.0,
        "median over the county of the highest gust at a place",
        f"{DERECHO_2003}: their geometric mean is 79.7 mph",
    ),
    Parameter(
        "gust_sigma",
        "1",
        0.21,
        0.05,
        0.5,
        "deviation of ln gust between places",
        f"{DERECHO_2003}: deviation of their logarithms",
    ),
    Parameter(
        "gust_range_km",
        "km",
        15.0,
        4.0,
        60.0,
        "distance at which the gusts of two places are nearly independent (correlation 0.05)",
        "assumption: downbursts within a line of storms are some 4 to 10 km wide",
    ),
    Parameter(
        "next_storm_mean_h",
        "h",
        240.0,
        24.0,
        1e6,
        "mean of the exponential time until another line of storms comes",
        "assumption: two such storms were 168 h apart in Memphis, on 25 June and 2 July 2023 "
        "(FOX13 Memphis, 4 July 2023); such weather stays for one to two weeks",
    ),
    Parameter(
        "next_gust_median_m_s",
        "m/s",
        26.8,
        15.0,
        45.0,
        "median of the gusts of those that follow",
        "60 mph on 2 July 2023, a week after 75-80 mph (FOX13 Memphis, 4 July 2023)",
    ),
    Parameter("pole_median_m_s", "m/s", 58.2, 45.0, 75.0, "gust that fells half the poles", POLES),
    Parameter("pole_beta", "1", 0.197, 0.1, 0.4, "deviation of ln gust that fells a pole", POLES),
    Parameter(
        "pole_span_m",
        "m",
        50.0,
        35.0,
        100.0,
        "between two poles",
        "assumption: urban lines of this voltage have spans of 40 to 60 m",
    ),
    Parameter(
        "circuits_per_line",
        "1",
        6.0,
        1.0,
        12.0,
        "circuits that a line of the skeleton stands for",
        "435 circuits (FOX13 Memphis, 21 July 2023) over 73 lines",
    ),
    Parameter(
        "pole_repair_h",
        "h",
        3.0,
        1.0,
        8.0,
        "gang-hours for a pole and the wires at it, tree work included",
        "Ouyang and Dueñas-Osorio 2014: 5 h of a line crew for a pole, 4 h for a span of wire "
        "(from memory, unverified; temoatools has 119 h/km from them); a gang is three crews",
    ),
    Parameter(
        "repair_spread",
        "1",
        0.5,
        0.0,
        1.0,
        "deviation of ln work between lines with as many broken poles",
        "assumption: the coefficient of variation of one repair of the same source, from memory",
    ),
    Parameter(
        "substation_median_m_s",
        "m/s",
        101.0,
        60.0,
        150.0,
        "median of the lognormal curve by which substations and gate stations are put out",
        SUBSTATIONS,
    ),
    Parameter("substation_beta", "1", 0.63, 0.1, 0.9, "its deviation of ln gust", SUBSTATIONS),
    Parameter(
        "repair_hours_per_day",
        "h",
        24.0,
        8.0,
        24.0,
        "gang-hours of one Hazus day of repair at a substation",
        "MLGW crews work round the clock in 16-hour shifts after storms (MLGW, June 2009)",
    ),
)
"""Of which the region's assumptions, where they have one of the name, give the values."""
