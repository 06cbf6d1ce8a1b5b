"""A broker and its members as real processes, played through a plan under the eyes of a reader."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc

from federation.broker.home import substitute_of
from federation.core.ledger import ActionRecord, Entry
from federation.core.messages import Ordered
from federation.errors import Reason
from federation.twin import Action
from federation.v1 import (
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
)
from federation.wire import codec, status
from tests.chaos import world
from tests.chaos.faults import (
    BROKER,
    WATCHER,
    Cue,
    Cut,
    Degraded,
    Failed,
    FillDisk,
    Kill,
    Late,
    Meddle,
    Misplay,
    MoveClock,
    Obeyed,
    Order,
    OutOfSpace,
    Pause,
    Plan,
    SpoilStore,
    Strike,
    TearLog,
    Undisturbed,
)
from tests.chaos.meddler import Meddler
from tests.chaos.nursery import set_clock
from tests.chaos.proxy import Blow, Proxy
from tests.chaos.world import MEMBERS

READY_S = 30.0
PACE_S = 0.01
"""What every step takes at least, so that a run is told while it goes on."""

RETRY_S = 0.03

FULL_AT_BYTES = 12_388
"""No file may be written beyond this when the disk is full: in the middle of a page, and before
what any run writes to its log."""

Run = scenario_pb2.Run


class Process:
    """A process of the nursery's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.there: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def send(self, number: signal.Signals) -> bool:
        """Send a signal while the process is known to be ours; whether it was."""
        if not self.pid or self.ended.done():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    async def kill(self) -> bool:
        """SIGKILL, and wait until it has gone; whether that is what ended it."""
        async with asyncio.timeout(READY_S):
            await asyncio.shield(self.there)
            self.send(signal.SIGCONT)
            killed = self.send(signal.SIGKILL)
            code = await asyncio.shield(self.ended)
        return killed and code == -signal.SIGKILL


class Nursery:
    """The process that forks all others."""

    def __init__(self) -> None:
        self._by_id: dict[int, Process] = {}
        self._by_pid: dict[int, Process] = {}
        self._serial = 0

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.nursery"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(READY_S):
                await self._process.stdout.readline()
        except BaseException:
            self._process.kill()
            await self._process.wait()
            raise
        self._reader = asyncio.create_task(self._read(self._process.stdout))

    async def stop(self) -> None:
        """End the nursery; the kernel ends what it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5.0)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.wait([self._reader], timeout=5.0)
        self._reader.cancel()

    def spawn(
        self, name: str, argv: list[str], log: Path, clock: Path, env: Mapping[str, str]
    ) -> Process:
        assert self._process.stdin is not None
        self._serial += 1
        process = self._by_id[self._serial] = Process(name)
        order = {"id": self._serial, "argv": argv, "log": str(log), "clock": str(clock)}
        self._process.stdin.write(json.dumps({**order, "env": dict(env)}).encode() + b"\n")
        return process

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            said = json.loads(line)
            if "id" in said:
                process = self._by_id.pop(said["id"])
                process.pid = said["pid"]
                self._by_pid[process.pid] = process
                process.there.set_result(process.pid)
            else:
                self._by_pid.pop(said["pid"]).ended.set_result(said["code"])


@dataclass
class Told:
    """What a reader of a run has been told, in every life of the broker."""

    name: str = ""
    entries: dict[tuple[object, ...], bytes] = field(default_factory=dict)
    cursor: str = ""
    messages: int = 0
    opened_at: int = 0
    """How many entries there were when the reader was last given all that holds."""
    settled_ns: int = -1
    orders: dict[str, int] = field(default_factory=dict)
    """Accepted orders: the event of each, and when it takes effect."""
    contradictions: list[str] = field(default_factory=list)
    is_dated: bool = True
    """Whether an entry must also keep the time at which it was received. A log of which the end
    is torn off is made up from the members again, at another time."""

    def says(self, entry: broker_pb2.LedgerEntry) -> bytes:
        return entry.SerializeToString(deterministic=True) if self.is_dated else _said(entry)

    def take(self, answer: broker_pb2.WatchResponse) -> None:
        self.messages += 1
        self.cursor = answer.cursor
        if answer.snapshot:
            self.opened_at = int(answer.cursor.rpartition(":")[2])
        self.settled_ns = max(self.settled_ns, answer.time_ns)
        for entry in answer.entries:
            key, said = _key(entry), self.says(entry)
            before = self.entries.setdefault(key, said)
            if before != said:
                self.contradictions.append(f"{key} was told twice, and otherwise")


@dataclass
class Verdict:
    """How a run ended, against what its plan says."""

    plan: str
    seed: int
    kind: str = "bad"
    """`undisturbed`, `declared`, or `bad`."""
    faults: int = 0
    unfired: int = 0
    lost: int = 0
    is_hung: bool = False
    wall_s: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Take:
    """One attempt at a plan."""

    number: int
    plan: Plan
    left: dict[tuple[str, int, str], list[tuple[Cue, int]]]
    fired: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    told: Told = field(default_factory=Told)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the take is over: nobody is kept waiting."""
    work: set[asyncio.Future[Any]] = field(default_factory=set)
    clocks: list[tuple[str, int]] = field(default_factory=list)


class Stage:
    """A broker with its store, the members behind their proxies, and the prompter."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder = folder
        self.store = folder / "broker.sqlite"
        self.port = _free_port()
        self.processes: dict[str, Process] = {}
        self.proxies: dict[str, Proxy] = {}
        self.meddlers: dict[str, Meddler] = {}
        self.ports = {name: _free_port() for name in (*MEMBERS, *map(substitute_of, world.SPARES))}
        self._nursery = nursery
        self._env = {world.PROMPTER: str(folder / "prompter")}
        self.addresses = {
            substitute_of(n): f"127.0.0.1:{self.ports[substitute_of(n)]}" for n in world.SPARES
        }
        """Where each registers, in its present life."""
        self._lives = 0
        self._takes = 0
        self._take: Take | None = None

    # -- up and down -------------------------------------------------------------------

    async def start(self) -> None:
        self.folder.mkdir(parents=True)
        self._prompter = await asyncio.start_unix_server(self._prompt, self._env[world.PROMPTER])
        for name in MEMBERS:
            proxy = self.proxies[name] = Proxy(self.ports[name], self._saw_blow)
            await proxy.start()
            meddler = self.meddlers[name] = Meddler(proxy.port, self._saw_meddling)  # type: ignore[abstract]
            await meddler.start()
        self._channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{self.port}",
            options=[
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 100),
            ],
        )
        self._broker: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(self._channel)
        self._scenarios: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(
            self._channel
        )
        self._control: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(
            self._channel
        )
        await self.reset()

    async def stop(self) -> None:
        for process in self.processes.values():
            with suppress(TimeoutError):
                await process.kill()
        await self._channel.close()
        for meddler in self.meddlers.values():
            await meddler.stop()
        for proxy in self.proxies.values():
            await proxy.stop()
        self._prompter.close()

    def _begin(self, name: str) -> None:
        """Start a process; it goes by this name from now on."""
        clock = self.folder / f"{name}.clock"
        if not clock.exists():
            set_clock(clock, 0)
        if name == BROKER:
            argv = ["chaos-broker", str(self.store), str(self.port)]
        else:
            player = world.CLASSES.get(name) or _SUBSTITUTES[name]
            argv = ["serve", f"tests.chaos.world:{player.__name__}", "--name", name]
            argv += ["--port", str(self.ports[name]), "--broker", f"127.0.0.1:{self.port}"]
            if name in MEMBERS:
                # every life has an address of its own, all of them the proxy's
                self._lives += 1
                address = f"127.1.{self._lives // 250}.{self._lives % 250 + 1}"
                self.addresses[name] = f"{address}:{self.proxies[name].port}"
                argv += ["--advertise", self.addresses[name]]
        self.processes[name] = self._nursery.spawn(
            name, argv, self.folder / f"{name}.log", clock, self._env
        )

    async def reset(self) -> None:
        """Bring everything into the state that a take begins in."""
        for name in MEMBERS:
            self.proxies[name].calm()
            self.meddlers[name].calm()
        for name in (BROKER, *self.ports):
            set_clock(self.folder / f"{name}.clock", 0)
            process = self.processes.get(name)
            if process is None or process.ended.done():
                self._begin(name)
        self._free_disk()
        found: dict[str, str] = {}
        try:
            async with asyncio.timeout(READY_S):
                while found != self.addresses:
                    with suppress(grpc.aio.AioRpcError):
                        found = await self._members()
                    await asyncio.sleep(0.05)
        except TimeoutError:
            away = {name for name in self.addresses if found.get(name) != self.addresses[name]}
            said = [(self.folder / f"{n}.log").read_text()[-300:] for n in (BROKER, *away)]
            raise RuntimeError(f"{', '.join(sorted(away))} did not come up: {said}") from None

    # -- a take ------------------------------------------------------------------------

    async def play(self, plan: Plan, seed: int) -> Verdict:
        """Ask for a run, let happen to it what the plan says, and judge how it ended."""
        began_s = time.monotonic()
        self._takes += 1
        left: dict[tuple[str, int, str], list[tuple[Cue, int]]] = {}
        for cue in plan.cues:
            left.setdefault((cue.member, cue.step, cue.at), []).append((cue, cue.times))
        take = self._take = Take(self._takes, plan, left)
        take.told.is_dated = not any(isinstance(cue.fault, TearLog) for cue in plan.cues)
        verdict = Verdict(plan.name, seed)
        try:
            async with asyncio.timeout(plan.bound_s):
                run = await self._run(take, seed)
                if isinstance(plan.end, OutOfSpace):
                    run = await self._after_space(take, run, seed)
                take.release.set()
                while take.work:
                    await asyncio.wait(take.work)
                whole = await self._whole(take)
        except TimeoutError:
            verdict.is_hung = True
            verdict.problems.append(f"no end within {plan.bound_s:g} s; told {take.told.messages}")
            with suppress(TimeoutError, grpc.aio.AioRpcError):
                async with asyncio.timeout(5):
                    run = await self._get(take.told.name)
                    verdict.problems.append(f"it is at {run.time_ns} ns: {run.state} {run.error}")
            for name in (BROKER, *MEMBERS):
                await self.processes[name].kill()
        except grpc.aio.AioRpcError as error:
            verdict.problems.append(f"a call ended with {error.code()}: {error.details()}")
        else:
            self._judge(verdict, take, run, whole, seed)
        take.release.set()
        for task in take.work:
            task.cancel()
        await asyncio.gather(*take.work, return_exceptions=True)
        verdict.faults = len(take.fired)
        verdict.unfired = len(plan.cues) - len(take.fired)
        verdict.wall_s = time.monotonic() - began_s
        self._take = None
        await self.reset()
        return verdict

    async def _members(self) -> dict[str, str]:
        """Who is registered, and where."""
        request = broker_pb2.ListMembersRequest()
        answer = await self._broker.ListMembers(request, timeout=2)
        return {member.name: member.address for member in answer.members}

    def _document(self, take: Take) -> str:
        members: dict[str, dict[str, Any]] = {}
        for name in MEMBERS:
            policy = dict(take.plan.policies.get(name, {"do": "fail"}))
            if policy["do"] == "substitute":
                player = world.SPARES[name].__name__
                policy["substitute"] = {"class": f"tests.chaos.world:{player}"}
            said: dict[str, Any] = {"on_failure": policy}
            match take.plan.route:
                case "address":
                    said["address"] = f"127.0.0.1:{self.proxies[name].port}"
                case "meddler":
                    said["address"] = f"127.0.0.1:{self.meddlers[name].port}"
            members[name] = said
        return world.document(members, take.number)

    async def _run(self, take: Take, seed: int) -> Run:
        request = scenario_pb2.CreateRunRequest(document=self._document(take), seed=seed)
        created = await self._until_told(lambda: self._scenarios.CreateRun(request, timeout=20))
        take.told.name = created.run.name
        return await self._attend(take)

    async def _attend(self, take: Take) -> Run:
        """Read the run's ledger until it ends; what it is then."""
        watching = asyncio.create_task(self._watch(take))
        try:
            return await self._follow(take)
        finally:
            # the last entries are told before the stream ends by itself
            await asyncio.wait([watching], timeout=5.0)
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def _until_told(self, call: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AWAY:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _get(self, name: str) -> Run:
        request = scenario_pb2.GetRunRequest(name=name)
        answer = await self._until_told(lambda: self._scenarios.GetRun(request, timeout=5))
        run: Run = answer.run
        return run

    async def _follow(self, take: Take) -> Run:
        request = scenario_pb2.WatchRunRequest(name=take.told.name)
        while True:
            with _away():
                async for answer in self._scenarios.WatchRun(request):
                    take.told.settled_ns = max(take.told.settled_ns, answer.run.time_ns)
                    if answer.run.state in _OVER:
                        return answer.run
            await asyncio.sleep(RETRY_S)

    async def _watch(self, take: Take) -> None:
        while True:
            request = broker_pb2.WatchRequest(run=take.told.name, cursor=take.told.cursor)
            with _away():
                async for answer in self._broker.Watch(request):
                    take.told.take(answer)
                    await self._act(take, (WATCHER, take.told.messages, "begin"))
                if (await self._get(take.told.name)).state in _OVER:
                    return
            await asyncio.sleep(RETRY_S)

    async def _whole(self, take: Take) -> list[broker_pb2.LedgerEntry]:
        """The ledger as the broker gives it to somebody who asks for all of it."""
        if not take.told.cursor:
            return []
        cursor = take.told.cursor.rpartition(":")[0] + ":0"
        while True:
            found: list[broker_pb2.LedgerEntry] = []
            with _away():
                request = broker_pb2.WatchRequest(run=take.told.name, cursor=cursor)
                async for answer in self._broker.Watch(request):
                    found.extend(answer.entries)
                return found
            await asyncio.sleep(RETRY_S)

    async def _after_space(self, take: Take, run: Run, seed: int) -> Run:
        """What becomes of a run that failed on a full disk, with space and in a new life."""
        if run.state != Run.STATE_FAILED or run.error.reason != Reason.STORE_FAILED:
            take.problems.append(f"on a full disk it ended as {_ended(run)}")
        self._free_disk()
        another = Take(0, take.plan, {})
        end = await self._run(another, seed)
        take.problems += _differs(end, await self._whole(another), _reference(seed))
        await self.processes[BROKER].kill()
        self._begin(BROKER)
        return await self._attend(take)

    # -- faults ------------------------------------------------------------------------

    async def _prompt(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            while line := await reader.readline():
                question = json.loads(line)
                take, answer = self._take, ""
                if take is not None and question["take"] == take.number:
                    self._see_clock(take, question)
                    if question["at"] == "begin":
                        await asyncio.sleep(PACE_S)
                    key = (question["member"], question["step"], question["at"])
                    answer = await self._act(take, key)
                writer.write(answer.encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _act(self, take: Take, key: tuple[str, int, str]) -> str:
        """Carry out what is due at this cue; what the twin that asked has to do."""
        due, later = take.left.get(key, []), []
        if not due:
            return ""
        answer = ""
        for cue, times in due:
            if times > 1:
                later.append((cue, times - 1))
        take.left[key] = later
        for cue, _ in due:
            # what has begun is ended, also when nobody waits for it any more
            happening = asyncio.ensure_future(self._happen(take, cue))
            take.work.add(happening)
            happening.add_done_callback(take.work.discard)
            answer = await asyncio.shield(happening) or answer
        return answer

    async def _happen(self, take: Take, cue: Cue) -> str:
        fault = cue.fault
        what = f"{cue.member} {cue.step} {cue.at}: {fault}"
        match fault:
            case Kill(whom, returns):
                if await self.processes[whom].kill():
                    take.fired.append(what)
                if returns:
                    self._begin(whom)
            case Pause(whom, seconds):
                process = self.processes[whom]
                if process.send(signal.SIGSTOP):
                    take.fired.append(what)
                    self._go(take, self._continue(process, seconds))
            case Misplay(how):
                take.fired.append(what)
                return how
            case Late(seconds):
                take.fired.append(what)
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await take.release.wait()
            case Cut(whom):
                if self.proxies[whom].cut():
                    take.fired.append(what)
            case Strike(whom, blow):
                self.proxies[whom].strike(blow)
            case Meddle(whom, meddling):
                self.meddlers[whom].meddle(meddling)
            case FillDisk():
                limits = (FULL_AT_BYTES, resource.RLIM_INFINITY)
                resource.prlimit(self.processes[BROKER].pid, resource.RLIMIT_FSIZE, limits)
                take.fired.append(what)
            case TearLog():
                await self._tear_log(take, what)
            case SpoilStore():
                await self._spoil_store(take, what)
            case MoveClock(whom, ahead_s):
                set_clock(self.folder / f"{whom}.clock", ahead_s)
                take.clocks.append((whom, ahead_s))
            case Order(entity, value):
                self._go(take, self._order(take, entity, value, what))
        return ""

    def _go(self, take: Take, work: Any) -> None:
        task: asyncio.Future[Any] = asyncio.ensure_future(work)
        take.work.add(task)
        task.add_done_callback(take.work.discard)

    async def _continue(self, process: Process, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send(signal.SIGCONT)

    async def _tear_log(self, take: Take, what: str) -> None:
        if not await self.processes[BROKER].kill():
            return
        log = Path(f"{self.store}-wal")
        size = log.stat().st_size if log.exists() else 0
        if size > 4096:
            os.truncate(log, size - 1500)  # in the middle of a page
            take.fired.append(what)
        self._begin(BROKER)

    async def _spoil_store(self, take: Take, what: str) -> None:
        if not await self.processes[BROKER].kill():
            return
        files = [Path(f"{self.store}{suffix}") for suffix in ("", "-wal", "-shm")]
        whole = {file: file.read_bytes() for file in files if file.exists()}
        for file in whole:
            file.unlink()
        self.store.write_bytes(b"\0spoilt" * 1000)
        self._begin(BROKER)
        async with asyncio.timeout(READY_S):
            code = await asyncio.shield(self.processes[BROKER].ended)
        said = (self.folder / "broker.log").read_text(encoding="utf-8").splitlines()[-1]
        if code == 2 and Reason.STORE_FAILED in said:
            take.fired.append(what)
        else:
            take.problems.append(f"with a spoilt store the broker ended with {code}: {said}")
        for file, data in whole.items():
            file.write_bytes(data)
        self._begin(BROKER)

    async def _order(self, take: Take, entity: str, value: float, what: str) -> None:
        action = codec.encode_action(Action("mill", "brake", entity, value))
        request = control_pb2.SubmitActionRequest(run=take.told.name, action=action, operator="Ann")
        try:
            answer = await self._control.SubmitAction(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _AWAY:
                take.problems.append(f"an order was refused: {status.from_rpc(error, 'broker')}")
            return
        take.told.orders[answer.event] = answer.time_ns
        if await self.processes[BROKER].kill():
            take.fired.append(what)
        self._begin(BROKER)

    def _saw_blow(self, blow: Blow) -> None:
        if self._take is not None:
            self._take.fired.append(f"{blow}")

    def _saw_meddling(self, meddling: Any, problem: str) -> None:
        if self._take is not None:
            self._take.fired.append(meddling.how)
            if problem:
                self._take.problems.append(problem)

    def _see_clock(self, take: Take, question: Mapping[str, Any]) -> None:
        """A jump has fired when a process asks with the time that it was moved to."""
        ahead_s = question["time"] - time.time()
        for whom, jump_s in take.clocks:
            if whom == question["member"] and abs(ahead_s - jump_s) < 100:
                take.clocks.remove((whom, jump_s))
                take.fired.append(f"{whom}: clock moved by {jump_s} s")
                break

    def _free_disk(self) -> None:
        broker = self.processes[BROKER]
        if broker.pid and not broker.ended.done():
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            with suppress(ProcessLookupError):
                resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, unlimited)

    # -- judgement ---------------------------------------------------------------------

    def _judge(
        self,
        verdict: Verdict,
        take: Take,
        run: Run,
        whole: list[broker_pb2.LedgerEntry],
        seed: int,
    ) -> None:
        told = take.told
        stored = {_key(entry): entry for entry in whole}
        missing = []
        for key, said in told.entries.items():
            found = stored.get(key)
            if found is None or told.says(found) != said:
                missing.append(f"{key} was told and is {'otherwise' if found else 'gone'}")
        for event, time_ns in told.orders.items():
            if not any(e.occurrence.event.id == event and e.time_ns == time_ns for e in whole):
                missing.append(f"the order {event} at {time_ns} ns was accepted and is gone")
        if run.time_ns < told.settled_ns:
            missing.append(f"it was settled at {told.settled_ns} ns and is now at {run.time_ns}")
        if run.state == Run.STATE_SUCCEEDED:
            later = whole[told.opened_at :]
            missing += [f"{_key(e)} was never told" for e in later if _key(e) not in told.entries]
        missing += told.contradictions
        verdict.lost = len(missing)
        problems = [*take.problems, *missing]
        self._see_receive_times(take, whole)
        match take.plan.end:
            case Undisturbed():
                problems += _differs(run, whole, _reference(seed))
                kind = "undisturbed"
            case OutOfSpace():
                problems += _differs(run, whole, _reference(seed))
                kind = "declared"
            case Failed(reasons, member):
                if run.state != Run.STATE_FAILED or run.error.reason not in reasons:
                    problems.append(f"it ended as {_ended(run)}, not with {', '.join(reasons)}")
                if member and run.error.metadata.get("member") != member:
                    problems.append(f"it blames {run.error.metadata.get('member')!r}: {run.error}")
                known = {_key(e): _said(e) for e in _reference(seed)[1]}
                problems += [
                    f"{_key(e)} is not as undisturbed"
                    for e in whole
                    if known.get(_key(e)) != _said(e)
                ]
                kind = "declared"
            case Degraded(member, quality):
                problems += _not_degraded(run, whole, seed, member, quality)
                kind = "declared"
            case Obeyed():
                problems += _differs(run, whole, _reference_with_orders(seed, whole))
                kind = "declared"
        verdict.problems += problems
        if not problems:
            verdict.kind = kind

    def _see_receive_times(self, take: Take, whole: list[broker_pb2.LedgerEntry]) -> None:
        """A jump of the broker's clock has fired when entries came at the time it was moved to."""
        for whom, jump_s in list(take.clocks):
            if whom == BROKER and any(
                abs(e.receive_time.ToSeconds() - time.time() - jump_s) < 100 for e in whole
            ):
                take.clocks.remove((whom, jump_s))
                take.fired.append(f"{whom}: clock moved by {jump_s} s")


_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
_OVER = (Run.STATE_SUCCEEDED, Run.STATE_FAILED, Run.STATE_CANCELLED)


class _away:  # noqa: N801 - reads as a statement
    """A broker that is away is asked again."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, grpc.aio.AioRpcError) and error.code() in _AWAY


_SUBSTITUTES = {substitute_of(name): player for name, player in world.SPARES.items()}


_ports = itertools.count(20_000 + os.getpid() % 10_000)
"""Below those that systems give to outgoing connections, so that one stays free for a restart."""


def _free_port() -> int:
    for port in _ports:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is always another number")


def _place(entry: broker_pb2.LedgerEntry) -> tuple[int, int, int]:
    return (entry.time_ns, entry.micro, entry.rank)


def _key(entry: broker_pb2.LedgerEntry) -> tuple[object, ...]:
    """Tells an entry from every other of its run."""
    match entry.WhichOneof("entry"):
        case "value":
            what: tuple[object, ...] = (entry.value.values.variable, entry.value.revision)
        case "occurrence":
            what = (entry.occurrence.event.id,)
        case _:
            action = entry.order.action
            what = (action.member, action.actuator, action.entity)
    return (*_place(entry), entry.member, *what)


def _said(entry: broker_pb2.LedgerEntry) -> bytes:
    """An entry without when it was received, and without what `via` says better; neither is part
    of the ledger."""
    bare = broker_pb2.LedgerEntry()
    bare.CopyFrom(entry)
    bare.ClearField("receive_time")
    if bare.HasField("occurrence"):
        bare.occurrence.event.ClearField("through")
    return bare.SerializeToString(deterministic=True)


def _ended(run: Run) -> str:
    return f"{Run.State.Name(run.state)} {run.error.reason} {run.error.message}".strip()


@lru_cache(maxsize=256)
def _reference(
    seed: int, member: str = "", key: str = "", from_ns: int = 0
) -> tuple[str, tuple[broker_pb2.LedgerEntry, ...]]:
    """The digest and the ledger of the run in one process."""
    outcome = world.reference(seed, {member: {key: from_ns}} if member else None)
    entries: list[Entry] = [*outcome.ledger, *outcome.events, *outcome.actions]
    entries.sort(key=lambda entry: entry.sort_key())
    return outcome.digest, tuple(map(codec.encode_entry, entries))


def _reference_with_orders(
    seed: int, whole: list[broker_pb2.LedgerEntry]
) -> tuple[str, tuple[broker_pb2.LedgerEntry, ...]]:
    """The run in one process with the orders that are in a ledger."""
    given = [codec.decode_entry(entry) for entry in whole if entry.member == "operator"]
    orders = [Ordered("Ann", e.action, e.time_ns) for e in given if isinstance(e, ActionRecord)]
    digest, entries = world.reference_with_orders(seed, orders)
    return digest, tuple(map(codec.encode_entry, entries))


def _differs(
    run: Run,
    whole: list[broker_pb2.LedgerEntry],
    reference: tuple[str, tuple[broker_pb2.LedgerEntry, ...]],
) -> list[str]:
    """Where a run is not as the reference."""
    digest, entries = reference
    if run.state != Run.STATE_SUCCEEDED:
        return [f"it ended as {_ended(run)}"]
    problems = [] if run.digest == digest else [f"its digest is {run.digest}, not {digest}"]
    if len(whole) != len(entries):
        problems.append(f"its ledger has {len(whole)} entries, not {len(entries)}")
    for mine, theirs in zip(whole, entries, strict=False):
        if _said(mine) != _said(theirs):
            problems.append(f"its ledger has {mine} where the undisturbed has {theirs}")
            break
    return problems


def _not_degraded(
    run: Run, whole: list[broker_pb2.LedgerEntry], seed: int, member: str, quality: str
) -> list[str]:
    """Where a run is not as one in which the member fell silent, or its spare took over."""
    if run.state != Run.STATE_SUCCEEDED:
        return [f"it ended as {_ended(run)}"]
    changes = [e for e in whole if e.member == "federation"]
    if [(e.occurrence.event.kind, e.occurrence.event.entity) for e in changes] != [
        (f"member_{quality}", member)
    ]:
        return [f"its changes of members are {changes}, not that {member} is {quality}"]
    from_ns = changes[0].time_ns
    if quality == "held":
        reference = _reference(seed, member, "mute_from_ns", from_ns)
        expected = [*reference[1], *changes, *_held(reference[1], member, from_ns)]
    else:
        mark = broker_pb2.LedgerEntry.QUALITY_SUBSTITUTED
        reference = _reference(seed, member, "spare_from_ns", from_ns)
        expected = [_marked(e, member, from_ns, mark) for e in (*reference[1], *changes)]
    wanted = {_key(e): _said(e) for e in expected}
    problems = [
        f"{_key(entry)} is not as with {member} {quality}: {entry}"
        for entry in whole
        if wanted.pop(_key(entry), None) != _said(entry)
    ]
    problems += [f"{key} is missing with {member} {quality}" for key in wanted]
    return problems[:5]


def _held(
    entries: tuple[broker_pb2.LedgerEntry, ...], member: str, from_ns: int
) -> list[broker_pb2.LedgerEntry]:
    """The last values of a member that has fallen silent, as they are recorded anew."""
    last: dict[str, broker_pb2.LedgerEntry] = {}
    for entry in entries:
        if entry.member == member and entry.HasField("value"):
            last[entry.value.values.variable] = entry
    held = []
    for entry in last.values():
        again = broker_pb2.LedgerEntry()
        again.CopyFrom(entry)
        again.time_ns, again.micro = from_ns, 0
        again.value.revision += 1
        again.value.quality = broker_pb2.LedgerEntry.QUALITY_HELD
        held.append(again)
    return held


def _marked(
    entry: broker_pb2.LedgerEntry,
    member: str,
    from_ns: int,
    mark: broker_pb2.LedgerEntry.Quality.ValueType,
) -> broker_pb2.LedgerEntry:
    """An entry as it is when values of a member have another quality from an instant on."""
    if entry.member != member or entry.time_ns < from_ns or not entry.HasField("value"):
        return entry
    marked = broker_pb2.LedgerEntry()
    marked.CopyFrom(entry)
    marked.value.quality = mark
    return marked


@asynccontextmanager
async def stages(folder: Path, count: int) -> AsyncIterator[list[Stage]]:
    """So many stages, each with processes of its own, which end with the context."""
    nursery = Nursery()
    await nursery.start()
    found = [Stage(folder / f"stage-{i}", nursery) for i in range(count)]
    try:
        await asyncio.gather(*(stage.start() for stage in found))
        yield found
    finally:
        await asyncio.gather(*(stage.stop() for stage in found), return_exceptions=True)
        await nursery.stop()
