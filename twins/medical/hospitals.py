"""Keeps one hospital going: its beds, the inpatients it had, its power, fuel and water."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from twins.medical.beds import BedPool
from twins.medical.layout import HospitalSite, Layout, distance_km
from twins.medical.patients import HOSPITALS_STREAM

STANDBY_SHARE = 0.1
"""Load and water need that an evacuated building keeps (assumption)."""


@dataclass(frozen=True, slots=True)
class Hour:
    """What became of ordinary inpatients in one hour."""

    admitted: int
    discharged: int


@dataclass(frozen=True, slots=True)
class ByAmbulance:
    """Mean numbers of beds that ordinary ambulance patients fill at one hospital."""

    ward: float
    icu: float


@lru_cache(maxsize=8)
def _people_by_nearest(layout: Layout, takers: tuple[int, ...]) -> tuple[float, ...]:
    """How many people live nearest (beeline) to each hospital, of those that take them."""
    sites = layout.hospitals
    people = [0.0] * len(sites)
    for zone, residents in enumerate(layout.zone_people if takers else ()):
        here = layout.zone_lon_deg[zone], layout.zone_lat_deg[zone]
        nearest = min(takers, key=lambda i: distance_km(*here, sites[i].lon_deg, sites[i].lat_deg))
        people[nearest] += residents
    return tuple(people)


def expected_by_ambulance(layout: Layout, p: Mapping[str, float]) -> list[ByAmbulance]:
    """What share of the stated occupancy is ambulance patients, by nearness (beeline).

    Critical patients go to the level I centres for adults. By Little's law a bed count is
    arrivals per hour times hours of stay. Survival is left out: a few beds.
    """
    calls_per_h = p["calls_per_day"] / 24.0
    critical_per_h = calls_per_h * p["critical_share"]
    others_per_h = calls_per_h * p["transported_share"] - critical_per_h
    stay_h = (
        p["admitted_share"] * p["ward_stay_h"] + (1.0 - p["admitted_share"]) * p["released_stay_h"]
    )
    sites = layout.hospitals
    takers = [i for i, s in enumerate(sites) if s.role not in ("neighbour", "paediatric")]
    people = _people_by_nearest(layout, tuple(takers))
    centres = [i for i in takers if sites[i].trauma_level == 1] or takers
    expected = []
    for i in range(len(sites)):
        share = people[i] / max(1.0, sum(people))
        critical = critical_per_h / len(centres) if i in centres else 0.0
        expected.append(
            ByAmbulance(
                ward=others_per_h * share * stay_h + critical * p["severity3_stay_h"],
                icu=critical * p["critical_stay_h"],
            )
        )
    return expected


class Hospital:
    r"""The state of one hospital.

    Usable beds are staffed (and surge) beds times

    .. math:: f = f_{damage} \min(f_{power}, f_{water})

    with f_damage 1 in Hazus damage states 0 and 1, `moderate_damage_bed_share` in 2, and 0
    from 3 on (evacuated: the Hazus COM6 recovery times of 45 and 180 days are beyond any
    horizon here); f_power is `unpowered_bed_share` with neither grid nor generator; f_water
    is `waterless_bed_share` once the reserve is used up. A generator starts within seconds (ten
    by NFPA 110), far below a step, so a start that succeeds costs no beds.

    Ordinary inpatients are counts; they leave at the rate that makes the stated occupancy
    stationary, and any fraction of a patient is carried over, so that they bring no
    randomness of their own.
    """

    def __init__(
        self,
        site: HospitalSite,
        fuel_h: float,
        starts: bool,
        by_ambulance: ByAmbulance,
        p: Mapping[str, float],
    ) -> None:
        self.staffed_icu = min(site.icu_beds, site.staffed_beds)
        self.staffed_ward = site.staffed_beds - self.staffed_icu
        self.icu_inpatients = round(site.icu_occupancy * self.staffed_icu)
        self.ward_inpatients = min(
            max(0, round(site.occupancy * site.staffed_beds) - self.icu_inpatients),
            self.staffed_ward,
        )
        self.ward = BedPool(self.staffed_ward, self.ward_inpatients)
        self.icu = BedPool(self.staffed_icu, self.icu_inpatients)
        self.usual_patients = max(1, self.ward_inpatients + self.icu_inpatients)
        self.icu_in_per_h = max(0.0, self.icu_inpatients - by_ambulance.icu) / p["icu_stay_h"]
        self.ward_in_per_h = max(
            0.0,
            (self.ward_inpatients - by_ambulance.ward) / p["ward_stay_h"] - self.icu_in_per_h,
        )
        self.carry = {"icu_out": 0.0, "ward_out": 0.0, "icu_in": 0.0, "ward_in": 0.0, "early": 0.0}
        self.early_left = 0.0
        self.early_per_h = 0.0
        self.surge_open = False
        self.damage_state = 0.0
        self.grid_share = 1.0
        self.on_grid = True
        self.saving = False
        self.short_since_min = 0.0
        self.generator_starts = starts
        self.generator_on = False
        self.tank_h = fuel_h
        self.fuel_h = fuel_h
        self.fuel_as_of_min = 0.0
        self.outage = 0
        """Counts changes of the power supply: bookings of an earlier one are void."""
        self.water_share = 1.0
        self.reserve_h = p["water_reserve_h"]
        self.reserve_as_of_min = 0.0
        self.drought = 0
        self.dry = False
        self.walk_ins = 0
        self.walk_in_carry = 0.0
        self.bus_carry = 0.0
        self.queue = 0
        self.inbound_icu = 0
        self.inbound_ward = 0
        self.diverting = False
        self.trouble: dict[str, str] = {}
        """The events behind what is wrong here now, by kind of trouble."""
        self.latest_event = ""

    def function(self, p: Mapping[str, float]) -> float:
        """The usable share of the beds."""
        if self.damage_state >= 3.0:
            return 0.0
        damage = 1.0 if self.damage_state < 2.0 else p["moderate_damage_bed_share"]
        power = 1.0 if self.on_grid or self.generator_on else p["unpowered_bed_share"]
        water = p["waterless_bed_share"] if self.dry else 1.0
        return damage * min(power, water)

    def resize(self, p: Mapping[str, float]) -> None:
        """Set the capacities to what can be used now."""
        function = self.function(p)
        ward, icu = float(self.staffed_ward), float(self.staffed_icu)
        if self.surge_open:
            ward += p["surge_bed_share"] * (ward + icu)
            icu += p["surge_icu_share"] * icu
        self.ward.capacity = int(function * ward + 1e-9)
        self.icu.capacity = int(function * icu + 1e-9)

    @property
    def functional_beds(self) -> int:
        return self.ward.capacity + self.icu.capacity

    @property
    def unclaimed_ward_beds(self) -> int:
        """Free ward beds beyond those of the patients under way to them."""
        return self.ward.free - self.inbound_ward

    @property
    def unclaimed_icu_beds(self) -> int:
        """Free intensive-care places beyond those of the patients under way to them."""
        return self.icu.free - self.inbound_icu

    @property
    def inpatients(self) -> int:
        return self.ward_inpatients + self.icu_inpatients

    @property
    def evacuated(self) -> bool:
        return self.damage_state >= 3.0

    def crowding(self, p: Mapping[str, float]) -> float:
        """How full the emergency department is, 0 to 1: those who wait over two hours' work."""
        work = 2.0 * max(1.0, p["minor_per_bed_h"] * self.functional_beds)
        return min(1.0, (self.walk_ins + self.queue) / work)

    def see_walk_ins(self, span_min: float, p: Mapping[str, float]) -> int:
        """Treat slightly injured walk-ins for a while; how many of them go home."""
        self.walk_in_carry += p["minor_per_bed_h"] * self.functional_beds * span_min / 60.0
        seen = min(self.walk_ins, int(self.walk_in_carry))
        self.walk_in_carry -= int(self.walk_in_carry)
        if self.evacuated:
            seen = self.walk_ins  # turned away to look after themselves
        self.walk_ins -= seen
        return seen

    def fuel_at(self, now_min: float) -> float:
        """Hours of fuel left."""
        burnt_h = (now_min - self.fuel_as_of_min) / 60.0 if self.generator_on else 0.0
        return max(0.0, self.fuel_h - burnt_h)

    def settle_fuel(self, now_min: float) -> None:
        self.fuel_h, self.fuel_as_of_min = self.fuel_at(now_min), now_min

    def power_left_at(self, now_min: float) -> float:
        """Hours that a hospital can do without the grid, as far as anybody has seen: none for one
        that is without power."""
        is_dark = not self.on_grid and not self.generator_on
        return 0.0 if is_dark else self.fuel_at(now_min)

    def water_left_at(self, now_min: float, p: Mapping[str, float]) -> float:
        """Hours of water in reserve, which is used hour by hour when short, else refilled."""
        span_h = (now_min - self.reserve_as_of_min) / 60.0
        short = self.water_share < p["water_threshold"]
        left_h = self.reserve_h + (-span_h if short else span_h)
        return min(max(0.0, left_h), p["water_reserve_h"])

    def settle_reserve(self, now_min: float, p: Mapping[str, float]) -> None:
        """Bring the water reserve up to date."""
        self.reserve_h = self.water_left_at(now_min, p)
        self.reserve_as_of_min = now_min

    def occupancy_ratio(self) -> float:
        return (self.ward.occupied + self.icu.occupied) / self.usual_patients

    def load_factor(self, p: Mapping[str, float]) -> float:
        """Wanted grid load over that of an ordinary day.

        While the grid is short only the essential share is asked for: a hospital on its
        generator goes on asking for that, or the grid would never see whom to reconnect.
        """
        fixed = p["fixed_load_share"]
        factor = fixed + (1.0 - fixed) * self.occupancy_ratio()
        if self.evacuated:
            factor = STANDBY_SHARE
        return factor * p["essential_load_share"] if self.saving else factor

    def water_factor(self, p: Mapping[str, float]) -> float:
        """Water need over that of an ordinary day."""
        if self.evacuated:
            return STANDBY_SHARE
        fixed = p["fixed_water_share"]
        return fixed + (1.0 - fixed) * self.occupancy_ratio()

    def put_off_electives(self, p: Mapping[str, float]) -> int:
        """Let inpatients be as few as they are when electives have long been put off; how many
        fewer.

        By Little's law beds hold arrivals per hour times hours of stay.
        """
        ward = round(p["elective_share"] * self.ward_in_per_h * p["ward_stay_h"])
        icu = round(p["elective_share"] * self.icu_in_per_h * p["icu_stay_h"])
        ward, icu = min(ward, self.ward_inpatients), min(icu, self.icu_inpatients)
        self.lay(-ward, is_icu=False)
        self.lay(-icu, is_icu=True)
        return ward + icu

    def lay(self, persons: int, is_icu: bool) -> None:
        """Have so many more inpatients (or fewer) of whom only the number counts."""
        if is_icu:
            self.icu_inpatients += persons
            self.icu.occupied += persons
        else:
            self.ward_inpatients += persons
            self.ward.occupied += persons

    def _carry(self, flow: str, amount: float, at_most: int) -> int:
        self.carry[flow] += amount
        whole = int(self.carry[flow])
        self.carry[flow] -= whole
        return max(0, min(whole, at_most))

    def live_an_hour(self, plan: bool, p: Mapping[str, float]) -> Hour:
        """Let ordinary inpatients come and go for one hour; `plan`: the disaster plan is on."""
        early = 0
        if self.early_left > 0.0:
            step = min(self.early_per_h, self.early_left)
            self.early_left -= step
            early = self._carry("early", step, self.ward_inpatients)
        usual = self._carry(
            "ward_out", self.ward_inpatients / p["ward_stay_h"], self.ward_inpatients
        )
        discharged = min(early + usual, self.ward_inpatients)
        self.ward_inpatients -= discharged
        self.ward.occupied -= discharged
        stepping = self._carry(
            "icu_out",
            self.icu_inpatients / p["icu_stay_h"],
            min(self.icu_inpatients, max(0, self.ward.free)),
        )
        self.icu_inpatients -= stepping
        self.icu.occupied -= stepping
        self.ward_inpatients += stepping
        self.ward.occupied += stepping
        wanted = (1.0 - p["elective_share"] if plan else 1.0) * (self.function(p) > 0.0)
        to_ward = self._carry("ward_in", self.ward_in_per_h * wanted, max(0, self.ward.free))
        self.ward_inpatients += to_ward
        self.ward.occupied += to_ward
        to_icu = self._carry("icu_in", self.icu_in_per_h * wanted, max(0, self.icu.free))
        self.icu_inpatients += to_icu
        self.icu.occupied += to_icu
        return Hour(to_ward + to_icu, discharged)


def open_hospitals(layout: Layout, p: Mapping[str, float], seed: int) -> list[Hospital]:
    """The hospitals of a region, each with its luck: fuel in the tank, a generator that starts."""
    luck = np.random.default_rng([seed, HOSPITALS_STREAM]).random((len(layout.hospitals), 2))
    return [
        Hospital(
            site,
            fuel_h=p["fuel_h"] * (1.0 + p["fuel_spread"] * (2.0 * float(spread) - 1.0)),
            starts=bool(start >= p["generator_failure"]),
            by_ambulance=expected,
            p=p,
        )
        for site, (start, spread), expected in zip(
            layout.hospitals, luck, expected_by_ambulance(layout, p), strict=True
        )
    ]
