"""Kills who brings a bundle to four twins, after every message: `python -m tests.kills`.

The twins are processes of their own, their runs go on all the while. The coordinator is a process
that is killed (SIGKILL) after a record, after a message has left, or after an answer has come, one
after the other; in half of the cases it is started again with its journal, and in some of these it
is killed once more. When the window of the bundle is over, it is in force at all four twins or at
none, by their desks and by what their models publish. One JSON line says how often it was not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from federation.control.actuation import (
    Event,
    FileJournal,
    Hands,
    Seat,
    Task,
    carry_out,
    take_up,
    unfinished,
)
from federation.core.bundle import bundle_of
from federation.loop import run
from federation.twin import SECOND_NS, StepInput
from federation.wire.credentials import Identity
from federation.wire.link import Link, LinkSession
from federation.wire.orders import Hand
from tests.waterworks import EPOCH, RUN, SAFE, bundle

NAMES = ("east", "north", "south", "west")
STEP_S = 0.005
"""Wall time per second of the run."""

WINDOW_S = 60
"""The bundle's window, in seconds of the run; some 0.4 s of wall time."""

ASK_S = 0.3
"""What a member in doubt may take to ask its arbiter, wall time; much more than it needs."""

LEFT_S = 0.002
"""After this a message has left."""

POINTS = 36
"""Where a coordinator is killed: a bundle has 5 records, and 16 messages with their answers."""

STRIDE = 7
"""From one point to the next that is tried, so that few kills see every stage too."""

PATIENCE_S = 20.0

_ADDRESS = re.compile(r"(?<= at )[\d.]+:\d+")


# -- the coordinator: a process that forks one that is to be killed ------------------------


class _Fuse:
    """Kills this process at its n-th spark."""

    def __init__(self, at: int) -> None:
        self._left = at

    def spark(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class _FusedJournal(FileJournal):
    def __init__(self, file: Path, fuse: _Fuse) -> None:
        super().__init__(file)
        self._fuse = fuse

    def append(self, record: Mapping[str, Any]) -> None:
        super().append(record)
        self._fuse.spark()


class _FusedHands(Hands):
    def __init__(self, task: Task, identity: Identity, fuse: _Fuse) -> None:
        super().__init__(task, identity)
        self._fuse = fuse

    async def ask(self, what: str, member: str) -> Event:
        asking = asyncio.ensure_future(super().ask(what, member))
        await asyncio.sleep(LEFT_S)
        self._fuse.spark()
        answer = await asking
        self._fuse.spark()
        return answer


def _coordinate(order: Mapping[str, Any]) -> None:
    """Carry a bundle out, or go on where the journal ends."""
    identity = Identity.load("guard-1", Path(order["key"]))
    fuse = _Fuse(order["kill_at"])
    journal = _FusedJournal(Path(order["journal"]), fuse)

    async def work() -> None:
        def hands(task: Task, who: Identity) -> Hands:
            return _FusedHands(task, who, fuse)

        if order["is_again"]:
            await take_up(journal, identity, within_s=PATIENCE_S, messengers=hands)
            return
        seats = {name: Seat(**seat) for name, seat in order["seats"].items()}
        task = Task(bundle_of(order["bundle"]), seats, WINDOW_S * SECOND_NS)
        await carry_out(task, identity, journal, within_s=PATIENCE_S, messengers=hands)

    asyncio.run(work())


def _coordinators() -> None:
    """Per line on standard input a coordinator; says how each has ended.

    It forks after everything is imported and before gRPC has begun, which takes milliseconds.
    """
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            try:
                _coordinate(json.loads(line))
            except BaseException as error:
                print(f"the coordinator failed: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


# -- the harness ---------------------------------------------------------------------------


@dataclass(eq=False)
class _Site:
    """One twin process, with the session that the harness drives."""

    name: str
    address: str
    run: str
    session: LinkSession
    now_s: int = -1
    speed: float = SAFE

    async def go(self) -> None:
        self.now_s += 1
        (result,) = await self.session.advance([StepInput(self.now_s * SECOND_NS)])
        self.speed = float(result.outputs["speed_now"][0])


@dataclass
class Tally:
    """What came of it."""

    kills: int = 0
    half_applied: int = 0
    committed: int = 0
    compensated: int = 0
    restarts: int = 0
    unended: int = 0
    """Journals that were left open by a coordinator that was started again."""
    half: list[str] = field(default_factory=list)
    wall_s: float = 0.0


async def kill(count: int, lanes: int = 1) -> Tally:
    """Kill coordinators until so many have been; `lanes` at a time, each in a run of its own."""
    began_s = time.perf_counter()
    tally = Tally()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        guard = Identity.generate("guard-1")
        guard.save(folder / "guard.pem")
        (folder / "keyring.yaml").write_text(
            f"identities: [{{name: guard-1, public_key: {guard.public_key}, roles: [guard], "
            "domains: ['*']}]\n"
        )
        links = [await stack.enter_async_context(_link(name, folder)) for name in NAMES]
        hands = {
            link.name: await stack.enter_async_context(Hand(link.address, guard)) for link in links
        }
        numbers = itertools.count()

        async def lane(place: int) -> None:
            """Bundle after bundle at four sessions, which go on meanwhile."""
            run = f"{RUN}-lane-{place}"
            async with _nursery(sys.executable, "-m", "tests.kills", "--coordinators") as nursery:
                assert await _heard(nursery) == "ready"
                sites = []
                for link in links:
                    session = await link.session(link.name, 1, {}, EPOCH, run=run)
                    sites.append(_Site(link.name, link.address, run, session))
                    await sites[-1].go()
                going = [asyncio.create_task(_go_on(site)) for site in sites]
                try:
                    while tally.kills < count:
                        number = next(numbers)
                        await _one(number, folder, nursery, sites, hands, tally)
                        for task in going:
                            if task.done():
                                task.result()
                        if number % 20 == 19:
                            far = (
                                f"  {tally.kills}/{count} kills, {tally.half_applied} half applied"
                            )
                            print(far, file=sys.stderr, flush=True)
                finally:
                    for task in going:
                        task.cancel()
                    await asyncio.gather(*going, return_exceptions=True)

        await asyncio.gather(*map(lane, range(lanes)))
    tally.wall_s = time.perf_counter() - began_s
    return tally


async def _go_on(site: _Site) -> None:
    while True:
        await site.go()
        await asyncio.sleep(STEP_S)


async def _one(
    number: int,
    folder: Path,
    nursery: asyncio.subprocess.Process,
    sites: list[_Site],
    hands: Mapping[str, Hand],
    tally: Tally,
) -> None:
    """One bundle, whose coordinator is killed at a point of its own."""
    journal = folder / f"journal-{number}"
    speeds = {name: 2.0 + (number + i) % 8 for i, name in enumerate(NAMES)}
    what = replace(bundle(f"b{number}", speeds, expires_s=1 << 30), run=sites[0].run)
    seats = {site.name: {"address": site.address, "epoch": EPOCH} for site in sites}
    order = {
        "key": str(folder / "guard.pem"),
        "journal": str(journal),
        "bundle": asdict(what),
        "seats": seats,
        "kill_at": 1 + number * STRIDE % POINTS,
        "is_again": False,
    }
    code = await _run(nursery, order)
    is_killed = code == -signal.SIGKILL
    comes_back = (number + number // POINTS) % 2 == 1
    if is_killed:
        tally.kills += 1
        if comes_back:
            # once more in the midst of it, then to the end
            for kill_at in ((1 + number % 7,) if number % 3 == 0 else ()) + (0,):
                tally.restarts += 1
                code = await _run(nursery, {**order, "kill_at": kill_at, "is_again": True})
                tally.kills += code == -signal.SIGKILL
            tally.unended += bool(unfinished(FileJournal(journal).records()))
    elif code:
        raise RuntimeError(f"a coordinator ended with {code}")
    until_s = max(site.now_s for site in sites) + WINDOW_S + 2
    while min(site.now_s for site in sites) < until_s:
        await asyncio.sleep(STEP_S)
    await asyncio.sleep(ASK_S)
    applied: dict[str, bool] = {}
    for site in sites:
        desks = (await hands[site.name].look()).desks
        (desk,) = [desk for desk in desks if desk.run == site.run]
        held = {each.bundle: each.value for each in desk.in_force}
        applied[site.name] = held == {what.id: speeds[site.name]}
        model = speeds[site.name] if applied[site.name] else SAFE
        if site.speed != model:
            raise RuntimeError(f"{site.name} runs at {site.speed} and its desk says {model}")
    if len(set(applied.values())) > 1:
        tally.half_applied += 1
        tally.half.append(f"{what.id} killed at {order['kill_at']}: {applied}")
    elif all(applied.values()):
        tally.committed += 1
    else:
        tally.compensated += 1
    for site in sites:
        await hands[site.name].release(site.run, site.name, what.id, request=f"clean-{number}")
    while any(site.speed != SAFE for site in sites):
        await asyncio.sleep(STEP_S)


async def _run(nursery: asyncio.subprocess.Process, order: Mapping[str, Any]) -> int:
    assert nursery.stdin is not None
    nursery.stdin.write(json.dumps(order).encode() + b"\n")
    await nursery.stdin.drain()
    return int(await _heard(nursery))


async def _heard(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(3 * PATIENCE_S):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the process that starts coordinators has ended")
    return json.loads(line)


@asynccontextmanager
async def _nursery(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def process(*argv: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A `multitwin` command that serves, in a process of its own; where it listens."""
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "federation", *argv), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert started.stderr is not None
        async with asyncio.timeout(60):
            while not (address := _ADDRESS.search((await started.stderr.readline()).decode())):
                if started.stderr.at_eof():
                    raise RuntimeError(f"{' '.join(argv)} did not come up")
        yield address[0], started
    finally:
        if started.returncode is None:
            started.terminate()
        await started.wait()


@asynccontextmanager
async def serving_process(
    name: str, *more: str
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    async with process("serve", "tests.waterworks:Pump", "--name", name, *more) as found:
        yield found


@asynccontextmanager
async def _link(name: str, folder: Path) -> AsyncIterator[Link]:
    keyring = str(folder / "keyring.yaml")
    async with (
        serving_process(name, "--keyring", keyring) as (address, _),
        await Link.connect(address, name) as link,
    ):
        yield link


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--kills", type=int, default=200, metavar="N", help="(200)")
    options.add_argument("--lanes", type=int, default=4, metavar="N", help="at a time (4)")
    options.add_argument("--coordinators", action="store_true", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.coordinators:
        _coordinators()
        return 0
    tally = run(kill(asked.kills, asked.lanes))
    for line in tally.half:
        print(line, file=sys.stderr)
    plain = {k: v for k, v in vars(tally).items() if k != "half"}
    print(json.dumps({**plain, "wall_s": round(tally.wall_s, 1)}))
    return bool(tally.half_applied or tally.unended)


if __name__ == "__main__":
    sys.exit(main())
