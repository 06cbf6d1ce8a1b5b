"""Runs a study with every member in a process of its own, under a broker in this one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil

from federation.broker.home import substitute_of
from federation.broker.server import BrokerOptions, BrokerServer
from federation.errors import PlanError, Reason, TwinError
from federation.scenario.run import Case, Outcome, PlannerFactory
from federation.scenario.spec import Scenario, Service
from federation.wire import footing
from federation.wire.link import Link

START_TIMEOUT_S = 180.0
"""How long members may take to start; twins compile code the first time."""

STOP_TIMEOUT_S = 10.0

_LOOK_S = 0.02
"""From one look at whether a process has ended to the next."""

SESSION_TIMEOUT_S = 600.0
"""How long a run waits for a service that has no session to spare."""


class Child:
    """A process that runs beside this one.

    Started by `subprocess`, which forks without running any Python in the child: with the threads
    that gRPC has here, the child of uvloop's fork crashed now and then before it began.
    """

    def __init__(self, command: Sequence[str], log: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=footing.child_environment(),
        )
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> int:
        while (code := self.returncode) is None:
            await asyncio.sleep(_LOOK_S)
        return code


@dataclass(frozen=True, slots=True)
class Fleet:
    """A broker and its member processes, started for one study."""

    broker: BrokerServer
    processes: Mapping[str, Child]
    logs: Mapping[str, Path]
    started_s: float

    def members(self, scenario: Scenario) -> list[dict[str, Any]]:
        """The `members` of a summary: who, where, and the seconds that each process took."""
        registered = {
            lease.member.name: lease.member
            for lease in self.broker.registry.members(time.monotonic_ns())
        }
        rows = [_row("broker", self.broker.address, os.getpid(), "", self.started_s)]
        for name, member in scenario.members.items():
            process = self.processes.get(name)
            known = registered.get(name)
            address = member.address or (known.address if known else "")
            version = known.version if known else ""
            rows.append(
                _row(name, address, process.pid if process else None, version, self.started_s)
            )
        return rows

    def check(self) -> None:
        """Fail when a member process has ended, with the last line that it wrote."""
        for name, process in self.processes.items():
            if process.returncode is not None:
                lines = self.logs[name].read_text(encoding="utf-8").strip().splitlines()
                last = lines[-1] if lines else "it said nothing"
                raise TwinError(
                    Reason.MEMBER_LOST,
                    f"the process of {name} ended with code {process.returncode}: {last}",
                    {"member": name, "log": str(self.logs[name])},
                )


def _row(
    name: str, address: str, pid: int | None, version: str, started_s: float
) -> dict[str, Any]:
    cpu_s = 0.0
    if pid is not None and psutil.pid_exists(pid):
        times = psutil.Process(pid).cpu_times()
        cpu_s = times.user + times.system
    return {
        "name": name,
        "address": address,
        "pid": pid,
        "version": version,
        "wall_s": time.perf_counter() - started_s,
        "cpu_s": cpu_s,
    }


@asynccontextmanager
async def fleet(
    scenario: Scenario, store: str | Path, logs: Path, factory: PlannerFactory | None = None
) -> AsyncIterator[Fleet]:
    """Start a broker here and a process for each member that has a class; end them all after.

    Members with an address are used where they are. What a process writes goes to
    `logs/NAME.log`. Runs that are forked have planners of `factory`. Fails with MEMBER_LOST when
    one does not come up.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started_s = time.perf_counter()
    own: dict[str, Service] = {n: m for n, m in scenario.members.items() if m.twin}
    for name, member in scenario.members.items():
        stand_in = member.on_failure.substitute
        if stand_in is not None and stand_in.twin:
            own[substitute_of(name)] = stand_in
    options = BrokerOptions(
        store=store, scenario_folder=scenario.folder, planner=factory, continues=False
    )
    # what is started here stays on this machine; only members elsewhere need certificates
    here = replace(footing.present(), spares_local=True)
    async with AsyncExitStack() as stack:
        stack.enter_context(footing.standing(here))
        broker = await stack.enter_async_context(BrokerServer(options))
        processes: dict[str, Child] = {}
        files = {name: logs / f"{name}.log" for name in own}

        def start(name: str) -> None:
            service = own[name]
            config = [f"--config={key}={value}" for key, value in service.config.items()]
            with files[name].open("ab") as log:
                processes[name] = Child(
                    [
                        *(sys.executable, "-m", "federation", "serve", str(service.twin)),
                        *(f"--name={name}", f"--broker={broker.address}", *config),
                    ],
                    log,
                )

        async def keep_up(name: str) -> None:
            """Start a member again whenever its process ends, after a pause that grows."""
            pause_s = 0.0
            while True:
                await processes[name].wait()
                broker.dismiss(name)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s + 0.1, 5.0)
                start(name)

        keeping: list[asyncio.Task[None]] = []
        try:
            for name in own:
                files[name].unlink(missing_ok=True)
                start(name)
            crew = Fleet(broker, processes, files, started_s)
            await _all_ready(crew, own)
            for name, member in scenario.members.items():
                if name in own and member.on_failure.do == "recover":
                    keeping.append(asyncio.create_task(keep_up(name)))
            yield crew
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
            await asyncio.gather(*(_end(process) for process in processes.values()))


async def _all_ready(crew: Fleet, names: Mapping[str, object]) -> None:
    waiting = asyncio.create_task(crew.broker.members_ready(names, START_TIMEOUT_S))
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=0.2)
            crew.check()
        await waiting
    finally:
        waiting.cancel()


async def _end(process: Child) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def sessions_at_once(scenario: Scenario) -> int:
    """How many runs the services of a scenario take at a time; 0 when none says.

    Asks the members that are services of others. Fails with UNREACHABLE when one is not there.
    """
    limits = []
    for name, member in scenario.members.items():
        if member.address is not None:
            async with await Link.connect(member.address, name) as link:
                limits.append(link.max_sessions)
    return min((limit for limit in limits if limit), default=0)


async def each_case(
    crew: Fleet,
    scenario: Scenario,
    todo: Iterator[Case],
    factory: PlannerFactory | None,
    take: Callable[[Outcome], None],
    *,
    keep: Callable[[Case], bool] = lambda case: False,
    at_once: int = 1,
) -> None:
    """Do the cases with sessions of their own, asked for as they are needed; `take` hears each.

    Failures of members and plans are part of an outcome; a wrong request is raised. A case for
    which a service has no session to spare waits for one, up to `SESSION_TIMEOUT_S`.
    """

    async def work() -> None:
        for case in todo:
            take(await _attempt(crew, scenario, case, factory, keep(case)))

    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:  # after an error or an interruption, nobody goes on
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _attempt(
    crew: Fleet, scenario: Scenario, case: Case, factory: PlannerFactory | None, keep: bool
) -> Outcome:
    give_up_s, pause_s = time.monotonic() + SESSION_TIMEOUT_S, 0.05
    while True:
        # on a busy machine a process may be late to renew its lease, and registers again
        alive = [name for name, process in crew.processes.items() if process.returncode is None]
        await crew.broker.members_ready(alive, START_TIMEOUT_S)
        try:
            return await crew.broker.run(scenario, case, factory, keep_ledger=keep)
        except (TwinError, PlanError) as failure:
            is_full = failure.reason is Reason.TOO_MANY_SESSIONS
            if not is_full or time.monotonic() + pause_s > give_up_s:
                return Outcome(case, failure=failure)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


async def run_cases(
    crew: Fleet,
    scenario: Scenario,
    todo: Sequence[Case],
    factory: PlannerFactory | None,
    *,
    keep: Callable[[Case], bool] = lambda case: False,
    at_once: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Outcome]:
    """Do every case as `each_case` does, and give the outcomes in the order asked for."""
    found: dict[tuple[int, str], Outcome] = {}

    def take(outcome: Outcome) -> None:
        case = outcome.case
        found[case.run, case.measure] = outcome
        if progress:
            what = outcome.error or f"{outcome.wall_s:.1f} s"
            progress(len(found), len(todo), f"run {case.run} {case.measure}: {what}")

    await each_case(crew, scenario, iter(todo), factory, take, keep=keep, at_once=at_once)
    return [found[case.run, case.measure] for case in todo]
