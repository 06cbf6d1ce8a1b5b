"""Who asks: a peer by its identity, and the patterns by which rules mean it."""

from __future__ import annotations

from dataclasses import dataclass

SCHEME = "spiffe://"
PEERS = ("peer", "broker", "guard")
"""The roles of those who speak for another city, its broker and its guard, as they stand in its
identity."""


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is as `pattern` says, in which `*` stands for any text and nothing else is
    special. Takes time in proportion to the lengths, whatever the pattern."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    if not text.startswith(first):
        return False
    *middle, last = rest
    at = len(first)
    for part in middle:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return len(text) - at >= len(last) and text.endswith(last)


@dataclass(frozen=True, slots=True)
class Reader:
    """Who asks: `spiffe://CITY/ROLE/NAME`, or a plain name; nobody when it is empty."""

    identity: str

    @property
    def city(self) -> str:
        """The city that a peer speaks for; empty for those that are no peers."""
        if not self.identity.startswith(SCHEME):
            return self.identity
        city, _, path = self.identity.removeprefix(SCHEME).partition("/")
        return city if path.partition("/")[0] in PEERS else ""

    def is_meant_by(self, pattern: str) -> bool:
        """Whether a rule for `pattern` is for this reader; none is for nobody.

        A pattern with a scheme is held to the whole identity. A plain one is held to the city, of
        peers only: `memphis` is any broker or guard of Memphis and none of its observers. `*` is
        everybody.
        """
        if not self.identity:
            return False
        if pattern == "*":
            return True
        if SCHEME in pattern:
            return matches(pattern, self.identity)
        return bool(self.city) and matches(pattern, self.city)

    def __str__(self) -> str:
        return self.identity or "nobody"
