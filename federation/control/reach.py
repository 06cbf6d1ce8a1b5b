"""What a group of actuators may come to: limits on all values that may yet be in force at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from federation.control.rules import Exclusion, Rules, Sum, Term
from federation.control.situation import Place, Refusal
from federation.twin import Actuator, Description

SLACK = 1e-9
"""What sums of floats may be off, relative to the limit."""


class Reach:
    """Judges sums and exclusions by the worst that may be.

    `values` of each method has, for every place that is not simply at its safe default, all values
    that it may come to have. They are taken in every combination: a lease may end, and a bundle
    may fail, at any time.
    """

    def __init__(self, rules: Rules, descriptions: Mapping[str, Description]) -> None:
        self._rules = rules
        self._actuators: dict[str, tuple[Actuator, int]] = {
            f"{member}.{a.name}": (a, len(d.ids(a.kind)))
            for member, d in descriptions.items()
            for a in d.actuators
        }

    def sums(
        self, values: Mapping[Place, tuple[float, ...]], about: Iterable[Place]
    ) -> list[Refusal]:
        """The sums over any actuator of `about` that may leave their limits."""
        names = {name_of(place) for place in about}
        found = []
        for sum_ in self._rules.sums:
            if names & set(sum_.over):
                low, high = self._bounds(sum_, values)
                if not high <= sum_.at_most + SLACK * abs(sum_.at_most):
                    text = f"may come to {high:g}; at most {sum_.at_most:g}"
                    found.append(Refusal(f"sum:{sum_.name}", text))
                if not low >= sum_.at_least - SLACK * abs(sum_.at_least):
                    text = f"may come to {low:g}; at least {sum_.at_least:g}"
                    found.append(Refusal(f"sum:{sum_.name}", text))
        return found

    def _bounds(self, sum_: Sum, values: Mapping[Place, tuple[float, ...]]) -> tuple[float, float]:
        low = high = 0.0
        for name, weight in sum_.over.items():
            actuator, size = self._actuators[name]
            for place, possible in values.items():
                if name_of(place) == name:
                    parts = [weight * value for value in possible]
                    low, high, size = low + min(parts), high + max(parts), size - 1
            low += size * weight * actuator.safe_default
            high += size * weight * actuator.safe_default
        return low, high

    def exclusions(
        self,
        values: Mapping[Place, tuple[float, ...]],
        about: Iterable[Place],
        holds: Callable[[Term], bool],
    ) -> list[Refusal]:
        """The exclusions with a term about any place of `about` whose terms may all be so.

        `holds` answers for terms over outputs.
        """
        places = list(about)
        return [
            Refusal(f"exclusion:{exclusion.name}", "all of it may be so at once")
            for exclusion in self._rules.not_together
            if any(_is_about(term, place) for term in exclusion.terms for place in places)
            and self._may_be(exclusion, values, holds)
        ]

    def _may_be(
        self,
        exclusion: Exclusion,
        values: Mapping[Place, tuple[float, ...]],
        holds: Callable[[Term], bool],
    ) -> bool:
        for term in exclusion.terms:
            if term.of not in self._actuators:
                if not holds(term):
                    return False
                continue
            actuator, size = self._actuators[term.of]
            moved = {place: v for place, v in values.items() if _is_about(term, place)}
            possible = [value for some in moved.values() for value in some]
            if len(moved) < (1 if term.entity else size):
                possible.append(actuator.safe_default)
            if not any(term.low <= value <= term.high for value in possible):
                return False
        return True


def name_of(place: Place) -> str:
    """The actuator of a place as the rules name it."""
    return f"{place[0]}.{place[1]}"


def _is_about(term: Term, place: Place) -> bool:
    return term.of == name_of(place) and term.entity in ("", place[2])
