"""The ring in HELICS 3, the ways that were fastest of those that its Python package offers.

One core for each federate in a process of its own, over ZeroMQ or shared memory, under a broker in
the process that starts them; or one in-process core for a thread of each federate (asynchronous
time requests from one thread were several times slower). Logs are off. The vector is published
as M doubles, as a HELICS federation usually does it, or, in the modes with `-vector`, as one
value of raw bytes (`helicsInputGetVector` makes a list of 1,024 numbers more than asked for).
"""

from __future__ import annotations

import multiprocessing
import socket
import threading
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import helics  # type: ignore[import-untyped]
import numpy as np

from benchmarks import WARM_STEPS, Cost, Meter, check, print_seconds

QUIET = "--loglevel=no_print"

PATIENCE_S = 60.0


class _Federate:
    """One place in the ring; it steps at every whole instant."""

    def __init__(
        self, core_type: str, core: str, options: str, index: int, n: int, m: int, single: bool
    ) -> None:
        info = helics.helicsCreateFederateInfo()
        helics.helicsFederateInfoSetCoreTypeFromString(info, core_type)
        helics.helicsFederateInfoSetTimeProperty(info, helics.HELICS_PROPERTY_TIME_PERIOD, 1.0)
        helics.helicsFederateInfoSetCoreName(info, core)
        helics.helicsFederateInfoSetCoreInitString(info, options)
        self._federate = helics.helicsCreateValueFederate(f"m{index}", info)
        kind = helics.HELICS_DATA_TYPE_DOUBLE if single else helics.HELICS_DATA_TYPE_RAW
        before = (index - 1) % n
        places = range(m if single else 1)
        self._after = [
            helics.helicsFederateRegisterGlobalPublication(
                self._federate, f"after{index}/{j}", kind, ""
            )
            for j in places
        ]
        self._before = [
            helics.helicsFederateRegisterSubscription(self._federate, f"after{before}/{j}", "")
            for j in places
        ]
        self._value = np.zeros(m)
        self._step = self._singles if single else self._vector
        self._steps = 0
        helics.helicsFederateEnterExecutingMode(self._federate)

    def run(self, t: int) -> None:
        """Do `t` steps more."""
        for now in range(self._steps, self._steps + t):
            self._step(now)
        self._steps += t
        check(self._value[0], self._steps)

    def leave(self) -> None:
        helics.helicsFederateDisconnect(self._federate)

    def _singles(self, now: int) -> None:
        check(self._value[0], now)
        for publication, number in zip(self._after, (self._value + 1.0).tolist(), strict=True):
            helics.helicsPublicationPublishDouble(publication, number)
        helics.helicsFederateRequestTime(self._federate, now + 1)
        self._value = np.array([helics.helicsInputGetDouble(one) for one in self._before])

    def _vector(self, now: int) -> None:
        check(self._value[0], now)
        helics.helicsPublicationPublishBytes(self._after[0], (self._value + 1.0).tobytes())
        helics.helicsFederateRequestTime(self._federate, now + 1)
        self._value = np.frombuffer(helics.helicsInputGetBytes(self._before[0]))


def threads(single: bool, n: int, m: int, t: int) -> Cost:
    """All federates in this process."""
    helics.helicsCreateBroker("inproc", "ring", f"--federates={n} {QUIET}")
    helics.helicsCreateCore("inproc", "core", f"--federates={n} --broker=ring {QUIET}")
    meeting = threading.Barrier(n + 1)
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            federate = _Federate("inproc", "core", "", index, n, m, single)
            federate.run(WARM_STEPS)
            meeting.wait()  # all are warm
            meeting.wait()  # the clock runs
            federate.run(t)
            meeting.wait()
            federate.leave()
        except BaseException as failure:
            failures.append(failure)
            meeting.abort()
            raise

    crew = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(n)]
    for thread in crew:
        thread.start()
    meeting.wait()
    meter = Meter()
    meeting.wait()
    meeting.wait()
    cost = meter.cost()
    for thread in crew:
        thread.join(PATIENCE_S)
    helics.helicsCloseLibrary()
    return cost


def processes(core_type: str, single: bool, n: int, m: int, t: int) -> Cost:
    """A process for each federate, a broker in this one."""
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        crew: list[tuple[BaseProcess, Connection]] = []
        for index in range(n):
            here, there = context.Pipe()
            process: BaseProcess = context.Process(
                target=_process, args=(there, core_type, index, n, m, single), daemon=True
            )
            process.start()
            stack.callback(process.kill)
            there.close()
            crew.append((process, here))
        core_options = _broker(core_type, n, m)
        _tell(crew, core_options)
        _hear(crew)
        meter = Meter()
        _tell(crew, t)
        _hear(crew)
        cost = meter.cost()
        _tell(crew, None)
        for process, _ in crew:
            process.join(PATIENCE_S)
        helics.helicsCloseLibrary()
        return cost


def _broker(core_type: str, n: int, m: int) -> str:
    """Start the broker; what a core must be told to find it."""
    if core_type == "zmq":
        port = _free_port()
        own, core = f"--local --port={port} --portstart={port + 10}", f"--brokerport={port}"
        name = "ring"
    else:
        own = core = f"--maxsize={max(4096, 16 * m + 1024)}"
        name = ""
    broker = helics.helicsCreateBroker(core_type, name, f"--federates={n} {own} {QUIET}")
    if not helics.helicsBrokerIsConnected(broker):
        raise RuntimeError("the broker did not start")
    return f"--federates=1 {core} {QUIET}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _tell(crew: list[tuple[BaseProcess, Connection]], what: object) -> None:
    for _, pipe in crew:
        pipe.send(what)


def _hear(crew: list[tuple[BaseProcess, Connection]]) -> None:
    for process, pipe in crew:
        try:
            pipe.recv()
        except EOFError:
            raise RuntimeError(f"{process.name} failed") from None


def _process(pipe: Connection, core_type: str, index: int, n: int, m: int, single: bool) -> None:
    options = pipe.recv()
    federate = _Federate(core_type, f"core{index}", options, index, n, m, single)
    federate.run(WARM_STEPS)
    pipe.send(None)
    federate.run(pipe.recv())
    pipe.send(None)
    pipe.recv()
    federate.leave()
    helics.helicsCloseLibrary()


if __name__ == "__main__":
    print_seconds(
        {
            "inproc": partial(threads, True),
            "inproc-vector": partial(threads, False),
            "zmq": partial(processes, "zmq", True),
            "zmq-vector": partial(processes, "zmq", False),
            "ipc": partial(processes, "ipc", True),
            "ipc-vector": partial(processes, "ipc", False),
        }
    )
