"""Why a run went as it did: the graph of causes between events, its size and its chains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from federation.core.ledger import EventRecord
from federation.errors import Reason, ScenarioError
from federation.twin import HOUR_NS


@dataclass(frozen=True)
class Cascade:
    """The size of a cascade: events with a cause or a consequence, the domains that they
    cross, and the longest chain of causes."""

    events: int
    domains: tuple[str, ...]
    depth: int
    longest_chain: tuple[str, ...]


class Causes:
    """The events of one run as a directed acyclic graph from cause to consequence."""

    def __init__(self, events: Sequence[EventRecord], domains: Mapping[str, str]) -> None:
        self.events = {record.event.id: record for record in events}
        self.domains = domains
        self.effects: dict[str, list[str]] = {}
        self._depth: dict[str, int] = {}
        self._deepest: dict[str, str] = {}
        for record in events:  # the ledger's order puts every cause before its effects
            event = record.event
            self._depth[event.id] = 1
            for cause in event.causes:
                self.effects.setdefault(cause, []).append(event.id)
                depth = self._depth.get(cause, 0) + 1
                if depth > self._depth[event.id]:
                    self._depth[event.id] = depth
                    self._deepest[event.id] = cause

    def cascade(self) -> Cascade:
        linked = [i for i, r in self.events.items() if r.event.causes or i in self.effects]
        if not linked:
            return Cascade(0, (), 0, ())
        chain = self.chain(max(linked, key=lambda i: self._depth[i]))
        domains = dict.fromkeys(self.domain(i) for i in linked)
        return Cascade(len(linked), tuple(sorted(domains)), len(chain), chain)

    def domain(self, event_id: str) -> str:
        owner = self.events[event_id].owner
        return self.domains.get(owner, owner)

    def chain(self, event_id: str) -> tuple[str, ...]:
        """The longest chain of causes that ends in `event_id`, from its root."""
        chain = [event_id]
        while chain[-1] in self._deepest:
            chain.append(self._deepest[chain[-1]])
        return tuple(reversed(chain))

    def pick(self, kind: str = "patient_died") -> str:
        """The event of `kind` whose chain crosses most domains, the longest of those.

        Without any event of that kind, the end of the longest chain of all.
        """
        best, best_key = "", (0, 0)
        for wanted in (kind, ""):
            for event_id, record in self.events.items():
                if wanted and record.event.kind != wanted:
                    continue
                chain = self.chain(event_id)
                key = (len({self.domain(i) for i in chain}), len(chain))
                if key > best_key:
                    best, best_key = event_id, key
            if best:
                return best
        raise ScenarioError(Reason.RUN_NOT_FOUND, "the run has no events to explain")

    def kind(self, event_id: str) -> str:
        """What an event is, apart from where and when, as `domain/kind`."""
        return f"{self.domain(event_id)}/{self.events[event_id].event.kind}"

    def links(self) -> Counter[tuple[str, ...]]:
        """How often an event of one kind caused one of another."""
        return Counter(
            (self.kind(cause), self.kind(effect))
            for effect, record in self.events.items()
            for cause in record.event.causes
            if cause in self.events
        )

    def paths(self) -> Counter[tuple[str, ...]]:
        """By how many last consequences each path ends: the kinds of events along the longest
        chain to an event that caused no other, repetitions of one kind taken together.
        """
        counted: Counter[tuple[str, ...]] = Counter()
        kinds: dict[str, tuple[str, ...]] = {}
        for event_id in self.events:  # causes come before their effects
            kind = self.kind(event_id)
            before = kinds.get(self._deepest.get(event_id, ""), ())
            kinds[event_id] = before if before[-1:] == (kind,) else (*before, kind)
            if event_id not in self.effects and event_id in self._deepest:
                counted[kinds[event_id]] += 1
        return counted

    def line(self, event_id: str) -> str:
        """One event as a reader wants it: when, where, what."""
        record = self.events[event_id]
        hours, minutes = divmod(round(record.time_ns / HOUR_NS * 60), 60)
        return f"{hours:02d}:{minutes:02d}  {self.domain(event_id)}: {record.event.text}"

    def via(self, cause: str, effect: str) -> str:
        """The coupling through which a foreign cause came, or "" within one member."""
        return dict(self.events[effect].via).get(cause, "")

    def chain_text(self, event_id: str) -> str:
        """A chain from its root, indented step by step, each link with its coupling."""
        lines = []
        chain = self.chain(event_id)
        for depth, step in enumerate(chain):
            channel = self.via(chain[depth - 1], step) if depth else ""
            lines.append("  " * depth + ("└ " if depth else "") + self.line(step))
            if channel:
                lines[-1] += f"   [{channel}]"
        return "\n".join(lines)

    def tree_text(self, root: str, limit: int = 40) -> str:
        """The consequences of `root` as a tree; children of one kind are counted together."""
        lines = [self.line(root)]
        seen = {root}
        self._branch(root, "", lines, seen, limit)
        return "\n".join(lines)

    def _branch(
        self, parent: str, indent: str, lines: list[str], seen: set[str], limit: int
    ) -> None:
        children: dict[tuple[str, str], list[str]] = {}
        for child in self.effects.get(parent, ()):
            if child not in seen:
                seen.add(child)
                key = (self.domain(child), self.events[child].event.kind)
                children.setdefault(key, []).append(child)
        for (domain, kind), group in children.items():
            if len(lines) >= limit:
                lines.append(f"{indent}└ ...")
                return
            most = max(group, key=lambda i: self._reach(i))
            more = f"  (+{len(group) - 1} more {domain} {kind})" if len(group) > 1 else ""
            channel = self.via(parent, most)
            lines.append(
                f"{indent}└ {self.line(most)}{more}" + (f"   [{channel}]" if channel else "")
            )
            self._branch(most, indent + "  ", lines, seen, limit)

    def _reach(self, event_id: str) -> int:
        """How many events follow from one, at most a few hundred counted."""
        found, queue = {event_id}, [event_id]
        while queue and len(found) < 300:
            for child in self.effects.get(queue.pop(), ()):
                if child not in found:
                    found.add(child)
                    queue.append(child)
        return len(found)
