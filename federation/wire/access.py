"""Says who may call what: a table of every RPC and the parts that may call it, and no code else.

What stands nowhere here is denied to everybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from federation.wire.party import Part

_ALL = "broker twin guard operator planner observer peer"
_READERS = "guard operator planner observer"

_TABLE: Mapping[str, Mapping[str, str]] = {
    "federation.v1.Twin": {
        "Describe": "broker guard operator planner observer peer",
        "ReadClock": "broker guard operator planner observer peer",
        # a session may carry actions of its run, so nobody but who coordinates the run opens one
        "Session": "broker peer",
        "Flexibility": "broker planner peer",
        "Select": "guard",
        "Operate": "guard",
        "Confirm": "guard",
        # towards safety: a person needs no guard for it
        "Release": "guard operator",
        "Halt": "guard operator",
        "Lift": "operator",
        "ReadDesk": _READERS,
        "Decide": "twin",
    },
    "federation.v1.Broker": {
        "Register": "twin",
        "Renew": "twin",
        "Leave": "twin",
        "ListMembers": _READERS,
        "Watch": _READERS,
        "QueryHistory": _READERS,
        "ListOutages": _READERS,
    },
    "federation.v1.Scenarios": {
        "CreateRun": "operator planner",
        "GetRun": _READERS,
        "ListRuns": _READERS,
        "WatchRun": _READERS,
        "ForkRun": "guard operator planner",
        "TryFutures": "guard operator planner",
        "ReplayRun": "operator planner",
        "CancelRun": "guard operator",
    },
    "federation.v1.Peers": {
        "Ask": f"{_READERS} peer",
        # what cities promise each other they promise themselves, and sign
        "Bargain": "peer",
        "Pledge": "peer",
    },
    "federation.v1.Aid": {
        "Seek": "guard operator planner",
        "ListCommitments": _READERS,
        "Reconcile": "guard operator",
        "Settle": "guard operator",
    },
    "federation.v1.Plans": {"ListPlans": _READERS},
    "federation.v1.Control": {
        "SubmitAction": "guard operator",
        "AddMembers": "operator",
        "RemoveMember": "operator",
        "ReplaceMember": "operator",
        "StopRun": "guard operator",
        "Why": _READERS,
    },
    "federation.v1.Autonomy": {
        "ListProposals": _READERS,
        "Answer": "operator",
        "GetAutonomy": _READERS,
        "SetLevel": "operator",
    },
    "grpc.health.v1.Health": {"Check": _ALL, "List": _ALL, "Watch": _ALL},
    "grpc.reflection.v1alpha.ServerReflection": {
        "ServerReflectionInfo": "broker guard operator planner observer"
    },
}

SERVED_BY: Mapping[str, frozenset[Part]] = {
    "federation.v1.Twin": frozenset({Part.TWIN, Part.BROKER}),
    "federation.v1.Broker": frozenset({Part.BROKER}),
    "federation.v1.Scenarios": frozenset({Part.BROKER}),
    "federation.v1.Plans": frozenset({Part.BROKER}),
    "federation.v1.Peers": frozenset({Part.BROKER}),
    "federation.v1.Aid": frozenset({Part.BROKER}),
    "federation.v1.Control": frozenset({Part.BROKER}),
    "federation.v1.Autonomy": frozenset({Part.GUARD}),
}
"""The part that a process must play to serve this at all."""

TABLE: Mapping[str, frozenset[Part]] = {
    f"/{service}/{rpc}": frozenset(map(Part, parts.split()))
    for service, rpcs in _TABLE.items()
    for rpc, parts in rpcs.items()
}
"""By the RPC's path who may call it."""


def may(part: Part, rpc: str) -> bool:
    """Whether who plays this part may call the RPC with this path."""
    return part in TABLE.get(rpc, frozenset())


def markdown() -> str:
    """The table for a person; RPCs of a service that the same parts may call share a line."""
    lines = [
        "| RPC | " + " | ".join(Part) + " |",
        "|---|" + "---|" * len(Part),
    ]
    lines += [
        f"| `{service.rpartition('.')[2]}`: {', '.join(rpcs)} | "
        + " | ".join("yes" if part in parts else "" for part in Part)
        + " |"
        for service, rpcs, parts in _lines()
    ]
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def _lines() -> Iterator[tuple[str, list[str], frozenset[Part]]]:
    for service, rpcs in _TABLE.items():
        grouped: dict[frozenset[Part], list[str]] = {}
        for rpc in rpcs:
            grouped.setdefault(TABLE[f"/{service}/{rpc}"], []).append(rpc)
        for parts, names in grouped.items():
            yield service, names, parts


if __name__ == "__main__":
    print(markdown())
