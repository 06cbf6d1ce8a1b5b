"""Lists what a scenario may set of the epidemic, with the source of each default."""

from __future__ import annotations

from federation.twin import Parameter

PANDEMICS = (
    "Biggerstaff et al., BMC Infectious Diseases 14 (2014) 480: medians 1.46 (2009), 1.65 (1957), "
    "1.80 (1918, 1968)"
)
CDC_2017 = (
    "CDC, Pandemic Influenza Plan 2017, table A.1: 800 000 in hospital and 160 000 in intensive "
    "care of 64 million ill (moderate); 3.8 and 1.2 million (severe)"
)
FLUSURGE = "CDC FluSurge, in Emerg Infect Dis 15 (2009), 08-1196, table 2"

EPIDEMIC_PARAMETERS = (
    Parameter("r0", "1", 1.65, 1.1, 3.0, "infected by one when all are susceptible", PANDEMICS),
    Parameter(
        "latent_d",
        "day",
        2.0,
        1.0,
        3.0,
        "from infection until infectious",
        "Vynnycky and Edmunds, Epidemiol Infect 136 (2008) 166 (from memory, unverified)",
    ),
    Parameter(
        "infectious_d",
        "day",
        2.0,
        1.0,
        5.0,
        "how long infectious",
        "as latent_d; 2.2 in the boarding school of 1978 (Keeling and Rohani)",
    ),
    Parameter(
        "seed_share",
        "1",
        1e-5,
        1e-7,
        1e-3,
        "infectious on the first day of the epidemic",
        "assumption: by the peak it no longer matters",
    ),
    Parameter(
        "days_to_peak",
        "day",
        5.0,
        -30.0,
        60.0,
        "from the start of the run to the day on which most fall ill",
        "by choice",
    ),
    Parameter(
        "ill_share",
        "1",
        0.65,
        0.4,
        0.8,
        "of those infected who fall ill",
        "Vynnycky and Edmunds, Epidemiol Infect 136 (2008) 166: 60 to 65 % in 1957",
    ),
    Parameter(
        "hospital_share",
        "1",
        0.0125,
        0.005,
        0.12,
        "of those ill who need a hospital",
        CDC_2017,
    ),
    Parameter("icu_share", "1", 0.2, 0.1, 0.35, "of these who need intensive care", CDC_2017),
    Parameter(
        "admission_delay_d",
        "day",
        3.0,
        1.0,
        7.0,
        "from falling ill to needing a hospital",
        "assumption",
    ),
    Parameter("ward_stay_d", "day", 5.0, 3.0, 10.0, "on a ward", FLUSURGE),
    Parameter("icu_stay_d", "day", 10.0, 5.0, 15.0, "in intensive care", FLUSURGE),
)
"""The stays say who is in hospital when the run begins; how long others stay, hospitals say."""
