"""Puts two cities apart, so that only one line joins them, which can be cut and healed.

Where the machine allows it each city has a network namespace of its own, and the line is a pair of
virtual interfaces: down, it loses packets and tells nobody. Elsewhere all are on one loopback, and
the line is a proxy per direction (`tests.links`) that goes silent.

In a namespace a relay (`python -m benchmarks.cities_wire`) carries what leaves the city's loopback:
from 127.0.0.1 to the other city's end of the line and back, and from a socket file, by which the
driver calls the city's broker. So brokers speak plain text on loopback only, as they ask for.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.links import PARTITION, bad_link

BROKER, BEYOND, LINE = 7700, 7701, 7709
"""Ports in a namespace: the broker's, the other city's as seen from here, and the line's end."""
START_S = 10.0


@dataclass(frozen=True)
class Place:
    """Where a city is: how its processes are started, and how it is reached."""

    prefix: tuple[str, ...]
    """What comes before the command of a process of the city."""
    port: int
    """Of its broker, on the city's loopback."""
    beyond: str
    """The address of the other city's broker, from here."""
    driver: str
    """The address of its broker, from the driver."""


@dataclass(frozen=True)
class Apart:
    """Two cities and what joins them."""

    places: tuple[Place, Place]
    kind: str
    cut: Callable[[], None]
    heal: Callable[[], None]


def can_separate() -> bool:
    """Whether this machine lets us have network namespaces."""
    if not all(shutil.which(tool) for tool in ("ip", "unshare", "nsenter")):
        return False
    done = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return done.returncode == 0


def stand_as_root() -> None:
    """Begin this program again in a user namespace, where it may make namespaces of networks; if
    it is root already, or the machine does not allow it, go on as it is."""
    if os.getuid() == 0 or not shutil.which("unshare"):
        return
    within = ["unshare", "--user", "--map-root-user"]
    done = subprocess.run([*within, "unshare", "--net", "true"], capture_output=True, check=False)
    if done.returncode == 0:
        os.execvp("unshare", [*within, sys.executable, *sys.orig_argv[1:]])


@asynccontextmanager
async def apart(folder: Path, kind: str = "") -> AsyncIterator[Apart]:
    """Two places for cities, for as long as the context lasts; `kind` is netns or proxy."""
    kind = kind or ("netns" if can_separate() else "proxy")
    made = _in_namespaces(folder) if kind == "netns" else _behind_proxies()
    async with made as found:
        yield found


# -- network namespaces ----------------------------------------------------------------------


@asynccontextmanager
async def _in_namespaces(folder: Path) -> AsyncIterator[Apart]:
    ends = ("10.77.0.1", "10.77.0.2")
    sockets = [folder / f"{name}.sock" for name in ("one", "other")]
    relays: list[subprocess.Popen[bytes]] = []
    try:
        for end, other, socket in zip(ends, reversed(ends), sockets, strict=True):
            command = ["unshare", "--net", sys.executable, "-m", "benchmarks.cities_wire"]
            relays.append(subprocess.Popen([*command, str(socket), end, other]))
        pids = [str(relay.pid) for relay in relays]
        prefixes = [("nsenter", "--target", pid, "--net") for pid in pids]
        _until(lambda: all(_is_apart(relay.pid) for relay in relays))
        first = prefixes[0]
        _do(*first, "ip", "link", "add", "line", "type", "veth", "peer", "line", "netns", pids[1])
        for prefix, end in zip(prefixes, ends, strict=True):
            _do(*prefix, "ip", "address", "add", f"{end}/24", "dev", "line")
            for device in ("lo", "line"):
                _do(*prefix, "ip", "link", "set", device, "up")
        _until(lambda: all(socket.exists() for socket in sockets))
        places = [
            Place(prefix, BROKER, f"127.0.0.1:{BEYOND}", f"unix:{socket}")
            for prefix, socket in zip(prefixes, sockets, strict=True)
        ]

        def turn(how: str) -> None:
            for prefix in prefixes:
                _do(*prefix, "ip", "link", "set", "line", how)

        yield Apart((places[0], places[1]), "netns", lambda: turn("down"), lambda: turn("up"))
    finally:
        for relay in relays:
            relay.terminate()
        for relay in relays:
            relay.wait()


def _is_apart(pid: int) -> bool:
    """Whether a process has left our namespace and runs what it was asked to."""
    try:
        mine, its = (os.readlink(f"/proc/{who}/ns/net") for who in ("self", pid))
    except OSError:
        return False
    return mine != its


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + START_S
    while not is_so():
        if time.monotonic() > end_s:
            raise RuntimeError("the network namespaces did not come up")
        time.sleep(0.02)


async def _relay(socket: str, end: str, other: str) -> None:
    """Carry bytes for one namespace until the process ends."""
    while True:
        with suppress(OSError):
            line = await asyncio.start_server(_to("127.0.0.1", BROKER), "0.0.0.0", LINE)
            break
        await asyncio.sleep(0.02)
    while True:
        with suppress(OSError):
            beyond = await asyncio.start_server(_to(other, LINE), "127.0.0.1", BEYOND)
            break
        await asyncio.sleep(0.02)
    driver = await asyncio.start_unix_server(_to("127.0.0.1", BROKER), socket)
    async with line, beyond, driver:
        await asyncio.Event().wait()


def _to(
    host: str, port: int
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], asyncio.Task[None]]:
    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                sink.write(chunk)
                await sink.drain()
        with suppress(OSError):
            sink.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> asyncio.Task[None]:
        task = asyncio.create_task(join(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    return accept


# -- one loopback ----------------------------------------------------------------------------


@asynccontextmanager
async def _behind_proxies() -> AsyncIterator[Apart]:
    ports = (_free_port(), _free_port())
    async with AsyncExitStack() as stack:
        links = [
            await stack.enter_async_context(bad_link(f"127.0.0.1:{port}", seed))
            for seed, port in enumerate(reversed(ports))
        ]
        places = [
            Place((), port, link.address, f"127.0.0.1:{port}")
            for port, link in zip(ports, links, strict=True)
        ]

        def cut() -> None:
            for link in links:
                link.begin(PARTITION)

        def heal() -> None:
            for link in links:
                link.heal()

        yield Apart((places[0], places[1]), "proxy", cut, heal)


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(arguments: Sequence[str]) -> None:
    socket, end, other = arguments
    with suppress(KeyboardInterrupt):
        asyncio.run(_relay(socket, end, other))


if __name__ == "__main__":
    main(sys.argv[1:])
