"""The event loop that multitwin's own processes run on."""

from __future__ import annotations

import asyncio
import ctypes
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

_T = TypeVar("_T")

_M_ARENA_MAX = -8
"""`mallopt`'s number for it (malloc.h of glibc)."""


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run`, on uvloop where there is one."""
    _share_memory()
    with asyncio.Runner(loop_factory=_factory()) as runner:
        return runner.run(main)


def _share_memory() -> None:
    """Let all threads take memory from two places; glibc would make up to eight per processor.

    gRPC adds a thread whenever it finds itself behind, and each would keep megabytes of its own.
    """
    with suppress(OSError, AttributeError):  # other C libraries do not have it
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
