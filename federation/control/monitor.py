"""Watches the values that a guard relies on: which are usable, and what is wrong for how long."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from federation.control.rules import Never, Rules, Term
from federation.control.situation import Reading, Refusal, Series, Situation
from federation.twin import MINUTE_NS, Description


class Monitor:
    """Reads situations one after the other. What is not known counts as wrong.

    How long something has been wrong is counted from when it was last known to be right.
    """

    def __init__(self, rules: Rules, descriptions: Mapping[str, Description]) -> None:
        self._rules = rules
        self._rows: dict[str, dict[str, int]] = {
            f"{member}.{v.name}": {entity: i for i, entity in enumerate(d.ids(v.kind))}
            for member, d in descriptions.items()
            for v in d.outputs()
        }
        self.right_ns: dict[tuple[str, int], int] = {}
        """By rule and row, when what must never be wrong for long was last known to be right."""
        self._wrong: set[tuple[str, int]] = set()

    def value(self, situation: Situation, name: str) -> tuple[Reading | None, str]:
        """The reading of an output if it may be acted on, else why not."""
        rule = self._rules.values.get(name)
        member, _, variable = name.partition(".")
        reading = situation.readings.get((member, variable))
        if rule is None or name not in self._rows:
            return None, f"no rule says when {name} is usable"
        if reading is None:
            return None, f"{name} was never told"
        if not 0 <= situation.time_ns - reading.time_ns <= rule.age_ns:
            age_min = (situation.time_ns - reading.time_ns) / MINUTE_NS
            return None, f"{name} is {age_min:.4g} min old; at most {rule.age_min:g}"
        if reading.quality.name.lower() not in rule.quality:
            return None, f"{name} is {reading.quality.name.lower()}"
        if not reading.clock_error_s <= rule.clock_s:
            return None, f"the clock of {name} may be {reading.clock_error_s:g} s off"
        if len(reading.values) != len(self._rows[name]) or not np.isfinite(reading.values).all():
            return None, f"{name} is no vector of {len(self._rows[name])} numbers"
        return reading, ""

    def entity(self, situation: Situation, name: str, entity: str) -> tuple[float | None, str]:
        """The value of one entity if it may be acted on, else why not."""
        reading, fault = self.value(situation, name)
        row = self._rows.get(name, {}).get(entity)
        if reading is None or row is None:
            return None, fault or f"{name} has no entity {entity!r}"
        return float(reading.values[row]), ""

    def holds(self, situation: Situation, term: Term) -> bool:
        """Whether a term over an output holds, or may hold."""
        reading, _ = self.value(situation, term.of)
        if reading is None:
            return True
        values = reading.values
        if term.entity:
            values = values[[self._rows[term.of][term.entity]]]
        return bool(((term.low <= values) & (values <= term.high)).any())

    def observe(self, situation: Situation) -> tuple[Refusal, ...]:
        """Take in a situation; the rules whose time is up, less their margin."""
        found = []
        for never in self._rules.never:
            reading, fault = self.value(situation, never.variable)
            for entity, row in self._rows[never.variable].items():
                key = (never.name, row)
                if reading is not None and not _is_wrong(never, reading.values[row]):
                    self.right_ns[key] = reading.time_ns
                    self._wrong.discard(key)
                    continue
                self._wrong.add(key)
                right_ns = self.right_ns.setdefault(key, self._told_ns(situation, never))
                lasted_min = (situation.time_ns - right_ns) / MINUTE_NS
                if lasted_min >= never.for_over_min - never.margin_min:
                    why = fault or f"{never.variable} is {reading and reading.values[row]:g}"
                    text = f"{entity}: {why}, for {lasted_min:.4g} min"
                    found.append(Refusal(f"never:{never.name}", text))
        return tuple(found)

    def _told_ns(self, situation: Situation, never: Never) -> int:
        member, _, variable = never.variable.partition(".")
        reading = situation.readings.get((member, variable))
        return situation.time_ns if reading is None else min(reading.time_ns, situation.time_ns)

    def foreseen(self, never: Never, series: Series, situation: Situation) -> str:
        """What a forecast breaks of a rule, or nothing; each of its rows holds until the next."""
        times_ns, values = series
        now_ns = situation.time_ns
        rows = self._rows[never.variable]
        if not times_ns or values.shape != (len(times_ns), len(rows)):
            return f"the forecast of {never.variable} has the wrong shape"
        if any(a >= b for a, b in pairwise(times_ns)):
            return f"the forecast of {never.variable} goes back in time"
        if times_ns[0] > now_ns or times_ns[-1] - now_ns < round(never.forecast_min * MINUTE_NS):
            return f"the forecast of {never.variable} does not reach {never.forecast_min:g} min"
        most_ns = round(never.for_over_min * MINUTE_NS)
        for entity, row in rows.items():
            key = (never.name, row)
            since_ns = self.right_ns[key] if key in self._wrong else None
            for time_ns, value in zip(times_ns, values[:, row], strict=True):
                if since_ns is not None and time_ns - since_ns > most_ns:
                    return f"{entity} would be without for over {never.for_over_min:g} min"
                if not _is_wrong(never, value):
                    since_ns = None
                elif since_ns is None:
                    since_ns = time_ns
        return ""


def _is_wrong(never: Never, value: float) -> bool:
    return not never.low <= value <= never.high
