"""Tells each hospital's beds what damage, power, fuel and water leave of them."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from twins.medical.calendar import Kind
from twins.medical.hospitals import Hospital
from twins.medical.records import Records
from twins.medical.wards import Wards
from twins.medical.ways import Ways


class Lifelines:
    """Grid and generator, tank and deliveries, water and its reserve of every hospital."""

    def __init__(
        self, records: Records, ways: Ways, wards: Wards, hospitals: list[Hospital]
    ) -> None:
        self.records = records
        self.ways = ways
        self.wards = wards
        self.hospitals = hospitals

    def set_damage(self, index: int, state: float) -> None:
        """Take note of the Hazus damage state of a hospital."""
        hospital = self.hospitals[index]
        worse = state > hospital.damage_state
        hospital.damage_state = state
        causes = self.records.causes("hospital_damage_state", index)
        if worse and state >= 2.0:
            hospital.trouble["damage"] = causes[0] if causes else ""
        elif state < 2.0:
            hospital.trouble.pop("damage", None)
        self.wards.resize(index, causes)

    # -- power and fuel ----------------------------------------------------------------

    def set_power(self, index: int, share: float) -> None:
        """Take note of the share of the wanted power that the grid gives a hospital."""
        records, hospital = self.records, self.hospitals[index]
        site, p = records.layout.hospitals[index], records.p
        hospital.grid_share = share
        if share < 0.95:
            hospital.saving = True
            hospital.short_since_min = inf
        elif hospital.saving and hospital.short_since_min == inf:
            hospital.short_since_min = records.now
        causes = records.causes("hospital_power", index)
        if hospital.on_grid and share < p["power_threshold"]:
            hospital.on_grid = False
            hospital.outage += 1
            if hospital.generator_starts and hospital.fuel_h > 0.0:
                self._start_generator(index, causes)
            else:
                hospital.latest_event = hospital.trouble["power"] = records.emit(
                    "generator_failed",
                    site.id,
                    f"{site.name} has lost the grid and its generator does not start",
                    causes,
                )
            self.wards.resize(index, (hospital.trouble["power"],))
        elif not hospital.on_grid and share >= min(1.0, p["power_threshold"] + 0.1):
            hospital.settle_fuel(records.now)
            hospital.on_grid = True
            hospital.generator_on = False
            hospital.outage += 1
            before = hospital.trouble.pop("power", "")
            hospital.latest_event = records.emit(
                "hospital_on_grid", site.id, f"{site.name} is back on the grid", (*causes, before)
            )
            self.wards.resize(index, (hospital.latest_event,))

    def _start_generator(self, index: int, causes: Iterable[str]) -> None:
        records, hospital = self.records, self.hospitals[index]
        site = records.layout.hospitals[index]
        hospital.generator_on = True
        hospital.fuel_as_of_min = records.now
        hospital.latest_event = hospital.trouble["power"] = records.emit(
            "hospital_on_generator",
            site.id,
            f"{site.name} runs on its generator, with fuel for {hospital.fuel_h:.0f} h",
            causes,
        )
        out = records.now + 60.0 * hospital.fuel_h
        half = max(records.now, out - 30.0 * hospital.tank_h)
        self._book_fuel(index, out, half)

    def _book_fuel(self, index: int, out_min: float, ordered_min: float) -> None:
        """Book the end of the fuel and the delivery that is ordered before."""
        calendar, outage = self.records.calendar, self.hospitals[index].outage
        calendar.at(out_min, Kind.FUEL_OUT, index, outage)
        delay_min = 60.0 * self.records.p["refuel_delay_h"]
        calendar.at(ordered_min + delay_min, Kind.REFUEL, index, outage)

    def fuel_out(self, index: int, outage: int) -> None:
        """The tank is empty, unless the power supply changed since this was booked."""
        records, hospital = self.records, self.hospitals[index]
        site = records.layout.hospitals[index]
        if hospital.outage != outage or not hospital.generator_on:
            return
        hospital.settle_fuel(records.now)
        hospital.fuel_h = 0.0
        hospital.generator_on = False
        hospital.latest_event = hospital.trouble["power"] = records.emit(
            "generator_out_of_fuel",
            site.id,
            f"{site.name} has no power: its generator is out of fuel",
            (hospital.trouble.get("power", ""), *records.causes("hospital_power", index)),
        )
        self.wards.resize(index, (hospital.latest_event,))

    def refuel(self, index: int, outage: int) -> None:
        """Deliver fuel, or try again in an hour while most ways to the hospital are closed."""
        records, hospital = self.records, self.hospitals[index]
        site, p = records.layout.hospitals[index], records.p
        if hospital.outage != outage or hospital.on_grid or p["refuel_h"] <= 0.0:
            return
        if not self.ways.mostly_open(index):
            records.calendar.at(records.now + 60.0, Kind.REFUEL, index, outage)
            return
        hospital.settle_fuel(records.now)
        hospital.fuel_h = min(hospital.tank_h, hospital.fuel_h + p["refuel_h"])
        hospital.outage += 1
        delivered = records.emit(
            "fuel_delivered",
            site.id,
            f"fuel for {p['refuel_h']:.0f} h reaches {site.name}",
            (hospital.trouble.get("power", ""),),
        )
        if hospital.generator_on:
            self._book_fuel(index, records.now + 60.0 * hospital.fuel_h, records.now)
        else:
            self._start_generator(index, (delivered,))
            self.wards.resize(index, (delivered,))

    # -- water -------------------------------------------------------------------------

    def set_water(self, index: int, share: float) -> None:
        """Take note of the share of the needed water that a hospital gets."""
        records, hospital = self.records, self.hospitals[index]
        site, p = records.layout.hospitals[index], records.p
        was_short = hospital.water_share < p["water_threshold"]
        hospital.settle_reserve(records.now, p)
        hospital.water_share = share
        short = share < p["water_threshold"]
        if short and not was_short:
            hospital.drought += 1
            dry_min = records.now + 60.0 * hospital.reserve_h
            records.calendar.at(dry_min, Kind.DRY, index, hospital.drought)
        elif was_short and not short:
            hospital.drought += 1
            if hospital.dry:
                hospital.dry = False
                before = hospital.trouble.pop("water", "")
                hospital.latest_event = records.emit(
                    "hospital_water_back",
                    site.id,
                    f"{site.name} has water again",
                    (*records.causes("hospital_water", index), before),
                )
                self.wards.resize(index, (hospital.latest_event,))

    def dry(self, index: int, drought: int) -> None:
        """The water reserve is used up, unless water came back since this was booked."""
        records, hospital = self.records, self.hospitals[index]
        site = records.layout.hospitals[index]
        if hospital.drought != drought or hospital.dry:
            return
        hospital.settle_reserve(records.now, records.p)
        hospital.dry = True
        hospital.latest_event = hospital.trouble["water"] = records.emit(
            "hospital_without_water",
            site.id,
            f"{site.name} is short of water: its reserve is used up",
            records.causes("hospital_water", index),
        )
        self.wards.resize(index, (hospital.latest_event,))
