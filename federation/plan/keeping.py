"""Keeps what a planner knows as bytes that are data: a store may be written by others, and what it
gives back is never run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from federation.errors import Reason, ScenarioError
from federation.snapshot import Snapshots

VERSION = 1
"""Of the form; a planner that keeps other things under the same names has another one."""

_MARK = b"multitwin planner %d\n"


class States:
    """States of one kind of planner, made of plain data, arrays and the classes that are given."""

    def __init__(self, *classes: type) -> None:
        self._snapshots = Snapshots(*classes)

    def pack(self, state: object) -> bytes:
        return _MARK % VERSION + self._snapshots.pack(state)

    def unpack(self, data: bytes, like: Callable[[Any], bool]) -> Any:
        """What was packed, if it is as it should be. Fails with INVALID_FRAME for anything else,
        and for bytes of another version, or of none: the states of earlier brokers were programs,
        and are not read."""
        mark, end, packed = data.partition(b"\n")
        if mark + end != _MARK % VERSION:
            raise ScenarioError(
                Reason.INVALID_FRAME,
                "this is no planner's state of this version: the broker that kept it was an "
                "earlier one, or none of ours. Its run can't go on from there; start it anew",
            )
        found = self._snapshots.unpack(packed)
        if not like(found):
            raise ScenarioError(Reason.INVALID_FRAME, "this is the state of another planner")
        return found


def are(*kinds: type) -> Callable[[Any], bool]:
    """Whether something is a tuple of things of these kinds."""
    return lambda found: (
        isinstance(found, tuple)
        and len(found) == len(kinds)
        and all(isinstance(part, kind) for part, kind in zip(found, kinds, strict=True))
    )
