"""Says on what footing a process speaks to others: under an identity, or in the clear and locally.

The footing is part of the context of a task, so that what a server starts on behalf of its callers
stands where the server does.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from federation.wire.party import Part, Party
from federation.wire.trust import Files, Trust

FLAG = "--insecure-no-tls"
"""What lets plain text leave the machine."""


@dataclass(frozen=True, slots=True)
class Footing:
    """How a process speaks to others: under an identity, or in the clear.

    `is_exposed` lets plain text leave the machine. A process that `spares_local` has started on
    this machine all that registers with it, and they speak to each other in the clear.
    """

    trust: Trust | None = None
    is_exposed: bool = False
    spares_local: bool = False


_taken: ContextVar[Footing | None] = ContextVar("footing", default=None)


def present() -> Footing:
    """The one that counts here; where none was taken, that of the environment.

    `MULTITWIN_TLS` is a folder as `multitwin certs issue` makes it; instead, the files may be
    named one by one in `MULTITWIN_TLS_CERT`, `_KEY`, `_CA` and, if they exist, `_CRL` and `_PEERS`.
    """
    taken = _taken.get()
    return taken if taken is not None else _of_environment(_environment())


def _environment() -> tuple[str, ...]:
    names = ("", "_CERT", "_KEY", "_CA", "_CRL", "_PEERS")
    tls = tuple(os.environ.get(f"MULTITWIN_TLS{name}", "") for name in names)
    return (*tls, os.environ.get("MULTITWIN_INSECURE_NO_TLS", ""))


@cache
def _of_environment(said: tuple[str, ...]) -> Footing:
    folder, certificate, key, authority, revoked, peers, exposed = said
    if folder:
        files = Files.of(Path(folder))
    elif certificate or key or authority:
        absent = Path(os.devnull)
        files = Files(
            Path(certificate),
            Path(key),
            Path(authority),
            Path(revoked) if revoked else absent,
            Path(peers) if peers else absent,
        )
    else:
        return Footing(is_exposed=exposed not in ("", "0"))
    return Footing(Trust(files))


@contextmanager
def standing(on: Footing) -> Iterator[None]:
    """Let all that is done inside stand on this footing."""
    token = _taken.set(on)
    try:
        yield
    finally:
        _taken.reset(token)


def child_environment() -> dict[str, str]:
    """What a process that this one starts, to speak to it locally, is given: no identity."""
    return {k: v for k, v in os.environ.items() if not k.startswith("MULTITWIN_TLS")}


def is_local(address: str) -> bool:
    """Whether an address of gRPC can't be reached from another machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        host, _ = place_of(address)
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def place_of(address: str) -> tuple[str, int]:
    """The host and the port of an address of gRPC. Fails with ValueError when it is no such one."""
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        address = address.removeprefix(scheme)
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def expected(part: Part, name: str = "", city: str = "") -> Party | None:
    """Who has to answer under an address, for `channel`; None when we show nobody who we are.

    Without a name anybody who plays the part will do, without a city it is our own.
    """
    trust = present().trust
    return None if trust is None else Party(city or trust.party.city, part, name)


def registered(name: str) -> Party | None:
    """Who has to answer where the twin is that has registered with this broker under a name."""
    return None if present().spares_local else expected(Part.TWIN, name)


def serving_trust() -> Trust | None:
    """The identity that a server stands under which begins here; None for plain text."""
    on = present()
    return None if on.spares_local else on.trust
