"""A TCP proxy between broker and member that ill-treats the bytes it carries, when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

Way = Literal["up", "down"]
"""Up: from the member to the broker, as answers go. Down: from the broker to the member."""

How = Literal["truncate", "lose", "twice", "stall", "trickle"]

SMALLEST_FRAME = 48
"""Chunks below this are HTTP/2's own bookkeeping; what is aimed at frames waits for more."""


@dataclass(frozen=True)
class Blow:
    """What happens to the next chunk that carries a frame, one way.

    `truncate` lets half of it pass and ends the connection, `lose` ends it before any of it has,
    `twice` lets it pass two times, `stall` lets nothing pass for a while, `trickle` lets its bytes
    pass a few at a time.
    """

    how: How
    way: Way
    seconds: float = 0.0


class Proxy:
    """Listens at `port` of every loopback address and forwards to the port `target`."""

    def __init__(self, target: int, on_blow: Callable[[Blow], None]) -> None:
        self.target = target
        self.port = 0
        self._on_blow = on_blow
        self._blows: dict[Way, list[Blow]] = {"up": [], "down": []}
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "0.0.0.0", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def strike(self, blow: Blow) -> None:
        self._blows[blow.way].append(blow)

    def calm(self) -> None:
        """Forget the blows that nothing has met."""
        for blows in self._blows.values():
            blows.clear()

    def cut(self) -> int:
        """Reset all connections; how many there were."""
        ends = list(self._open)
        for end in ends:
            end.transport.abort()
        return len(ends) // 2

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not writer.get_extra_info("peername")[0].startswith("127."):
            writer.transport.abort()  # nobody from outside has business here
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._open.update(pair)
        for carrying in (
            self._carry("down", reader, far_writer, pair),
            self._carry("up", far_reader, writer, pair),
        ):
            task = asyncio.create_task(carrying)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(
        self,
        way: Way,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                blow = None
                if self._blows[way] and len(chunk) >= SMALLEST_FRAME:
                    blow = self._blows[way].pop(0)
                    self._on_blow(blow)
                match blow and blow.how:
                    case "truncate":
                        sink.write(chunk[: len(chunk) // 2])
                        with suppress(OSError):
                            await sink.drain()
                        # a moment, so that the half is read before the end is seen
                        await asyncio.sleep(0.005)
                        break
                    case "lose":
                        break
                    case "twice":
                        sink.write(chunk + chunk)
                    case "stall":
                        assert blow is not None
                        await asyncio.sleep(blow.seconds)
                        sink.write(chunk)
                    case "trickle":
                        for start in range(0, len(chunk), 7):
                            sink.write(chunk[start : start + 7])
                            await asyncio.sleep(0.001)
                    case _:
                        sink.write(chunk)
                await sink.drain()
        for end in pair:
            end.transport.abort()
            self._open.discard(end)
