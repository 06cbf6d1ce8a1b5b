"""The one translator between errors of the federation and what gRPC carries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
from google.rpc import (  # type: ignore[import-untyped]
    error_details_pb2,
    status_pb2,
)
from grpc_status import rpc_status  # type: ignore[import-untyped]

from federation.errors import FederationError, PlanError, Reason, ScenarioError, TwinError
from federation.v1 import error_pb2

DOMAIN = "multitwin"
"""The `ErrorInfo.domain` of every error."""

_Kind = type[FederationError]
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_TABLE: Mapping[Reason, tuple[grpc.StatusCode, _Kind]] = {
    Reason.SCENARIO_NOT_FOUND: (grpc.StatusCode.NOT_FOUND, ScenarioError),
    Reason.SCENARIO_INVALID: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.UNKNOWN_KEY: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.UNKNOWN_MEMBER: (grpc.StatusCode.NOT_FOUND, ScenarioError),
    Reason.UNKNOWN_VARIABLE: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.UNKNOWN_PARAMETER: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.UNKNOWN_ENTITY: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.UNKNOWN_UNIT: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.INCOMPATIBLE_UNITS: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.AMBIGUOUS_INPUT: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.LOOP_WITHOUT_DELAY: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.LATE_WITHOUT_DELAY: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.INSTANT_PASSED: (grpc.StatusCode.OUT_OF_RANGE, ScenarioError),
    Reason.DESCRIPTION_DIFFERS: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.MISSING_FILE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.STORE_FAILED: (grpc.StatusCode.UNAVAILABLE, ScenarioError),
    Reason.JOURNAL_PRUNED: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.MISSING_EXTRA: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.RUN_NOT_FOUND: (grpc.StatusCode.NOT_FOUND, ScenarioError),
    Reason.SCHEMA_INCOMPATIBLE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.NAME_LEASED: (grpc.StatusCode.ALREADY_EXISTS, ScenarioError),
    Reason.LEASE_UNKNOWN: (grpc.StatusCode.NOT_FOUND, ScenarioError),
    Reason.STALE_EPOCH: (grpc.StatusCode.ABORTED, ScenarioError),
    Reason.MESSAGE_TOO_LARGE: (grpc.StatusCode.RESOURCE_EXHAUSTED, ScenarioError),
    Reason.PORT_IN_USE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.UNREACHABLE: (grpc.StatusCode.UNAVAILABLE, ScenarioError),
    Reason.INVALID_FRAME: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.OUTSIDE_ENVELOPE: (grpc.StatusCode.OUT_OF_RANGE, ScenarioError),
    Reason.FOREIGN_PACKAGE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.NO_TURN: (grpc.StatusCode.RESOURCE_EXHAUSTED, ScenarioError),
    Reason.TOO_MANY_SESSIONS: (grpc.StatusCode.RESOURCE_EXHAUSTED, TwinError),
    Reason.TOO_MANY_CALLS: (grpc.StatusCode.RESOURCE_EXHAUSTED, ScenarioError),
    Reason.TOO_FEW_RUNS: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.QUERY_FAILED: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.NOT_AUTHORISED: (grpc.StatusCode.PERMISSION_DENIED, ScenarioError),
    Reason.NOT_LIVE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.REQUEST_DIFFERS: (grpc.StatusCode.ALREADY_EXISTS, ScenarioError),
    Reason.ACTUATOR_OWNED: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.SELECTED_BY_OTHER: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.STATE_MOVED: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.EXPIRED: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.HALTED: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.NO_LEASE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.UNKNOWN_BUNDLE: (grpc.StatusCode.NOT_FOUND, ScenarioError),
    Reason.BUNDLE_OVER: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.RULES_INVALID: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.TRAIL_BROKEN: (grpc.StatusCode.DATA_LOSS, ScenarioError),
    Reason.TRAIL_IN_USE: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.INVALID_KEY: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.POLICY_INVALID: (grpc.StatusCode.INVALID_ARGUMENT, ScenarioError),
    Reason.NOT_EXPORTED: (grpc.StatusCode.PERMISSION_DENIED, ScenarioError),
    Reason.PATH_LOOP: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.PEER_LIMIT: (grpc.StatusCode.RESOURCE_EXHAUSTED, ScenarioError),
    Reason.NOT_AUTHENTICATED: (grpc.StatusCode.UNAUTHENTICATED, ScenarioError),
    Reason.CERTIFICATE_INVALID: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.PLAIN_TEXT_REFUSED: (grpc.StatusCode.FAILED_PRECONDITION, ScenarioError),
    Reason.INVALID_BLOCK: (grpc.StatusCode.INVALID_ARGUMENT, TwinError),
    Reason.NOT_FINITE: (grpc.StatusCode.INVALID_ARGUMENT, TwinError),
    Reason.WRONG_SHAPE: (grpc.StatusCode.INVALID_ARGUMENT, TwinError),
    Reason.UNDECLARED_OUTPUT: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.UNKNOWN_CAUSE: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.TIME_REGRESSION: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.LOOP_NOT_CONVERGED: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.INVALID_DESCRIPTION: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.TWIN_FAILED: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.MEMBER_LOST: (grpc.StatusCode.UNAVAILABLE, TwinError),
    Reason.MEMBER_LATE: (grpc.StatusCode.UNAVAILABLE, TwinError),
    Reason.REPLAY_DIFFERS: (grpc.StatusCode.INTERNAL, TwinError),
    Reason.UNSUPPORTED: (grpc.StatusCode.UNIMPLEMENTED, TwinError),
    Reason.NO_PLAN: (grpc.StatusCode.FAILED_PRECONDITION, PlanError),
    Reason.PLAN_INFEASIBLE: (grpc.StatusCode.FAILED_PRECONDITION, PlanError),
}


def code_of(reason: Reason) -> grpc.StatusCode:
    return _TABLE[reason][0]


def encode_error(error: FederationError) -> error_pb2.Error:
    """An error as a stream or a resource carries it."""
    return error_pb2.Error(
        reason=error.reason.value, message=error.message, metadata=error.metadata
    )


def decode_error(message: error_pb2.Error) -> FederationError:
    """The error again; the class follows from the reason.

    A reason of a later version becomes TWIN_FAILED, with the original in the metadata.
    """
    return _error(message.reason, message.message, message.metadata)


def encode_status(error: FederationError) -> status_pb2.Status:
    """An error as a unary call carries it, with its `ErrorInfo`."""
    status = status_pb2.Status(code=code_of(error.reason).value[0], message=error.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=error.reason.value, domain=DOMAIN, metadata=error.metadata
        )
    )
    return status


def decode_status(status: status_pb2.Status) -> FederationError | None:
    """The error that a status carries, or None when it carries none of ours."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return _error(info.reason, status.message, info.metadata)
    return None


def _error(reason: str, message: str, metadata: Mapping[str, str]) -> FederationError:
    try:
        known = Reason(reason)
    except ValueError:
        return TwinError(Reason.TWIN_FAILED, message, {**metadata, "reason": reason})
    return _TABLE[known][1](known, message, dict(metadata))


@asynccontextmanager
async def refusing(context: grpc.aio.ServicerContext[_Request, _Response]) -> AsyncIterator[None]:
    """Ends a unary call with the rich status of a `FederationError` raised inside."""
    try:
        yield
    except FederationError as error:
        status = rpc_status.to_status(encode_status(error))
        await context.abort(status.code, status.details, status.trailing_metadata)


def from_rpc(error: grpc.aio.AioRpcError, who: str, *, lost: bool = False) -> FederationError:
    """The error behind a failed call to `who` (a name and an address, for the message).

    With `lost`, `who` has answered before: its silence means MEMBER_LOST and not UNREACHABLE.
    """
    status = rpc_status.from_call(error)
    ours = None if status is None else decode_status(status)
    if ours is not None:
        return ours
    code, details = error.code(), error.details() or "no details"
    metadata = {"grpc_code": code.name}
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ScenarioError(Reason.MESSAGE_TOO_LARGE, f"{who}: {details}", metadata)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return TwinError(Reason.UNSUPPORTED, f"{who} does not serve this: {details}", metadata)
    if code in SILENCE:
        if lost:
            return TwinError(Reason.MEMBER_LOST, f"{who} was lost: {details}", metadata)
        return ScenarioError(Reason.UNREACHABLE, f"{who} can't be reached: {details}", metadata)
    return TwinError(Reason.TWIN_FAILED, f"{who} failed with {code.name}: {details}", metadata)


SILENCE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
"""How gRPC says that nobody answered."""
