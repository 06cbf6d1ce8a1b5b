"""Starts processes in milliseconds: one that has imported everything forks whoever is asked for.

`python -m tests.chaos.nursery` reads one JSON object a line, `{id, argv, env, log, clock}`, and
writes `{id, pid}` when the process is there and `{pid, code}` when it has ended. A process is the
command line `multitwin ARGV`, or a broker with short leases (`chaos-broker STORE PORT`). Its wall
clock is ahead by the seconds in the file `clock`; its monotonic clock is not. When the nursery
ends, so do all that it started.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import mmap
import os
import selectors
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEASE_TTL_S = 1.0
_PR_SET_PDEATHSIG = 1

_offset: mmap.mmap | None = None


def _ahead(real: Callable[[], Any], unit: int) -> Callable[[], Any]:
    def now() -> Any:
        if _offset is None:
            return real()
        (ahead_s,) = struct.unpack_from("<q", _offset)
        return real() + ahead_s * unit

    return now


def shift_clock() -> None:
    """Make the wall clock movable; before anything takes a copy of these functions."""
    time.time = _ahead(time.time, 1)
    time.time_ns = _ahead(time.time_ns, 1_000_000_000)


def set_clock(path: Path, ahead_s: int) -> None:
    """Move the wall clock of every process that was started with this file."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.write(struct.pack("<q", ahead_s))


def _play(order: dict[str, Any]) -> int:
    """Be the process that is asked for; its exit code."""
    global _offset
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.update(order["env"])
    with open(order["clock"], "rb") as file:
        _offset = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    argv = order["argv"]
    if argv[0] != "chaos-broker":
        from federation.__main__ import main

        return main(argv)
    from federation.broker.server import BrokerOptions, serve_broker
    from federation.errors import FederationError

    try:
        asyncio.run(
            serve_broker(BrokerOptions(store=argv[1], port=int(argv[2]), lease_ttl_s=LEASE_TTL_S))
        )
    except FederationError as error:
        print(f"multitwin: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    shift_clock()
    for module in ("federation.__main__", "federation.broker.server", "federation.wire.serve"):
        importlib.import_module(module)
    importlib.import_module("tests.chaos.world").reference(1)  # what is built once is inherited
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness says when to end
    chooser = selectors.DefaultSelector()
    chooser.register(0, selectors.EVENT_READ)
    chooser.register(wake, selectors.EVENT_READ)
    unread = b""
    _tell(ready=os.getpid())
    while True:
        for key, _ in chooser.select():
            piece = os.read(key.fd, 65536)
            if key.fd == wake:
                _reap()
                continue
            if not piece:
                return
            *lines, unread = (unread + piece).split(b"\n")
            for line in lines:
                _start(json.loads(line))


def _start(order: dict[str, Any]) -> None:
    pid = os.fork()
    if pid:
        _tell(id=order["id"], pid=pid)
        return
    code = 70
    try:
        code = _play(order)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _tell(pid=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
