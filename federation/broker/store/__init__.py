"""What a broker must still know after it was killed."""

from federation.broker.store.chunks import Outline
from federation.broker.store.kept import (
    NOT_SETTLED,
    Frame,
    Item,
    Note,
    Run,
    Snapshot,
    State,
    Stored,
)
from federation.broker.store.store import Store

__all__ = [
    "NOT_SETTLED",
    "Frame",
    "Item",
    "Note",
    "Outline",
    "Run",
    "Snapshot",
    "State",
    "Store",
    "Stored",
]
