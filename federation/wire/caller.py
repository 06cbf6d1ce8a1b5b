"""Who calls: the one place that says by which identity a call is judged.

Where there are certificates, the identity is that of the caller's certificate. Without them a
server that listens on loopback takes the caller's word, which comes as metadata of the call: every
process of this machine may then say that it is anybody, so a broker that relies on it says so.
"""

from __future__ import annotations

from typing import Any

import grpc

from federation.wire import gate

CLAIM = "multitwin-peer"
"""The metadata in which a caller says who it is, where that is taken."""


def claim(identity: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call as `identity`; none for nobody."""
    return ((CLAIM, identity),) if identity else ()


def identity_of(context: grpc.aio.ServicerContext[Any, Any], *, takes_claims: bool) -> str:
    """The identity of the caller; empty for nobody.

    A claim is taken when `takes_claims`, and then only of a caller on this machine.
    """
    proven = gate.caller()
    if proven is not None:
        return proven.uri
    if not takes_claims or not _is_here(context.peer()):
        return ""
    for key, value in context.invocation_metadata() or ():
        if key == CLAIM:
            return value if isinstance(value, str) else ""
    return ""


def _is_here(peer: str) -> bool:
    return peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))
