"""A line between two cities that is as bad as lines are in a disaster: faults that compose.

A `BadLink` listens at a port of its own and carries TCP to another. What it does to the bytes is
what the network would do to the segments of that connection, as far as an end of it can tell:

- A *delay* with jitter holds every segment up; order stays, as TCP keeps it.
- A *loss* of a share of the packets loses no byte, for TCP sends again. It stalls the way until the
  segment comes through: after k losses in a row for RTO (2^k - 1), RTO = max(200 ms, two round
  trips), as for a segment with nothing behind it that would tell of the loss earlier.
- *Silence* of a way lets nothing pass and resets nothing. When it ends, a segment comes at the time
  at which TCP would have sent it again, which may be as long again. While the way back is silent,
  what is sent comes, but nothing tells the sender so: after ten segments it stalls.
- A *reset* ends all connections at once, with what was on the way. `flap` and `storm` repeat it.

What is not modelled: the congestion window, limits of bandwidth, and lost SYN packets. A connection
that is begun while a way is silent is taken and then hears nothing, which for gRPC, whose
connection begins with a word of the server, comes to the same. Draws are from `seed`, apart for
each connection and way; when bytes come is up to the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Literal

SEGMENT_BYTES = 1448
RTO_S = 0.2
UNTOLD_SEGMENTS = 10
"""How many segments a sender lets go that hears of none of them: the first congestion window."""

MOST_RTO_S = 120.0
HELD_BYTES = 1 << 18
"""How much is on the way at a time in one direction, as in the buffers of two sockets."""

Way = Literal["there", "back"]
"""There: from who connects to the one behind the link."""

WAYS: tuple[Way, Way] = ("there", "back")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line, on the `ways` that are named; both unless they are."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Up to so much more, evenly drawn."""
    loss: float = 0.0
    """The share of packets that is lost, from 0 to less than 1."""
    is_silent: bool = False
    ways: tuple[Way, ...] = WAYS


PARTITION = Fault(is_silent=True)
FAR = Fault(delay_s=0.9, jitter_s=0.2)
"""About two seconds there and back."""
LOSSY = Fault(loss=0.2)


def one_way(way: Way) -> Fault:
    """Nothing passes that way any more; the other one is as it was."""
    return Fault(is_silent=True, ways=(way,))


@dataclass(frozen=True, slots=True)
class Spell:
    """A fault of the link with this name from `at_s` for `for_s`; it begins, or ends, with a reset
    of what is connected when `resets`."""

    link: str
    at_s: float
    for_s: float
    fault: Fault
    resets: bool = False


class BadLink:
    """Carries connections from `port` of the loopback to the port `target`, as its faults let it.

    `host` is where the target listens.
    """

    def __init__(self, target: int, seed: int = 0, host: str = "127.0.0.1") -> None:
        self.target, self.host = target, host
        self.port = 0
        self.accepted = self.resets = self.bytes = 0
        """How many connections were begun, how many were reset, and what was carried."""
        self._seed = seed
        self._faults: dict[object, Fault] = {}
        self._begun = itertools.count(1)
        self._open: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """End what is connected; nobody is listened to any more."""
        assert self._server is not None
        self._server.close()
        self.reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- faults ------------------------------------------------------------------------------

    def begin(self, fault: Fault) -> Callable[[], None]:
        """Let this be wrong besides all that is so already; what is returned ends it."""
        key = object()
        self._faults[key] = fault
        self._wake()

        def end() -> None:
            if self._faults.pop(key, None) is not None:
                self._wake()

        return end

    @contextmanager
    def having(self, *faults: Fault) -> Iterator[None]:
        """Let these be wrong for as long as the context lasts."""
        ends = [self.begin(fault) for fault in faults]
        try:
            yield
        finally:
            for end in ends:
                end()

    def heal(self) -> None:
        """Nothing is wrong any more."""
        self._faults.clear()
        self._wake()

    def reset(self) -> int:
        """End all connections at once, with what is on the way; how many there were."""
        ended = list(self._open)
        for connection in ended:
            connection.abort()
        self.resets += len(ended)
        return len(ended)

    async def flap(self, times: int, up_s: float, down_s: float) -> None:
        """Be away and back again, so many times; each time what is connected is reset."""
        for _ in range(times):
            self.reset()
            with self.having(PARTITION):
                await asyncio.sleep(down_s)
            self.reset()  # who began to connect meanwhile begins anew
            await asyncio.sleep(up_s)

    async def storm(self, times: int, every_s: float) -> None:
        """Reset what is connected again and again."""
        for _ in range(times):
            self.reset()
            await asyncio.sleep(every_s)

    def on(self, way: Way) -> Fault:
        """All that is wrong with one way now."""
        together = Fault(ways=(way,))
        for fault in self._faults.values():
            if way in fault.ways:
                together = replace(
                    together,
                    delay_s=together.delay_s + fault.delay_s,
                    jitter_s=together.jitter_s + fault.jitter_s,
                    loss=1.0 - (1.0 - together.loss) * (1.0 - fault.loss),
                    is_silent=together.is_silent or fault.is_silent,
                )
        return together

    @property
    def rto_s(self) -> float:
        """How long a sender waits before it sends a segment again."""
        return max(RTO_S, 2.0 * sum(self.on(way).delay_s for way in WAYS))

    # -- what it carries -----------------------------------------------------------------------

    def _wake(self) -> None:
        for connection in self._open:
            connection.wake()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        number = next(self._begun)
        try:
            far_reader, far_writer = await asyncio.open_connection(self.host, self.target)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, (writer, far_writer), f"{self._seed}/{number}")
        self._open.add(connection)
        ends = {"there": (reader, far_writer), "back": (far_reader, writer)}
        for way in WAYS:
            task = asyncio.create_task(connection.carry(way, *ends[way]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def ended(self, connection: _Connection) -> None:
        self._open.discard(connection)


class _Connection:
    """One connection through a link."""

    def __init__(
        self,
        link: BadLink,
        ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        seed: str,
    ) -> None:
        self._link, self._ends = link, ends
        self._draws = {way: random.Random(f"{seed}/{way}") for way in WAYS}
        self._changed = asyncio.Event()
        self._untold: dict[Way, int] = dict.fromkeys(WAYS, 0)

    def abort(self) -> None:
        for end in self._ends:
            end.transport.abort()
        self._link.ended(self)

    def wake(self) -> None:
        """Something about the line has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def carry(
        self, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Carry what comes at one end to the other until either ends."""
        waiting: deque[tuple[float, bytes]] = deque()
        come, gone = asyncio.Event(), asyncio.Event()
        reading = asyncio.create_task(self._read(way, source, waiting, come, gone))
        try:
            with suppress(OSError):
                while True:
                    while not waiting:
                        if reading.done():
                            return
                        come.clear()
                        await come.wait()
                    sent_s, segment = waiting[0]
                    await self._pass(way, sent_s)
                    sink.write(segment)
                    await sink.drain()
                    self._link.bytes += len(segment)
                    waiting.popleft()
                    gone.set()
        finally:
            reading.cancel()
            self.abort()

    async def _read(
        self,
        way: Way,
        source: asyncio.StreamReader,
        waiting: deque[tuple[float, bytes]],
        come: asyncio.Event,
        gone: asyncio.Event,
    ) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while chunk := await source.read(65536):
                now_s = loop.time()
                for start in range(0, len(chunk), SEGMENT_BYTES):
                    waiting.append((now_s, chunk[start : start + SEGMENT_BYTES]))
                come.set()
                while sum(len(segment) for _, segment in waiting) > HELD_BYTES:
                    gone.clear()
                    await gone.wait()
        come.set()

    async def _pass(self, way: Way, sent_s: float) -> None:
        """Wait until a segment that was sent at `sent_s` comes through."""
        loop, draw = asyncio.get_running_loop(), self._draws[way]
        link, other = self._link, WAYS[1 - WAYS.index(way)]
        fault = link.on(way)
        due_s = sent_s + fault.delay_s + draw.uniform(0.0, fault.jitter_s)
        lost = 0
        while fault.loss and draw.random() < fault.loss:
            lost += 1
        if lost:
            # it is sent anew from when it is its turn, for one segment is recovered at a time
            due_s = max(due_s, loop.time()) + min(link.rto_s * (2**lost - 1), MOST_RTO_S)
        if due_s > loop.time():
            await asyncio.sleep(due_s - loop.time())
        if not link.on(other).is_silent:
            self._untold[way] = 0
        self._untold[way] += 1
        while self._is_stuck(way, other):
            began_s = loop.time()
            while self._is_stuck(way, other):
                await self._changed.wait()
            self._untold[way] = 1
            await asyncio.sleep(_until_again(link.rto_s, loop.time() - began_s))

    def _is_stuck(self, way: Way, other: Way) -> bool:
        if self._link.on(way).is_silent:
            return True
        return self._link.on(other).is_silent and self._untold[way] > UNTOLD_SEGMENTS


def _until_again(rto_s: float, away_s: float) -> float:
    """How long after an absence a segment is sent again that was first sent at its beginning."""
    at_s, wait_s = 0.0, rto_s
    while at_s < away_s:
        at_s += wait_s
        wait_s = min(2.0 * wait_s, MOST_RTO_S)
    return at_s - away_s


async def play(links: dict[str, BadLink], spells: Sequence[Spell]) -> None:
    """Let spells come and go over some links, from now on; ends after the last of them."""

    async def one(spell: Spell) -> None:
        link = links[spell.link]
        await asyncio.sleep(spell.at_s)
        if spell.resets:
            link.reset()
        with link.having(spell.fault):
            await asyncio.sleep(spell.for_s)
        if spell.resets:
            link.reset()

    async with asyncio.TaskGroup() as group:
        for spell in spells:
            group.create_task(one(spell))


@asynccontextmanager
async def bad_link(address: str, seed: int = 0) -> AsyncIterator[BadLink]:
    """A link to `host:port` for as long as the context lasts."""
    host, _, port = address.rpartition(":")
    link = BadLink(int(port), seed, host)
    await link.start()
    try:
        yield link
    finally:
        await link.stop()
