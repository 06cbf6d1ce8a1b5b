"""The ring in HELICS 3: threads over one in-process core, or processes over ZeroMQ.

Of the ways that its Python package offers, these were the fastest here: threads (asynchronous
calls from one thread are several times slower), one core for all of them, and vectors as raw
bytes (its `helicsInputGetVector` makes a list of 1,024 numbers more than asked for).
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import helics  # type: ignore[import-untyped]
import numpy as np

from benchmarks import check, print_seconds

QUIET = "--loglevel=no_print"


def local(n: int, m: int, t: int) -> float:
    """The wall time from when all threads are in executing mode until the last is through."""
    helics.helicsCreateBroker("inproc", "ring", f"--federates={n} {QUIET}")
    helics.helicsCreateCore("inproc", "core", f"--federates={n} --broker=ring {QUIET}")
    places = [_Place("inproc", i, n, "core") for i in range(n)]
    started = threading.Barrier(n)
    spans: list[tuple[float, float]] = []

    def run(place: _Place) -> None:
        helics.helicsFederateEnterExecutingMode(place.federate)
        started.wait()
        spans.append(place.run(m, t))

    threads = [threading.Thread(target=run, args=(place,)) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    helics.helicsCloseLibrary()
    return _length(spans, n)


def sockets(n: int, m: int, t: int) -> float:
    """The same with a broker here and a process for each place."""
    port = _free_port()
    helics.helicsCreateBroker(
        "zmq", "ring", f"--federates={n} --local --port={port} --portstart={port + 10} {QUIET}"
    )
    me = [sys.executable, "-m", "benchmarks.ring_helics", "place"]
    places = [
        subprocess.Popen([*me, *map(str, (i, n, m, t, port))], stdout=subprocess.PIPE, text=True)
        for i in range(n)
    ]
    spans = []
    try:
        for place in places:
            said, _ = place.communicate()
            if place.returncode:
                raise RuntimeError(f"a federate ended with {place.returncode}")
            start_s, end_s = map(float, said.split()[-2:])
            spans.append((start_s, end_s))
    finally:
        for place in places:
            place.kill()
            place.wait()
    helics.helicsCloseLibrary()
    return _length(spans, n)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _length(spans: list[tuple[float, float]], n: int) -> float:
    if len(spans) != n:
        raise RuntimeError(f"{n - len(spans)} federates failed")
    return max(end_s for _, end_s in spans) - min(start_s for start_s, _ in spans)


class _Place:
    """One place in the ring; it steps at every whole instant."""

    def __init__(self, core_type: str, index: int, n: int, core: str, options: str = "") -> None:
        info = helics.helicsCreateFederateInfo()
        helics.helicsFederateInfoSetCoreTypeFromString(info, core_type)
        helics.helicsFederateInfoSetTimeProperty(info, helics.HELICS_PROPERTY_TIME_PERIOD, 1.0)
        helics.helicsFederateInfoSetCoreName(info, core)
        helics.helicsFederateInfoSetCoreInitString(info, options)
        self.federate = helics.helicsCreateValueFederate(f"m{index}", info)
        self._after = helics.helicsFederateRegisterGlobalPublication(
            self.federate, f"after{index}", helics.HELICS_DATA_TYPE_RAW, ""
        )
        self._before = helics.helicsFederateRegisterSubscription(
            self.federate, f"after{(index - 1) % n}", ""
        )

    def run(self, m: int, t: int) -> tuple[float, float]:
        """Do all steps, leave, and say when it began and ended, on the machine's clock."""
        start_s = time.monotonic()
        value = np.zeros(m)
        for step in range(t):
            check(value[0], step)
            helics.helicsPublicationPublishBytes(self._after, (value + 1.0).tobytes())
            helics.helicsFederateRequestTime(self.federate, step + 1)
            value = np.frombuffer(helics.helicsInputGetBytes(self._before))
        check(value[0], t)
        end_s = time.monotonic()
        helics.helicsFederateDisconnect(self.federate)
        return start_s, end_s


def _place(index: int, n: int, m: int, t: int, port: int) -> None:
    place = _Place("zmq", index, n, f"core{index}", f"--federates=1 --brokerport={port} {QUIET}")
    helics.helicsFederateEnterExecutingMode(place.federate)
    print(*place.run(m, t))
    helics.helicsCloseLibrary()


if __name__ == "__main__":
    if sys.argv[1] == "place":
        _place(*map(int, sys.argv[2:]))
    else:
        print_seconds({"local": local, "grpc": sockets})
