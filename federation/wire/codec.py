"""Translates between the messages of the wire and the dataclasses of the core.

Pure functions, one pair per dataclass. What every step needs is written into the message that
carries it, because a message that is put into another one is copied by way of its bytes. Vectors
come out as read-only views of the bytes that came in. What only the wire can get wrong is refused
here; what any twin can get wrong is the core's to refuse.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.core.ledger import ActionRecord, Entry, EventRecord, Quality, Record
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.twin import (
    Action,
    Actuator,
    Causality,
    Description,
    DeskStep,
    Entity,
    Event,
    Fidelity,
    LinearBlock,
    Operated,
    Parameter,
    Port,
    Risk,
    Session,
    StepInput,
    StepResult,
    TimePolicy,
    Variable,
    Vector,
)
from federation.v1 import broker_pb2, plan_pb2, twin_pb2

# vectors


_FLOAT64 = np.dtype("<f8")


def encode_vector(vector: Vector) -> bytes:
    return vector.astype(_FLOAT64, copy=False).tobytes()


def decode_vector(data: bytes, name: str) -> Vector:
    """A read-only view of `data`; `name` is for the error when its length can't be right."""
    if len(data) % 8:
        raise TwinError(
            Reason.WRONG_SHAPE,
            f"{name} has {len(data)} bytes, which is no whole number of float64",
            {"variable": name},
        )
    vector = np.frombuffer(data, _FLOAT64)
    return vector if _FLOAT64.isnative else vector.astype(np.float64)


def _encode_indices(indices: NDArray[np.int64]) -> bytes:
    return indices.astype("<i8", copy=False).tobytes()


def _decode_indices(data: bytes, name: str) -> NDArray[np.int64]:
    if len(data) % 8:
        raise _bad_block(f"{name} has {len(data)} bytes, which is no whole number of int64")
    return np.frombuffer(data, "<i8").astype(np.int64, copy=False)


def _finite(name: str, values: Vector) -> Vector:
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise TwinError(
            Reason.NOT_FINITE,
            f"{name}[{index}] is {values[index]}",
            {"variable": name, "index": str(index)},
        )
    return values


# descriptions

_CAUSALITIES = {
    Causality.INPUT: twin_pb2.Variable.CAUSALITY_INPUT,
    Causality.OUTPUT: twin_pb2.Variable.CAUSALITY_OUTPUT,
}
_CAUSALITY_OF = {number: causality for causality, number in _CAUSALITIES.items()}

_RISKS = {
    Risk.LOW: twin_pb2.Actuator.RISK_LOW,
    Risk.MEDIUM: twin_pb2.Actuator.RISK_MEDIUM,
    Risk.HIGH: twin_pb2.Actuator.RISK_HIGH,
}
_FIDELITIES = {
    Fidelity.UNSTATED: twin_pb2.FIDELITY_UNSPECIFIED,
    Fidelity.RECORDED: twin_pb2.FIDELITY_RECORDED,
    Fidelity.SURROGATE: twin_pb2.FIDELITY_SURROGATE,
    Fidelity.REDUCED: twin_pb2.FIDELITY_REDUCED,
    Fidelity.DETAILED: twin_pb2.FIDELITY_DETAILED,
}
_FIDELITY_OF = {number: fidelity for fidelity, number in _FIDELITIES.items()}

_RISK_OF = {number: risk for risk, number in _RISKS.items()}


def encode_description(description: Description) -> twin_pb2.Description:
    return twin_pb2.Description(
        model=description.model,
        version=description.version,
        domain=description.domain,
        entities=[
            twin_pb2.Entity(
                id=entity.id,
                kind=entity.kind,
                name=entity.name,
                lon_deg=_unless_nan(entity.lon_deg),
                lat_deg=_unless_nan(entity.lat_deg),
            )
            for entity in description.entities
        ],
        variables=[
            twin_pb2.Variable(
                name=variable.name,
                kind=variable.kind,
                unit=variable.unit,
                causality=_CAUSALITIES[variable.causality],
                initial=variable.initial,
                low=_unless(variable.low, -math.inf),
                high=_unless(variable.high, math.inf),
                doc=variable.doc,
                via=variable.via,
            )
            for variable in description.variables
        ],
        time=encode_time(description.time),
        parameters=[
            twin_pb2.Parameter(
                name=parameter.name,
                unit=parameter.unit,
                default_value=parameter.default,
                low=_unless(parameter.low, -math.inf),
                high=_unless(parameter.high, math.inf),
                doc=parameter.doc,
                source=parameter.source,
            )
            for parameter in description.parameters
        ],
        actuators=[
            twin_pb2.Actuator(
                name=actuator.name,
                kind=actuator.kind,
                unit=actuator.unit,
                low=_unless(actuator.low, -math.inf),
                high=_unless(actuator.high, math.inf),
                safe_default=actuator.safe_default,
                risk=_RISKS[actuator.risk],
                lease_ns=actuator.lease_ns,
                compensation=actuator.compensation,
                doc=actuator.doc,
                amends=actuator.amends,
            )
            for actuator in description.actuators
        ],
        kpis=description.kpis,
        doc=description.doc,
        data_hash=description.data_hash,
        fidelity=encode_fidelity(description.fidelity),
    )


def encode_time(time: TimePolicy) -> twin_pb2.TimePolicy:
    return twin_pb2.TimePolicy(
        period_ns=time.period_ns,
        offset_ns=time.offset_ns,
        wakes_on_input=time.wakes_on_input,
        can_redo=time.can_redo,
    )


def decode_time(message: twin_pb2.TimePolicy) -> TimePolicy:
    return TimePolicy(
        message.period_ns, message.offset_ns, message.wakes_on_input, message.can_redo
    )


def encode_fidelity(fidelity: Fidelity) -> twin_pb2.Fidelity.ValueType:
    return _FIDELITIES[fidelity]


def decode_fidelity(number: twin_pb2.Fidelity.ValueType) -> Fidelity:
    """One of a later version is one that we do not know."""
    return _FIDELITY_OF.get(number, Fidelity.UNSTATED)


def decode_description(message: twin_pb2.Description) -> Description:
    """Fails with INVALID_DESCRIPTION on what the wire can say and a `Description` can't."""
    return Description(
        model=message.model,
        version=message.version,
        domain=message.domain,
        entities=tuple(
            Entity(
                entity.id,
                entity.kind,
                entity.name,
                entity.lon_deg if entity.HasField("lon_deg") else math.nan,
                entity.lat_deg if entity.HasField("lat_deg") else math.nan,
            )
            for entity in message.entities
        ),
        variables=tuple(_decode_variable(variable) for variable in message.variables),
        time=decode_time(message.time),
        parameters=tuple(
            Parameter(
                parameter.name,
                parameter.unit,
                parameter.default_value,
                parameter.low if parameter.HasField("low") else -math.inf,
                parameter.high if parameter.HasField("high") else math.inf,
                parameter.doc,
                parameter.source,
            )
            for parameter in message.parameters
        ),
        actuators=tuple(
            Actuator(
                actuator.name,
                actuator.kind,
                actuator.unit,
                actuator.low if actuator.HasField("low") else -math.inf,
                actuator.high if actuator.HasField("high") else math.inf,
                actuator.safe_default,
                _RISK_OF.get(actuator.risk, Risk.HIGH),
                actuator.lease_ns,
                actuator.compensation,
                actuator.doc,
                actuator.amends if actuator.HasField("amends") else None,
            )
            for actuator in message.actuators
        ),
        kpis=tuple(message.kpis),
        doc=message.doc,
        data_hash=message.data_hash,
        fidelity=decode_fidelity(message.fidelity),
    )


def _decode_variable(variable: twin_pb2.Variable) -> Variable:
    causality = _CAUSALITY_OF.get(variable.causality)
    if causality is None:
        raise TwinError(
            Reason.INVALID_DESCRIPTION,
            f"variable {variable.name!r} is neither input nor output",
            {"variable": variable.name},
        )
    return Variable(
        variable.name,
        variable.kind,
        variable.unit,
        causality,
        variable.initial,
        variable.low if variable.HasField("low") else -math.inf,
        variable.high if variable.HasField("high") else math.inf,
        variable.doc,
        tuple(variable.via),
    )


def _unless(value: float, absent: float) -> float | None:
    return None if value == absent else value


def _unless_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


# steps


def encode_step_input(given: StepInput) -> twin_pb2.StepInput:
    message = twin_pb2.StepInput()
    write_step_input(message, given)
    return message


def write_step_input(message: twin_pb2.StepInput, given: StepInput) -> None:
    """Fill an empty message."""
    message.time_ns = given.time_ns
    if given.micro:
        message.micro = given.micro
    if given.inputs:
        write_values(message.inputs, given.inputs)
    for variable, entries in given.causes.items():
        message.causes.add(
            variable=variable,
            indices=[index for index, ids in entries.items() for _ in ids or ("",)],
            events=[event for ids in entries.values() for event in ids or ("",)],
        )
    for action in given.actions:
        message.actions.append(encode_action(action))
    if given.desk is not None:
        _write_desk(message.desk, given.desk)
    if given.seen_ns is not None:
        message.seen_ns = given.seen_ns
    if given.missed_since_ns is not None:
        message.missed_since_ns = given.missed_since_ns


def decode_step_input(message: twin_pb2.StepInput) -> StepInput:
    """Fails with NOT_FINITE or WRONG_SHAPE."""
    causes: dict[str, dict[int, tuple[str, ...]]] = {}
    for group in message.causes:
        entries = causes.setdefault(group.variable, {})
        for index, event in _pairs(group):
            known = entries.get(index, ())
            entries[index] = (*known, event) if event else known
    for action in message.actions:
        if not math.isfinite(action.value):
            raise TwinError(
                Reason.NOT_FINITE,
                f"the setpoint of {action.actuator}[{action.entity}] is {action.value}",
                {"actuator": action.actuator, "entity": action.entity},
            )
    inputs = decode_values(message.inputs)
    for variable, values in inputs.items():
        _finite(variable, values)
    return StepInput(
        message.time_ns,
        message.micro,
        inputs,
        causes,
        tuple(map(decode_action, message.actions)),
        _decode_desk(message.desk) if message.HasField("desk") else None,
        message.seen_ns if message.HasField("seen_ns") else None,
        message.missed_since_ns if message.HasField("missed_since_ns") else None,
    )


def encode_step_result(result: StepResult) -> twin_pb2.StepResult:
    message = twin_pb2.StepResult()
    write_step_result(message, result)
    return message


def write_step_result(message: twin_pb2.StepResult, result: StepResult) -> None:
    """Fill an empty message."""
    message.time_ns = result.time_ns
    if result.micro:
        message.micro = result.micro
    if result.outputs:
        write_values(message.outputs, result.outputs)
    for variable, entries in result.causes.items():
        message.causes.add(variable=variable, indices=entries.keys(), events=entries.values())
    for event in result.events:
        message.events.append(encode_event(event))
    for action in result.actions:
        message.actions.append(encode_action(action))
    if result.next_ns is not None:
        message.next_ns = result.next_ns
    if result.desk is not None:
        _write_desk(message.desk, result.desk)
    if result.held:
        message.held = result.held
    if result.seen_ns is not None:
        message.seen_ns = result.seen_ns


def encode_results(results: Iterable[StepResult]) -> bytes:
    """Results as a journal keeps them: a serialised `SessionResponse.Advanced`."""
    message = twin_pb2.SessionResponse.Advanced()
    for result in results:
        write_step_result(message.results.add(), result)
    return message.SerializeToString()


def decode_results(data: bytes) -> list[StepResult]:
    """Fails with INVALID_FRAME when `data` holds no results."""
    try:
        message = twin_pb2.SessionResponse.Advanced.FromString(data)
    except DecodeError as error:
        raise ScenarioError(Reason.INVALID_FRAME, f"these are no results: {error}") from None
    return [decode_step_result(result) for result in message.results]


def decode_step_result(message: twin_pb2.StepResult) -> StepResult:
    """Fails with WRONG_SHAPE; what else a twin may publish the core checks."""
    return StepResult(
        message.time_ns,
        message.micro,
        decode_values(message.outputs),
        {group.variable: dict(_pairs(group)) for group in message.causes},
        tuple(map(decode_event, message.events)),
        tuple(map(decode_action, message.actions)),
        message.next_ns if message.HasField("next_ns") else None,
        _decode_desk(message.desk) if message.HasField("desk") else None,
        message.held,
        message.seen_ns if message.HasField("seen_ns") else None,
    )


def encode_event(event: Event) -> twin_pb2.Event:
    return twin_pb2.Event(
        id=event.id,
        time_ns=event.time_ns,
        kind=event.kind,
        entity=event.entity,
        text=event.text,
        causes=event.causes,
        through=dict(event.through),
        via=event.via,
    )


def decode_event(message: twin_pb2.Event) -> Event:
    return Event(
        message.id,
        message.time_ns,
        message.kind,
        message.entity,
        message.text,
        tuple(message.causes),
        tuple(sorted(message.through.items())),
        tuple(message.via),
    )


def encode_action(action: Action) -> twin_pb2.Action:
    return twin_pb2.Action(
        member=action.member,
        actuator=action.actuator,
        entity=action.entity,
        value=action.value,
        cause=action.cause,
    )


def decode_action(message: twin_pb2.Action) -> Action:
    return Action(message.member, message.actuator, message.entity, message.value, message.cause)


def _write_desk(message: twin_pb2.DeskStep, desk: DeskStep) -> None:
    message.SetInParent()
    message.state = desk.state
    for each in desk.operated:
        message.operated.add(action=encode_action(each.action), by=each.by, text=each.text)


def _decode_desk(message: twin_pb2.DeskStep) -> DeskStep:
    return DeskStep(
        tuple(
            Operated(decode_action(each.action), each.by, each.text) for each in message.operated
        ),
        message.state,
    )


def encode_bundle(bundle: Bundle) -> twin_pb2.Bundle:
    return twin_pb2.Bundle(
        id=bundle.id,
        run=bundle.run,
        setpoints=[
            twin_pb2.Bundle.Setpoint(
                member=s.member,
                actuator=s.actuator,
                entity=s.entity,
                value=s.value,
                lease_ns=s.lease_ns,
            )
            for s in bundle.setpoints
        ],
        priority=int(bundle.priority),
        cut_ns=bundle.cut_ns,
        expires_ns=bundle.expires_ns,
        author=bundle.author,
        basis=bundle.basis,
        conditions=[
            twin_pb2.Bundle.Condition(
                member=c.member, variable=c.variable, entity=c.entity, low=c.low, high=c.high
            )
            for c in bundle.conditions
        ],
    )


def decode_bundle(message: twin_pb2.Bundle) -> Bundle:
    """Fails with SCENARIO_INVALID when its priority is none that this version knows."""
    try:
        priority = Priority(message.priority)
    except ValueError:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"the bundle {message.id} has the priority {message.priority}"
        ) from None
    return Bundle(
        message.id,
        message.run,
        tuple(
            Setpoint(s.member, s.actuator, s.entity, s.value, s.lease_ns) for s in message.setpoints
        ),
        priority,
        message.cut_ns,
        message.expires_ns,
        message.author,
        message.basis,
        tuple(Condition(c.member, c.variable, c.entity, c.low, c.high) for c in message.conditions),
    )


class _Values(Protocol):
    """A repeated field of `VariableValues`."""

    def add(self, *, variable: str, values: bytes) -> object: ...


def write_values(field: _Values, vectors: Mapping[str, Vector]) -> None:
    for variable, vector in vectors.items():
        field.add(variable=variable, values=encode_vector(vector))


def decode_values(messages: Iterable[twin_pb2.VariableValues]) -> dict[str, Vector]:
    return {
        message.variable: decode_vector(message.values, message.variable) for message in messages
    }


def _pairs(group: twin_pb2.VariableCauses) -> Iterable[tuple[int, str]]:
    if len(group.indices) != len(group.events):
        raise TwinError(
            Reason.WRONG_SHAPE,
            f"the causes of {group.variable} name {len(group.indices)} entries "
            f"and {len(group.events)} events",
            {"variable": group.variable},
        )
    return zip(group.indices, group.events, strict=True)


# messages of several frames


def join(messages: Sequence[bytes], field: int) -> bytes:
    """One message from serialised ones: each becomes an entry of its repeated field `field`."""
    parts: list[bytes] = []
    for message in messages:
        parts += (_varint(field << 3 | 2), _varint(len(message)), message)
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """The number in groups of seven bits, lowest first, as protobuf writes it."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


# blocks

_ROLES = {
    "available": plan_pb2.Port.ROLE_AVAILABLE,
    "supply": plan_pb2.Port.ROLE_SUPPLY,
    "need": plan_pb2.Port.ROLE_NEED,
    "control": plan_pb2.Port.ROLE_CONTROL,
    "given": plan_pb2.Port.ROLE_GIVEN,
}
_ROLE_OF = {number: role for role, number in _ROLES.items()}


def encode_block(block: LinearBlock) -> plan_pb2.LinearBlock:
    """Fails with WRONG_SHAPE, NOT_FINITE or INVALID_DESCRIPTION when it contradicts itself."""
    check_block(block)
    return plan_pb2.LinearBlock(
        columns=block.columns,
        low=encode_vector(block.low),
        high=encode_vector(block.high),
        cost=encode_vector(block.cost),
        integer=block.integer.astype(np.uint8).tobytes(),
        rows=block.rows,
        row_low=encode_vector(block.row_low),
        row_high=encode_vector(block.row_high),
        row_index=_encode_indices(block.row_index),
        column_index=_encode_indices(block.column_index),
        coefficient=encode_vector(block.coefficient),
        ports=[
            plan_pb2.Port(
                name=port.name,
                role=_ROLES[port.role],
                kind=port.kind,
                unit=port.unit,
                entities=port.entities,
                periods=port.columns.shape[1],
                columns=_encode_indices(port.columns),
            )
            for port in block.ports
        ],
        doc=block.doc,
    )


def decode_block(message: plan_pb2.LinearBlock) -> LinearBlock:
    """Fails with WRONG_SHAPE, NOT_FINITE or INVALID_DESCRIPTION when it contradicts itself."""
    ports = []
    for port in message.ports:
        columns = _decode_indices(port.columns, f"port {port.name}")
        if columns.size != len(port.entities) * port.periods:
            raise _bad_block(
                f"port {port.name} has {len(port.entities)} entities, {port.periods} periods "
                f"and {columns.size} columns"
            )
        ports.append(
            Port(
                port.name,
                _ROLE_OF.get(port.role, ""),
                port.kind,
                port.unit,
                tuple(port.entities),
                columns.reshape(len(port.entities), port.periods),
            )
        )
    block = LinearBlock(
        columns=tuple(message.columns),
        low=decode_vector(message.low, "low"),
        high=decode_vector(message.high, "high"),
        cost=decode_vector(message.cost, "cost"),
        integer=np.frombuffer(message.integer, np.uint8) != 0,
        rows=tuple(message.rows),
        row_low=decode_vector(message.row_low, "row_low"),
        row_high=decode_vector(message.row_high, "row_high"),
        row_index=_decode_indices(message.row_index, "row_index"),
        column_index=_decode_indices(message.column_index, "column_index"),
        coefficient=decode_vector(message.coefficient, "coefficient"),
        ports=tuple(ports),
        doc=message.doc,
    )
    check_block(block)
    return block


def check_block(block: LinearBlock) -> None:
    """Refuse a block whose vectors don't fit each other, or that no solver could read."""
    n, m, entries = len(block.columns), len(block.rows), block.coefficient.size
    for name, size, wanted in (
        ("low", block.low.size, n),
        ("high", block.high.size, n),
        ("cost", block.cost.size, n),
        ("integer", block.integer.size, n),
        ("row_low", block.row_low.size, m),
        ("row_high", block.row_high.size, m),
        ("row_index", block.row_index.size, entries),
        ("column_index", block.column_index.size, entries),
    ):
        if size != wanted:
            raise _bad_block(f"{name} has {size} entries where {wanted} are due")
    for name, indices, end in (
        ("row_index", block.row_index, m),
        ("column_index", block.column_index, n),
        *((f"port {port.name}", port.columns, n) for port in block.ports),
    ):
        if indices.size and (indices.min() < 0 or indices.max() >= end):
            raise _bad_block(f"{name} points outside 0..{end - 1}")
    _finite("cost", block.cost)
    _finite("coefficient", block.coefficient)
    for name, bounds in (
        ("low", block.low),
        ("high", block.high),
        ("row_low", block.row_low),
        ("row_high", block.row_high),
    ):
        if np.isnan(bounds).any():
            index = int(np.flatnonzero(np.isnan(bounds))[0])
            raise TwinError(
                Reason.NOT_FINITE,
                f"{name}[{index}] of the block is NaN",
                {"variable": name, "index": str(index)},
            )
    for port in block.ports:
        if port.role not in _ROLES:
            raise TwinError(
                Reason.INVALID_DESCRIPTION,
                f"port {port.name} has the role {port.role!r}; there are {sorted(_ROLES)}",
                {"port": port.name},
            )
        if port.columns.ndim != 2 or port.columns.shape[0] != len(port.entities):
            raise _bad_block(
                f"port {port.name} has {len(port.entities)} entities and columns of shape "
                f"{port.columns.shape}"
            )


def _bad_block(message: str) -> TwinError:
    return TwinError(Reason.WRONG_SHAPE, f"in a linear block, {message}")


# ledgers

_QUALITIES = {
    Quality.GOOD: broker_pb2.LedgerEntry.QUALITY_GOOD,
    Quality.HELD: broker_pb2.LedgerEntry.QUALITY_HELD,
    Quality.SUBSTITUTED: broker_pb2.LedgerEntry.QUALITY_SUBSTITUTED,
    Quality.STALE: broker_pb2.LedgerEntry.QUALITY_STALE,
}


def encode_quality(quality: Quality) -> broker_pb2.LedgerEntry.Quality.ValueType:
    return _QUALITIES[quality]


_QUALITY_OF = {number: quality for quality, number in _QUALITIES.items()}


def encode_entry(entry: Entry) -> broker_pb2.LedgerEntry:
    """One ledger entry; the caller sets `receive_time` where there is one."""
    message = broker_pb2.LedgerEntry(
        time_ns=entry.time_ns, micro=entry.micro, rank=entry.rank, member=entry.owner
    )
    match entry:
        case Record():
            message.value.values.variable = entry.variable
            message.value.values.values = encode_vector(entry.value)
            message.value.revision = entry.revision
            message.value.quality = _QUALITIES[entry.quality]
        case EventRecord():
            message.occurrence.event.CopyFrom(encode_event(entry.event))
            message.occurrence.via.update(entry.via)
        case ActionRecord():
            message.order.action.CopyFrom(encode_action(entry.action))
            message.order.refusal = entry.refusal
    return message


def decode_entry(message: broker_pb2.LedgerEntry) -> Entry:
    """One ledger entry; a quality that this version does not know counts as stale."""
    place = (message.time_ns, message.micro, message.rank, message.member)
    match message.WhichOneof("entry"):
        case "value":
            value = message.value
            return Record(
                *place,
                value.values.variable,
                value.revision,
                decode_vector(value.values.values, value.values.variable),
                _QUALITY_OF.get(value.quality, Quality.STALE),
            )
        case "occurrence":
            event = decode_event(message.occurrence.event)
            via = message.occurrence.via
            return EventRecord(*place, event, tuple((c, via[c]) for c in event.causes if c in via))
        case "order":
            return ActionRecord(*place, decode_action(message.order.action), message.order.refusal)
        case _:
            raise ScenarioError(
                Reason.INVALID_FRAME, f"a ledger entry of {message.member} says nothing"
            )


# the state of a session

_STATE_HEAD = struct.Struct("<qqqq")


def encode_session(session: Session, desk: bytes = b"") -> bytes:
    """The whole state of a session: what it holds for its twin, the state of its `desk` if it has
    one, then the twin's snapshot.
    """
    present = StepInput(session.last_ns, 0, session.values, session.input_causes)
    held = encode_step_input(
        present._replace(desk=DeskStep(state=desk)) if desk else present
    ).SerializeToString(deterministic=True)
    told_by = json.dumps(session.told_by).encode()
    head = _STATE_HEAD.pack(session.serial, session.last_ns, len(held), len(told_by))
    return head + held + told_by + session.twin.snapshot()


def restore_session(session: Session, state: bytes) -> bytes:
    """Put a session that was just opened into the state that `encode_session` saw; the desk's.

    Fails with INVALID_FRAME when `state` is not of a session of this description.
    """
    try:
        serial, last_ns, *lengths = _STATE_HEAD.unpack_from(state)
        start = _STATE_HEAD.size
        middle, end = start + lengths[0], start + sum(lengths)
        held = decode_step_input(twin_pb2.StepInput.FromString(state[start:middle]))
        told_by = json.loads(state[middle:end])
    except (struct.error, ValueError, FederationError) as error:
        raise ScenarioError(
            Reason.INVALID_FRAME, f"this is no state of a session: {error}"
        ) from error
    if {name: v.shape for name, v in held.inputs.items()} != {
        name: v.shape for name, v in session.values.items()
    }:
        raise ScenarioError(
            Reason.INVALID_FRAME, f"this state belongs to another twin than {session.name}"
        )
    session.twin.restore(state[end:])
    session.told_by = told_by
    session.serial, session.last_ns = serial, last_ns
    session.values.update(held.inputs)
    session.input_causes = {name: dict(entries) for name, entries in held.causes.items()}
    return b"" if held.desk is None else held.desk.state
