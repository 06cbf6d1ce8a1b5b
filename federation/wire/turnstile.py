"""Counts what each identity asks for, so that none can take all of a server."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from federation.errors import Reason, ScenarioError

MOST_KNOWN = 10_000
"""Identities that are remembered; who has not called for longest is forgotten, and begins anew."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one identity may ask of one server."""

    calls_per_s: float = 200.0
    """In the long run. A stream is one call, whatever goes over it."""
    burst: float = 1_000.0
    """At once, by who has been quiet."""
    streams: int = 256
    """Open at a time."""


@dataclass(slots=True)
class _Account:
    left: float
    at_s: float
    streams: int = 0


class Turnstile:
    """A bucket of calls for each identity, that fills again with time (a token bucket)."""

    def __init__(self, allowance: Allowance, now_s: Callable[[], float]) -> None:
        self._allowance = allowance
        self._now_s = now_s
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def call(self, identity: str) -> None:
        """Note a call. Fails with TOO_MANY_CALLS, and says when there is room again."""
        account, allowed = self._account(identity), self._allowance
        if account.left < 1.0:
            wait_s = (1.0 - account.left) / allowed.calls_per_s
            raise ScenarioError(
                Reason.TOO_MANY_CALLS,
                f"{identity} has called more often than {allowed.calls_per_s:g} times a second; "
                f"there is room again in {wait_s:.3f} s",
                {"identity": identity, "retry_after_s": f"{wait_s:.6f}"},
            )
        account.left -= 1.0

    def enter(self, identity: str) -> None:
        """Note a stream that begins; `leave` must follow. Fails with TOO_MANY_CALLS."""
        account = self._account(identity)
        if account.streams >= self._allowance.streams:
            raise ScenarioError(
                Reason.TOO_MANY_CALLS,
                f"{identity} has {account.streams} streams open here, and may have no more",
                {"identity": identity, "streams": str(account.streams)},
            )
        account.streams += 1

    def leave(self, identity: str) -> None:
        self._account(identity).streams -= 1

    def _account(self, identity: str) -> _Account:
        now_s, allowed = self._now_s(), self._allowance
        account = self._accounts.get(identity)
        if account is None:
            account = self._accounts[identity] = _Account(allowed.burst, now_s)
            while len(self._accounts) > MOST_KNOWN and self._forget():
                pass
        earned = max(0.0, now_s - account.at_s) * allowed.calls_per_s
        account.left, account.at_s = min(allowed.burst, account.left + earned), now_s
        self._accounts.move_to_end(identity)
        return account

    def _forget(self) -> bool:
        """Drop who has been quiet for longest and has nothing open; False when there is nobody."""
        for identity, account in self._accounts.items():
            if not account.streams:
                del self._accounts[identity]
                return True
        return False
