"""How old the values of a run are: since when their owners have not published them.

An output that is published again without a change is no record of the ledger, and yet is as young
as its publication; so ages are counted from publications and not from records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from federation.twin import StepResult


@dataclass(frozen=True, slots=True)
class Stale:
    """A value that is older than the scenario allows."""

    member: str
    variable: str
    publish_ns: int
    """When it was last published; -1 when it never was."""
    bound_ns: int


@dataclass(slots=True)
class Ages:
    """When each variable whose age is bounded was last published, changed or not."""

    bounds_ns: Mapping[tuple[str, str], int]
    published_ns: dict[tuple[str, str], int] = field(default_factory=dict)

    def heard(self, member: str, results: Iterable[StepResult]) -> None:
        """Note what a member has published, changed or not."""
        for result in results:
            for variable in result.outputs:
                if (member, variable) in self.bounds_ns:
                    self.published_ns[member, variable] = result.time_ns

    def stale(self, now_ns: int) -> Iterator[Stale]:
        """The values that are too old at an instant of the run."""
        for (member, variable), bound_ns in self.bounds_ns.items():
            publish_ns = self.published_ns.get((member, variable), -1)
            if now_ns - max(publish_ns, 0) > bound_ns:
                yield Stale(member, variable, publish_ns, bound_ns)
