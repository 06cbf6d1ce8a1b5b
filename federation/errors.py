"""Every error of the federation and its stable reason; knows no transport.

A reason never changes its meaning once released: people script against it. The
class says who must act: `ScenarioError` whoever wrote the request, `TwinError`
the author of a twin, `PlanError` whoever asked for a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Reason(StrEnum):
    """The stable names that an error may carry, on every transport."""

    # the request is wrong
    SCENARIO_NOT_FOUND = "SCENARIO_NOT_FOUND"
    SCENARIO_INVALID = "SCENARIO_INVALID"
    UNKNOWN_KEY = "UNKNOWN_KEY"
    UNKNOWN_MEMBER = "UNKNOWN_MEMBER"
    UNKNOWN_VARIABLE = "UNKNOWN_VARIABLE"
    UNKNOWN_PARAMETER = "UNKNOWN_PARAMETER"
    UNKNOWN_ENTITY = "UNKNOWN_ENTITY"
    UNKNOWN_UNIT = "UNKNOWN_UNIT"
    INCOMPATIBLE_UNITS = "INCOMPATIBLE_UNITS"
    AMBIGUOUS_INPUT = "AMBIGUOUS_INPUT"
    LOOP_WITHOUT_DELAY = "LOOP_WITHOUT_DELAY"
    LATE_WITHOUT_DELAY = "LATE_WITHOUT_DELAY"
    INSTANT_PASSED = "INSTANT_PASSED"
    DESCRIPTION_DIFFERS = "DESCRIPTION_DIFFERS"
    MISSING_FILE = "MISSING_FILE"
    MISSING_EXTRA = "MISSING_EXTRA"
    RUN_NOT_FOUND = "RUN_NOT_FOUND"
    NAME_LEASED = "NAME_LEASED"
    SCHEMA_INCOMPATIBLE = "SCHEMA_INCOMPATIBLE"
    LEASE_UNKNOWN = "LEASE_UNKNOWN"
    STALE_EPOCH = "STALE_EPOCH"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    PORT_IN_USE = "PORT_IN_USE"
    UNREACHABLE = "UNREACHABLE"
    INVALID_FRAME = "INVALID_FRAME"
    OUTSIDE_ENVELOPE = "OUTSIDE_ENVELOPE"
    FOREIGN_PACKAGE = "FOREIGN_PACKAGE"
    STORE_FAILED = "STORE_FAILED"
    JOURNAL_PRUNED = "JOURNAL_PRUNED"
    NO_TURN = "NO_TURN"
    TOO_MANY_SESSIONS = "TOO_MANY_SESSIONS"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    TOO_FEW_RUNS = "TOO_FEW_RUNS"
    QUERY_FAILED = "QUERY_FAILED"
    NOT_AUTHORISED = "NOT_AUTHORISED"
    NOT_LIVE = "NOT_LIVE"
    REQUEST_DIFFERS = "REQUEST_DIFFERS"
    ACTUATOR_OWNED = "ACTUATOR_OWNED"
    SELECTED_BY_OTHER = "SELECTED_BY_OTHER"
    STATE_MOVED = "STATE_MOVED"
    EXPIRED = "EXPIRED"
    HALTED = "HALTED"
    NO_LEASE = "NO_LEASE"
    UNKNOWN_BUNDLE = "UNKNOWN_BUNDLE"
    BUNDLE_OVER = "BUNDLE_OVER"
    RULES_INVALID = "RULES_INVALID"
    TRAIL_BROKEN = "TRAIL_BROKEN"
    TRAIL_IN_USE = "TRAIL_IN_USE"
    INVALID_KEY = "INVALID_KEY"
    POLICY_INVALID = "POLICY_INVALID"
    NOT_EXPORTED = "NOT_EXPORTED"
    PATH_LOOP = "PATH_LOOP"
    PEER_LIMIT = "PEER_LIMIT"
    NOT_AUTHENTICATED = "NOT_AUTHENTICATED"
    CERTIFICATE_INVALID = "CERTIFICATE_INVALID"
    PLAIN_TEXT_REFUSED = "PLAIN_TEXT_REFUSED"
    # a twin broke its contract
    NOT_FINITE = "NOT_FINITE"
    WRONG_SHAPE = "WRONG_SHAPE"
    UNDECLARED_OUTPUT = "UNDECLARED_OUTPUT"
    UNKNOWN_CAUSE = "UNKNOWN_CAUSE"
    TIME_REGRESSION = "TIME_REGRESSION"
    LOOP_NOT_CONVERGED = "LOOP_NOT_CONVERGED"
    INVALID_DESCRIPTION = "INVALID_DESCRIPTION"
    TWIN_FAILED = "TWIN_FAILED"
    MEMBER_LOST = "MEMBER_LOST"
    MEMBER_LATE = "MEMBER_LATE"
    REPLAY_DIFFERS = "REPLAY_DIFFERS"
    UNSUPPORTED = "UNSUPPORTED"
    INVALID_BLOCK = "INVALID_BLOCK"
    # no acceptable plan
    NO_PLAN = "NO_PLAN"
    PLAN_INFEASIBLE = "PLAN_INFEASIBLE"


class FederationError(Exception):
    """An error with a stable `reason` and machine-readable `metadata`.

    `exit_code` is what the command line ends with: 2 bad request, 3 a member
    failed, 4 no acceptable plan.
    """

    exit_code = 1

    def __init__(
        self, reason: Reason, message: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.reason, self.message, self.metadata))


class ScenarioError(FederationError):
    """The request is wrong; the person who wrote it must act."""

    exit_code = 2


class TwinError(FederationError):
    """A twin broke its contract or was lost; its author or operator must act."""

    exit_code = 3


class PlanError(FederationError):
    """There is no acceptable plan for what was asked."""

    exit_code = 4
