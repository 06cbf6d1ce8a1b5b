"""Spreads the runs of a study over processes: none but this one, or the workers of Ray."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import psutil

from federation.errors import PlanError, Reason, ScenarioError, TwinError
from federation.scenario.finding import Finding, finding
from federation.scenario.run import Case, Experiment, Outcome, PlannerFactory, bind, run_local
from federation.scenario.spec import Scenario
from federation.twin import Description

RAY_TIMEOUT_S = 5.0
"""How long a cluster's address may take to answer."""

RAY_GRACE_S = 2.0
"""How long a process of a local Ray may take to end once it is told to."""

TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_FILE = ".ray/auth_token"

TASK_S = 0.5
"""About how long a task of several short runs should take; Ray starts some 1,300 a second."""

MOST_PER_TASK = 256

Progress = Callable[[int, int, str], None]
"""Hears how many runs are done, of how many, and a line about the last."""

_T = TypeVar("_T")


class Binder:
    """Wires a scenario once for all runs whose members describe themselves alike."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._experiment: Experiment | None = None

    def __call__(
        self,
        scenario: Scenario,
        descriptions: Mapping[str, Description],
        planner: Description | None,
        case: Case | None = None,
    ) -> Experiment:
        crews = case.parameters.get("planner") if case else None
        key = (id(scenario), planner, crews, dict(descriptions))
        if self._experiment is None or key != self._key:
            self._key = key
            self._experiment = bind(scenario, descriptions, planner, case)
        return self._experiment


@dataclass(frozen=True)
class Engine:
    """How runs are done: in this process, or on Ray with some workers.

    `planner` is the `module:function` of a `PlannerFactory`, by name so that a worker in
    another process can find it. Without an `address` one worker is this process; `local` is a
    Ray of this study's own, `auto` a cluster of this machine if there is one. 0 workers are as
    many as the cluster has processors.
    """

    scenario: Scenario
    planner: str
    workers: int = 1
    address: str | None = None

    def run(
        self,
        todo: Sequence[Case],
        *,
        keep: Callable[[Case], bool] = lambda case: False,
        progress: Progress | None = None,
    ) -> list[Outcome]:
        """Do every case and give the outcomes in the order asked for; failures are collected."""
        found: dict[int, Outcome] = {}
        for index, outcome in self._each(todo, keep, _outcome):
            found[index] = outcome
            if progress:
                progress(len(found), len(todo), remark(outcome.case, outcome.error, outcome.wall_s))
        return [found[index] for index in range(len(todo))]

    def findings(
        self, todo: Iterable[Case], *, keep: Callable[[Case], bool] = lambda case: False
    ) -> Iterator[Finding]:
        """Do the cases, asked for as they are needed, and give each when it is done.

        What is still under way when the iteration ends is cancelled.
        """
        for _, found in self._each(todo, keep, _finding):
            yield found

    def numbered(self, todo: Iterable[Case]) -> Iterator[tuple[int, Finding]]:
        """The same with the place of each case among those asked for."""
        return self._each(todo, lambda case: False, _finding)

    @contextmanager
    def up(self) -> Iterator[None]:
        """Keep the workers between several calls."""
        if not self._is_spread:
            yield
            return
        with ray_up(self.workers, self.address):
            yield

    @property
    def _is_spread(self) -> bool:
        return self.workers != 1 or self.address is not None

    def _each(
        self,
        todo: Iterable[Case],
        keep: Callable[[Case], bool],
        form: Callable[[Outcome, Scenario, bool], _T],
    ) -> Iterator[tuple[int, _T]]:
        if not self._is_spread:
            binder = Binder()
            for index, case in enumerate(todo):
                outcome = attempt(self.scenario, case, self.planner, keep(case), binder)
                yield index, form(outcome, self.scenario, keep(case))
            return
        with self.up():
            yield from self._on_ray(todo, keep, form)

    def _on_ray(
        self,
        todo: Iterable[Case],
        keep: Callable[[Case], bool],
        form: Callable[[Outcome, Scenario, bool], _T],
    ) -> Iterator[tuple[int, _T]]:
        ray = _ray()
        workers = self.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        data = pickle.dumps(self.scenario)
        key = hashlib.sha256(data).hexdigest()
        box = [ray.put(data)]  # in a list, so that a worker which has it does not fetch it
        remote = ray.remote(num_cpus=1, max_retries=2)(_do)
        ahead = ((index, case, keep(case)) for index, case in enumerate(todo))
        coming: deque[tuple[int, Case, bool]] = deque()
        again: deque[list[tuple[int, Case, bool]]] = deque()
        waiting: dict[Any, list[tuple[int, Case, bool]]] = {}
        size = 1
        try:
            while True:
                while len(waiting) < 2 * workers:
                    if again:
                        batch = again.popleft()
                    else:
                        places = 2 * workers
                        coming.extend(islice(ahead, max(0, places * size - len(coming))))
                        # the last tasks are smaller: no worker is left alone with one for long
                        share = min(size, max(1, len(coming) // places))
                        batch = [coming.popleft() for _ in range(min(share, len(coming)))]
                    if not batch:
                        break
                    waiting[remote.remote(key, box, batch, self.planner, form)] = batch
                if not waiting:
                    return
                done, _ = ray.wait(list(waiting), num_returns=1)
                for reference in done:
                    batch = waiting.pop(reference)
                    try:
                        seconds, results = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        cause = getattr(error, "cause", None)
                        if isinstance(cause, ScenarioError):
                            raise cause from None
                        if len(batch) > 1:  # find out which of them it was
                            again.extend([one] for one in batch)
                            continue
                        ((index, case, kept),) = batch
                        lost = f"the worker was lost: {error}".splitlines()[0]
                        failed = Outcome(case, failure=TwinError(Reason.MEMBER_LOST, lost))
                        seconds, results = math.inf, [(index, form(failed, self.scenario, kept))]
                    per_run_s = max(seconds / len(batch), 1e-6)
                    size = max(1, min(MOST_PER_TASK, int(TASK_S / per_run_s), 2 * size))
                    yield from results
        finally:
            for reference in waiting:  # after an interruption, or when there is enough
                ray.cancel(reference, force=True)


_known: dict[str, tuple[Scenario, Binder]] = {}
"""The scenario that a worker has at hand, by the hash of its bytes."""


def _do(
    key: str,
    box: Sequence[Any],
    batch: Sequence[tuple[int, Case, bool]],
    planner: str,
    form: Callable[[Outcome, Scenario, bool], _T],
) -> tuple[float, list[tuple[int, _T]]]:
    """A worker's part: some runs, and how long they took without what the first of all costs."""
    if key not in _known:
        import ray

        _known.clear()
        _known[key] = (pickle.loads(ray.get(box[0])), Binder())
    scenario, binder = _known[key]
    results = []
    began_s = time.perf_counter()
    for index, case, kept in batch:
        results.append(
            (index, form(attempt(scenario, case, planner, kept, binder), scenario, kept))
        )
    return time.perf_counter() - began_s, results


def _outcome(outcome: Outcome, scenario: Scenario, kept: bool) -> Outcome:
    return outcome


def _finding(outcome: Outcome, scenario: Scenario, kept: bool) -> Finding:
    return finding(outcome, scenario.horizon_ns, keep=kept)


def _ray() -> Any:
    if any(name in os.environ for name in TOKENS) or Path.home().joinpath(TOKEN_FILE).exists():
        # the head of a cluster asks for the token whenever it has one; who joins must be told to
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise ScenarioError(
            Reason.MISSING_EXTRA, "several workers need Ray: install multitwin[study]"
        ) from None
    return ray


@contextmanager
def ray_up(workers: int, address: str | None) -> Iterator[None]:
    """Ray for as long as the context lasts, unless it is up already; see `start_ray`."""
    mine = not _ray().is_initialized()
    with redirect_stdout(sys.stderr):  # where Ray tells of lost workers; ours is for results
        if mine:
            start_ray(workers, address)
        try:
            yield
        finally:
            if mine:
                end_ray()


def start_ray(workers: int, address: str | None) -> None:
    """Start a local Ray for this process only, or join the cluster at `address`.

    `auto` joins a cluster of this machine and, where there is none, starts a local Ray. Fails
    with UNREACHABLE when no cluster is there; Ray itself would go on asking for minutes.
    """
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None and address != "local":
        where = {"address": address}
        host, _, port = address.rpartition(":")
        try:
            if port.isdigit() and "/" not in host:
                socket.create_connection((host, int(port)), RAY_TIMEOUT_S).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            if address != "auto":
                text = f"there is no Ray cluster at {address}: {error}".splitlines()[0]
                text += f"; if it asks for a token, put that into ~/{TOKEN_FILE} or {TOKENS[0]}"
                raise ScenarioError(Reason.UNREACHABLE, text, where) from None
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=workers or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # Ray says no more of a start that took too long
            end_ray()
            if not attempts_left:
                text = f"Ray does not start on this machine: {error}".splitlines()[0]
                raise ScenarioError(Reason.UNREACHABLE, text) from None


def end_ray() -> None:
    """Leave the cluster; of a local Ray, every process has gone when this returns.

    By itself Ray ends the raylet, and the raylet's agents may look for it for a minute more.
    """
    ray = _ray()
    folder = str(Path(ray.__file__).parent)
    family: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it may end meanwhile
            if any(part.startswith(folder) for part in child.cmdline()):
                family += [child, *child.children(recursive=True)]
    ray.shutdown()
    for end in (psutil.Process.terminate, psutil.Process.kill):
        _, family = psutil.wait_procs(family, timeout=RAY_GRACE_S)
        for process in family:
            with suppress(psutil.Error):
                end(process)
    psutil.wait_procs(family, timeout=RAY_GRACE_S)


def attempt(
    scenario: Scenario,
    case: Case,
    planner: str,
    keep_ledger: bool,
    binder: Binder | None = None,
) -> Outcome:
    """Do one run; a failure becomes part of the outcome, so that the study goes on.

    A wrong request is no failure of a run: every other would meet it too, so it is raised.
    """
    factory = planner_factory(planner)
    try:
        return run_local(scenario, case, factory, keep_ledger=keep_ledger, binder=binder)
    except (TwinError, PlanError) as failure:
        return Outcome(case, failure=failure)


def planner_factory(path: str) -> PlannerFactory:
    module, _, name = path.partition(":")
    found: PlannerFactory = getattr(__import__(module, fromlist=[name]), name)
    return found


def remark(case: Case, error: str, wall_s: float) -> str:
    return f"run {case.run} {case.measure}: {error or f'{wall_s:.1f} s'}"
