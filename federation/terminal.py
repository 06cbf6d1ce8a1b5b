"""What all commands of `multitwin` have in common: how they speak, and the arguments they share."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

QUIET_S = 1.0
"""Without a terminal, no more than a line in this time, but for failures and the last."""


def say(text: str) -> None:
    """Tell a person, on standard error."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """One line on standard error that says how far the work is and how long it will take."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first: int | None = None
        self._told_s = 0.0
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, total: int, remark: str) -> None:
        now_s = time.perf_counter()
        if self._first is None:
            self._first = done - 1  # a resumed study does not begin at 0
        is_told = done >= total or now_s - self._told_s > (0.1 if self._live else QUIET_S)
        if not is_told and "_" not in remark.partition(": ")[2].partition(":")[0]:
            return
        self._told_s = now_s
        left_s = (now_s - self._started) / (done - self._first) * max(0, total - done)
        line = f"  {done}/{total}  {remark}  ({left_s:.0f} s left)"
        if self._live and done < total:
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        else:
            print(f"\r{line:<100}" if self._live else line, file=sys.stderr, flush=True)


def run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="the run's name at its broker (runs/NAME)")


def broker_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--broker", default="127.0.0.1:7700", metavar="ADDRESS", help="(127.0.0.1:7700)"
    )


_TALKING = {"broker", "control", "port", "members", "service"}
"""Commands with one of these options talk to other processes."""


def footing_options(command: argparse.ArgumentParser) -> None:
    """Let each command that talks to others be told under which identity it does."""
    dests = set()
    for action in list(command._actions):
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                footing_options(action.choices[name])
        dests.add(action.dest)
    if not dests & _TALKING:
        return
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="who it is, see: multitwin certs (MULTITWIN_TLS, or nobody on this machine)",
    )
    which.add_argument(
        "--insecure-no-tls",
        action="store_true",
        help="speak plain text to other machines: everybody in between may read and change it",
    )


def footing_of(options: argparse.Namespace) -> AbstractContextManager[None]:
    """The footing that a command was given, for as long as the context lasts."""
    folder = getattr(options, "tls", None)
    is_exposed = getattr(options, "insecure_no_tls", False)
    if folder is None and not is_exposed:
        return nullcontext()
    from federation.wire.footing import Footing, standing
    from federation.wire.trust import Trust

    return standing(Footing(None if folder is None else Trust.of(folder), is_exposed))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value
