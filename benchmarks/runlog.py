"""The ring over gRPC with its durable run log, as the command does it, or without: `on`, `off`.

Off means that nothing of the ledger is stored: `Store.append` does nothing.
"""

from __future__ import annotations

from unittest.mock import patch

from benchmarks import Cost, print_seconds
from benchmarks.ring import sockets
from federation.broker.store import Store


def off(n: int, m: int, t: int) -> float | Cost:
    with patch.object(Store, "append", return_value=0):
        return sockets(n, m, t)


if __name__ == "__main__":
    print_seconds({"on": sockets, "off": off})
