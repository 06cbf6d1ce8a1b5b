"""An independent referee: it reads the same rules with code of its own, and sees what reaches the
town.

It shares no line with the guard's limits, forgets nothing, and counts from the town's own log of
what happened, where the guard counts what it let go.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from federation.control.situation import Forecast, Submission
from federation.core.bundle import Bundle
from tests.hostile.town import ACTUATORS, DESCRIPTIONS, HOSPITALS, RUN, Place, Town

MINUTE = 60 * 10**9
RULES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("town.yaml").read_text())
PLACES: dict[str, list[Place]] = {
    f"{member}.{a.name}": [(member, a.name, entity) for entity in description.ids(a.kind)]
    for member, description in DESCRIPTIONS.items()
    for a in description.actuators
}
TOLERANCE = 1e-6
"""Ten thousandths of what would be seen, and far above the rounding of sums."""


class Referee:
    """Says what is wrong with a plan, and with what is in force in the town."""

    def __init__(self, town: Town, optimisers: dict[str, Ed25519PublicKey]) -> None:
        self.town = town
        self.optimisers = optimisers
        self.version: int = RULES["version"]
        self.let_go: dict[str, int] = {}
        """Every bundle of the loop that was let go, and when."""
        self.dark_since: list[int | None] = [None] * len(HOSPITALS)
        self.breaches: list[str] = []

    # -- a plan, before anybody has judged it ---------------------------------------------

    def faults(self, plan: Submission, forecast: Forecast | None) -> set[str]:
        """The classes of rules that a plan breaks at this instant; empty for a safe one."""
        found = set(self._of_its_paper(plan))
        bundle = plan.bundle
        known = [s for s in bundle.setpoints if self._has_rule(s.member, s.actuator, s.entity)]
        if not known or len(known) < len(bundle.setpoints):
            found.add("granted")
        for s in known:
            rule, actuator = self._rule(s.member, s.actuator), ACTUATORS[f"{s.member}.{s.actuator}"]
            low, high = rule.get("low", actuator.low), rule.get("high", actuator.high)
            if math.isnan(s.value) or s.value < low or s.value > high:
                found.add("range")
            lease = s.lease_ns if s.lease_ns != 0 else actuator.lease_ns
            if lease <= 0 or lease > rule["lease_min"] * MINUTE:
                found.add("lease")
            if any(self._unusable(name) for name in rule.get("needs", [])):
                found.add("usable")
        places = [(s.member, s.actuator, s.entity) for s in known]
        if len(places) != len(set(places)) or len(bundle.setpoints) > RULES["setpoints_at_most"]:
            found.add("size")
        if len({s.member for s in bundle.setpoints}) > RULES["members_at_most"]:
            found.add("size")
        # counted as if everything on its way took effect now, and this with it
        window = RULES["bundles"]["within_min"] * MINUTE
        counted = [
            bundle
            for bundle, _ in itertools.takewhile(
                lambda item: self._recent(item[1], window), reversed(self.town.took_effect.items())
            )
        ]
        on_the_way = self._on_the_way()
        counted += [b.id for b in on_the_way]
        if len({b for b in counted if b in self.let_go}) >= RULES["bundles"]["at_most"]:
            found.add("size")
        found |= self._unsettled(bundle, places)
        values = {p: s.value for p, s in zip(places, known, strict=True)}
        found |= self._of_changes(values)
        found |= self._of_states(values)
        found |= self._of_conditions(bundle)
        found |= self._of_forecast(bundle, forecast)
        return found

    def _of_its_paper(self, plan: Submission) -> list[str]:
        bundle, now = plan.bundle, self.town.now_ns
        found = []
        text = f'{{"bundle":"{bundle.digest()}","rules_version":{json.dumps(plan.rules_version)}}}'
        try:
            self.optimisers[bundle.author].verify(plan.signature, text.encode())
        except (InvalidSignature, KeyError, ValueError):
            found.append("authority")
        if int(bundle.priority) != 3:
            found.append("authority")
        if bundle.id in self.let_go:
            found.append("replay")
        is_fresh = bundle.cut_ns <= now <= bundle.cut_ns + RULES["cut_min"] * MINUTE
        lives = now < bundle.expires_ns <= bundle.cut_ns + RULES["life_min"] * MINUTE
        if bundle.run != RUN or not is_fresh or not lives:
            found.append("freshness")
        if plan.rules_version != self.version:
            found.append("version")
        return found

    def _unsettled(self, bundle: Bundle, places: list[Place]) -> set[str]:
        found = set()
        waiting = {
            (s.member, s.actuator, s.entity) for b in self._on_the_way() for s in b.setpoints
        }
        for place in places:
            held = self.town.slots.get(place, {})
            by_people = [p for p in held if int(p) < 3]
            ending = [s for p, s in held.items() if int(p) == 3 and s.ends_ns <= bundle.expires_ns]
            if place in waiting or by_people or ending:
                found.add("settled")
        return found

    def _of_changes(self, values: dict[Place, float]) -> set[str]:
        found = set()
        steps = {p: v - self.town.in_force(p) for p, v in values.items()}
        steps = {p: step for p, step in steps.items() if step != 0}
        for place, step in steps.items():
            rule = self._rule(*place[:2])
            window = rule["change"]["within_min"] * MINUTE
            moved = sum(abs(s) for _, s in self._history(place, window))
            if not moved + abs(step) <= rule["change"]["at_most"] + TOLERANCE:
                found.add("change")
            turns = sum(self._turns(place, rule["reversals"]["within_min"] * MINUTE))
            if self._is_turn(place, step) and turns + 1 > rule["reversals"]["at_most"]:
                found.add("reversals")
        for member, actuator in {p[:2] for p in steps}:
            rule = self._rule(member, actuator)
            new = {p for p in steps if p[:2] == (member, actuator)}
            kind = ACTUATORS[f"{member}.{actuator}"].kind
            places = [(member, actuator, e) for e in DESCRIPTIONS[member].ids(kind)]
            window = rule["changes"]["within_min"] * MINUTE
            count = sum(len(self._history(p, window)) for p in places) + len(new)
            if count > rule["changes"]["at_most"]:
                found.add("count")
            blast = rule["entities"]
            window = blast["within_min"] * MINUTE
            touched = new | {p for p in places if self._history(p, window)}
            share = blast.get("share", 1.0) + TOLERANCE
            if len(touched) > blast["at_most"] or len(touched) / len(places) > share:
                found.add("blast")
        return found

    def _of_states(self, values: dict[Place, float]) -> set[str]:
        """What is in force may come to be anything, as leases end and bundles fail."""
        found = set()
        names = {f"{m}.{a}" for m, a, _ in values}
        for rule in RULES["sums"]:
            if names & set(rule["over"]):
                options = [
                    [weight * v for v in self._may_be(place, values)]
                    for name, weight in rule["over"].items()
                    for place in self._places(name)
                ]
                totals = (math.fsum(map(min, options)), math.fsum(map(max, options)))
                low, high = rule.get("at_least", -math.inf), rule.get("at_most", math.inf)
                if not all(low - TOLERANCE <= t <= high + TOLERANCE for t in totals):
                    found.add("sums")
        ties = [self._may_be(("grid", "tie", e), values) for e in ("north", "south")]
        if "grid.tie" in names and any(a >= 0.5 and b >= 0.5 for a, b in itertools.product(*ties)):
            found.add("exclusions")
        if "water.pump" in names:
            wet = self._unusable("water.flood") or max(self._last("water.flood").values) >= 1
            fast = [v for p in self._places("water.pump") for v in self._may_be(p, values)]
            if wet and any(v >= 0.9 for v in fast):
                found.add("exclusions")
        return found

    def _of_conditions(self, bundle: Bundle) -> set[str]:
        for c in bundle.conditions:
            name = f"{c.member}.{c.variable}"
            if name not in RULES["values"] or self._unusable(name):
                return {"conditions"}
            (kind,) = (v.kind for v in DESCRIPTIONS[c.member].variables if v.name == c.variable)
            ids = DESCRIPTIONS[c.member].ids(kind)
            if c.entity not in ids:
                return {"conditions"}
            value = self._last(name).values[ids.index(c.entity)]
            if value < c.low or value > c.high:
                return {"conditions"}
        return set()

    def _of_forecast(self, bundle: Bundle, forecast: Forecast | None) -> set[str]:
        rule = RULES["never"][0]
        if forecast is None or forecast.bundle != bundle.digest():
            return {"never"}
        times, rows = forecast.series["clinic", "supply"]
        if times[-1] < self.town.now_ns + rule["forecast_min"] * MINUTE:
            return {"never"}
        for i in range(len(HOSPITALS)):
            bright = self._bright_until(i)
            for time, row in zip(times, rows, strict=True):
                if bright is not None and time - bright > rule["for_over_min"] * MINUTE:
                    return {"never"}
                if row[i] >= rule["low"]:
                    bright = None
                elif bright is None:
                    bright = time
        return set()

    # -- what is in force ------------------------------------------------------------------

    def look(self) -> None:
        """Note every breach of the envelope by what is in force now."""
        now = self.town.now_ns
        by_people = {
            f"{place[0]}.{place[1]}"
            for place, held in self.town.slots.items()
            if any(int(priority) < 3 for priority in held)
        }
        for rule in RULES["sums"]:
            if by_people & set(rule["over"]):
                continue  # what people set is theirs to answer for
            total = sum(
                weight * self.town.in_force(place)
                for name, weight in rule["over"].items()
                for place in self._places(name)
            )
            low, high = rule.get("at_least", -math.inf), rule.get("at_most", math.inf)
            if not low - TOLERANCE <= total <= high + TOLERANCE:
                self.breaches.append(f"{rule['name']} at {total:g} at {now}")
        if "grid.tie" not in by_people:
            north, south = (self.town.in_force(("grid", "tie", e)) for e in ("north", "south"))
            if north >= 0.5 and south >= 0.5:
                self.breaches.append(f"both ties at {now}")
        limit = RULES["never"][0]
        for i, supply in enumerate(self.town.supply()):
            if supply >= limit["low"]:
                self.dark_since[i] = None
                continue
            since = self.dark_since[i]
            self.dark_since[i] = now if since is None else since
            if since is not None and now - since > limit["for_over_min"] * MINUTE:
                self.breaches.append(f"{HOSPITALS[i]} is dark since {since} at {now}")

    # -- its own reading of the rules and the log ------------------------------------------

    def _has_rule(self, member: str, actuator: str, entity: str) -> bool:
        name = f"{member}.{actuator}"
        return name in RULES["actuators"] and (member, actuator, entity) in self._places(name)

    def _rule(self, member: str, actuator: str) -> dict[str, Any]:
        found: dict[str, Any] = RULES["actuators"][f"{member}.{actuator}"]
        return found

    def _places(self, name: str) -> list[Place]:
        return PLACES[name]

    def _on_the_way(self) -> list[Bundle]:
        return [p.bundle for p in self.town.pending]

    def _recent(self, at: int, window: float) -> bool:
        return at > self.town.now_ns - window

    def _history(self, place: Place, window: float) -> list[tuple[int, float]]:
        """(when, by how much) the loop moved a place, and what is on its way."""
        recent = itertools.takewhile(
            lambda m: self._recent(m.time_ns, window), reversed(self.town.moves.get(place, []))
        )
        found = [(m.time_ns, m.value - m.before) for m in recent]
        for bundle in self._on_the_way():
            if bundle.author != "guard":
                for s in bundle.setpoints:
                    if (s.member, s.actuator, s.entity) == place:
                        step = s.value - self.town.in_force(place)
                        found += [(self.town.now_ns, step)] if step else []
        return found

    def _turns(self, place: Place, window: float) -> list[bool]:
        """Of each move of a place in the window, whether it went against the one before it."""
        own = self.town.moves.get(place, [])
        found = []
        for last, m in zip(own[-2::-1], own[:0:-1], strict=True):  # backwards
            if not self._recent(m.time_ns, window):
                break
            drift = m.before - last.value or last.value - last.before
            found.append(drift * (m.value - m.before) < 0)
        return found

    def _is_turn(self, place: Place, step: float) -> bool:
        own = self.town.moves.get(place, [])
        if not own:
            return False
        drift = self.town.in_force(place) - own[-1].value or own[-1].value - own[-1].before
        return drift * step < 0

    def _may_be(self, place: Place, values: dict[Place, float]) -> set[float]:
        default = ACTUATORS[f"{place[0]}.{place[1]}"].safe_default
        if place in values:
            return {values[place], default}
        found = {default} | {s.value for s in self.town.slots.get(place, {}).values()}
        for bundle in self._on_the_way():
            for s in bundle.setpoints:
                if (s.member, s.actuator, s.entity) == place:
                    found.add(s.value)
        return found

    def _last(self, name: str) -> Any:
        member, _, variable = name.partition(".")
        return self.town.told[member, variable][-1]

    def _unusable(self, name: str) -> bool:
        member, _, variable = name.partition(".")
        told = self.town.told.get((member, variable))
        rule = RULES["values"][name]
        if not told:
            return True
        age = self.town.now_ns - told[-1].time_ns
        words = ("good", "held", "substituted", "stale")
        is_good = words[int(told[-1].quality)] in rule.get("quality", ["good"])
        is_timed = told[-1].clock_error_s <= rule.get("clock_s", 1.0)
        return age > rule["age_min"] * MINUTE or not is_good or not is_timed

    def _bright_until(self, hospital: int) -> int | None:
        """When a hospital that is not known to be supplied was last seen so; None if it is."""
        rule, low = RULES["values"]["clinic.supply"], RULES["never"][0]["low"]
        told = self.town.told.get(("clinic", "supply"), [])
        for i, reading in enumerate(reversed(told)):
            is_good = reading.quality == 0 and reading.clock_error_s <= rule.get("clock_s", 1.0)
            if is_good and reading.values[hospital] >= low:
                is_now = i == 0 and self.town.now_ns - reading.time_ns <= rule["age_min"] * MINUTE
                return None if is_now else int(reading.time_ns)
        return int(told[0].time_ns) if told else self.town.now_ns
