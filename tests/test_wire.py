"""What crosses the wire arrives unchanged, once, and errors say who must act."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from opentelemetry import trace

from federation.core.ledger import ActionRecord, EventRecord, Quality, Record
from federation.errors import FederationError, PlanError, Reason, ScenarioError, TwinError
from federation.twin import (
    HOUR_NS,
    Action,
    Actuator,
    Causality,
    Description,
    Entity,
    Event,
    LinearBlock,
    Parameter,
    Port,
    Risk,
    Session,
    Step,
    StepInput,
    StepResult,
    TimePolicy,
    Twin,
    Variable,
)
from federation.v1 import error_pb2, twin_pb2, twin_pb2_grpc
from federation.wire import codec, status
from federation.wire.link import Link, LinkOptions
from federation.wire.serve import ServeOptions, serving

ROOT = Path(__file__).parents[1]
CAPACITY_M3 = 100.0


class Reservoirs(Twin):
    """The model of rawtwin.py once more, with the SDK: two reservoirs fill and spill."""

    steps_done = 0
    """Of all sessions; a frame that is done twice shows here."""
    gate: threading.Event | None = None
    """When set, each step waits for it."""

    def describe(self) -> Description:
        return Description(
            model="reservoirs",
            version="1",
            domain="water",
            entities=(Entity("R1", "tank"), Entity("R2", "tank")),
            variables=(
                Variable("inflow", "tank", "m^3/h", Causality.INPUT),
                Variable("volume", "tank", "m^3", Causality.OUTPUT),
                Variable("rain", "system", "mm", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=HOUR_NS),
            parameters=(
                Parameter("start_m3", "m^3", 10.0, 0.0, 100.0),
                Parameter("ballast_bytes", "1", 0.0, 0.0, 1e9),
            ),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.random = np.random.default_rng([seed, 1])
        self.volume = np.full(2, parameters["start_m3"])
        self.inflow = np.zeros(2)
        self.ballast = bytes(int(parameters["ballast_bytes"]))

    def advance(self, step: Step) -> None:
        if self.gate is not None and not self.gate.wait(20):
            raise RuntimeError("nobody opened the gate")
        type(self).steps_done += 1
        if step["inflow"][0] == 13.0:
            raise ZeroDivisionError("thirteen")
        before = self.volume
        self.volume = np.minimum(before + self.inflow * step.span_h, CAPACITY_M3)
        self.inflow = step["inflow"].copy()
        causes = {
            int(tank): step.emit(
                "reservoir_full",
                f"R{tank + 1}",
                f"R{tank + 1} spills.",
                step.cause("inflow", int(tank)),
            )
            for tank in np.flatnonzero((before < CAPACITY_M3) & (self.volume >= CAPACITY_M3))
        }
        step.publish("volume", self.volume, causes)
        step.publish("rain", self.random.exponential())

    def snapshot(self) -> bytes:
        return pickle.dumps((self.volume, self.inflow, self.random, self.ballast))

    def restore(self, state: bytes) -> None:
        self.volume, self.inflow, self.random, self.ballast = pickle.loads(state)

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        periods = len(periods_ns)
        return LinearBlock(
            columns=tuple(f"release_{i}" for i in range(periods)),
            low=np.zeros(periods),
            high=np.full(periods, math.inf),
            cost=np.ones(periods),
            integer=np.zeros(periods, dtype=np.bool_),
            rows=("no more than there is",),
            row_low=np.array([-math.inf]),
            row_high=np.array([self.volume.sum()]),
            row_index=np.zeros(periods, dtype=np.int64),
            column_index=np.arange(periods),
            coefficient=np.ones(periods),
            ports=(Port("release", "supply", "system", "m^3", ("system",), np.array([[0, 1]])),),
        )


INPUTS = (
    StepInput(0),
    StepInput(
        HOUR_NS,
        inputs={"inflow": np.array([60.0, 1.0])},
        causes={"inflow": {0: ("storm/1", "storm/2"), 1: ()}},
    ),
    StepInput(3 * HOUR_NS),
    StepInput(5 * HOUR_NS, actions=(Action("me", "gate", "R1", 1.0),)),
)


LOOP = asyncio.Runner()
"""One for all tests: gRPC still reports on calls of the last test when the next one runs."""


def bounded(story: Callable[[], Coroutine[object, object, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await story()

    LOOP.run(limited())


@asynccontextmanager
async def linked(
    factory: Callable[[], Twin] = Reservoirs,
    served: ServeOptions | None = None,
    options: LinkOptions | None = None,
) -> AsyncIterator[Link]:
    async with (
        serving(factory, "water", served) as (address, _),
        await Link.connect(address, "water", options) as link,
    ):
        yield link


@asynccontextmanager
async def stubbed(served: ServeOptions | None = None) -> AsyncIterator[twin_pb2_grpc.TwinAsyncStub]:
    async with (
        serving(Reservoirs, "water", served) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(channel)
        yield stub


def frame(
    number: int, command: str, session: str = "s", epoch: int = 1, **content: object
) -> twin_pb2.SessionRequest:
    request = twin_pb2.SessionRequest(session=session, frame=number, epoch=epoch)
    part = getattr(request, command)
    part.SetInParent()
    for name, value in content.items():
        if isinstance(value, list):
            getattr(part, name).extend(value)
        else:
            setattr(part, name, value)
    return request


def steps(*times_h: int) -> list[twin_pb2.StepInput]:
    return [twin_pb2.StepInput(time_ns=time * HOUR_NS) for time in times_h]


async def answers(
    stub: twin_pb2_grpc.TwinAsyncStub, *requests: twin_pb2.SessionRequest
) -> list[twin_pb2.SessionResponse]:
    """The answers over one stream, each frame sent after the answer to the one before."""
    call = stub.Session()
    got = []
    for request in requests:
        await call.write(request)
        answer = await call.read()
        assert isinstance(answer, twin_pb2.SessionResponse)
        got.append(answer)
    await call.done_writing()
    return got


def same(a: object, b: object) -> bool:
    """Equal to the last bit, NaN included."""
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
        )
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping)
            and list(a) == list(b)
            and all(same(value, b[key]) for key, value in a.items())
        )
    if isinstance(a, list | tuple):
        return (
            isinstance(b, list | tuple)
            and len(a) == len(b)
            and all(same(x, y) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return a == b


# what goes in comes out

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = st.text("abcdefgh_", min_size=1, max_size=8)
ids = st.builds("{}/{}".format, words, st.integers(1, 10**9))
instants = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
bounds = st.floats(allow_nan=False)
indices = st.integers(0, 2**31 - 1)
vectors = hnp.arrays(np.float64, st.integers(0, 9), elements=finite)


def some(what: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(what, max_size=4).map(tuple)


told = st.dictionaries(ids, words, max_size=3).map(lambda found: tuple(sorted(found.items())))
events = st.builds(Event, ids, instants, words, words, text, some(ids), told, some(words))
actions = st.builds(Action, words, words, words, finite, text)
step_inputs = st.builds(
    StepInput,
    instants,
    st.integers(0, 2**31 - 1),
    st.dictionaries(words, vectors, max_size=3),
    st.dictionaries(words, st.dictionaries(indices, some(ids), max_size=3), max_size=3),
    some(actions),
    seen_ns=st.none() | instants,
    missed_since_ns=st.none() | instants,
)
step_results = st.builds(
    StepResult,
    instants,
    st.integers(0, 2**31 - 1),
    st.dictionaries(words, vectors, max_size=3),
    st.dictionaries(words, st.dictionaries(indices, ids | st.just(""), max_size=3), max_size=3),
    some(events),
    some(actions),
    st.none() | instants,
    seen_ns=st.none() | instants,
)
descriptions = st.builds(
    Description,
    model=text,
    version=text,
    domain=text,
    entities=some(st.builds(Entity, text, words, text, st.floats(), st.floats())),
    variables=some(
        st.builds(
            Variable,
            words,
            words,
            text,
            st.sampled_from(Causality),
            finite,
            bounds,
            bounds,
            text,
            some(words),
        )
    ),
    time=st.builds(TimePolicy, instants, instants, st.booleans(), st.booleans()),
    parameters=some(st.builds(Parameter, words, text, finite, bounds, bounds, text, text)),
    actuators=some(
        st.builds(
            Actuator,
            words,
            words,
            text,
            bounds,
            bounds,
            finite,
            st.sampled_from(Risk),
            instants,
            text,
            text,
        )
    ),
    kpis=some(words),
    doc=text,
    data_hash=text,
)


@st.composite
def blocks(draw: st.DrawFn) -> LinearBlock:
    n, m, entries, periods = (draw(st.integers(1, 5)) for _ in range(4))

    def array(size: int, elements: st.SearchStrategy[float] = bounds) -> np.ndarray:
        return draw(hnp.arrays(np.float64, size, elements=elements))

    def pointers(shape: int | tuple[int, int], end: int) -> np.ndarray:
        return draw(hnp.arrays(np.int64, shape, elements=st.integers(0, end - 1)))

    ports = []
    for name in draw(st.lists(words, max_size=3, unique=True)):
        entities = tuple(draw(st.lists(words, max_size=3)))
        role = draw(st.sampled_from(["available", "supply", "need"]))
        columns = pointers((len(entities), periods), n)
        ports.append(Port(name, role, draw(words), draw(text), entities, columns))
    return LinearBlock(
        columns=tuple(f"x{i}" for i in range(n)),
        low=array(n),
        high=array(n),
        cost=array(n, finite),
        integer=draw(hnp.arrays(np.bool_, n)),
        rows=tuple(f"r{i}" for i in range(m)),
        row_low=array(m),
        row_high=array(m),
        row_index=pointers(entries, m),
        column_index=pointers(entries, n),
        coefficient=array(entries, finite),
        ports=tuple(ports),
        doc=draw(text),
    )


@st.composite
def entries(draw: st.DrawFn) -> Record | EventRecord | ActionRecord:
    micro, rank = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    place = (draw(instants), micro, rank, draw(words))
    match draw(st.integers(0, 2)):
        case 0:
            quality = draw(st.sampled_from(Quality))
            return Record(*place, draw(words), draw(st.integers(1, 9)), draw(vectors), quality)
        case 1:
            event = draw(events)
            foreign = [c for c in dict.fromkeys(event.causes) if draw(st.booleans())]
            causes = tuple(dict.fromkeys(event.causes))
            event = dataclasses.replace(event, causes=causes)
            return EventRecord(*place, event, tuple((c, draw(words)) for c in foreign))
        case _:
            return ActionRecord(*place, draw(actions), draw(text))


@given(step_inputs)
def test_a_step_input_survives_the_wire(given_: StepInput) -> None:
    data = codec.encode_step_input(given_).SerializeToString()
    assert same(codec.decode_step_input(twin_pb2.StepInput.FromString(data)), given_)


@given(step_results)
def test_a_step_result_survives_the_wire(result: StepResult) -> None:
    data = codec.encode_step_result(result).SerializeToString()
    assert same(codec.decode_step_result(twin_pb2.StepResult.FromString(data)), result)


@settings(max_examples=50)
@given(descriptions)
def test_a_description_survives_the_wire(description: Description) -> None:
    data = codec.encode_description(description).SerializeToString()
    assert same(codec.decode_description(twin_pb2.Description.FromString(data)), description)


@given(blocks())
def test_a_linear_block_survives_the_wire(block: LinearBlock) -> None:
    message = codec.encode_block(block)
    assert same(codec.decode_block(type(message).FromString(message.SerializeToString())), block)


@given(entries())
def test_a_ledger_entry_survives_the_wire(entry: Record | EventRecord | ActionRecord) -> None:
    message = codec.encode_entry(entry)
    assert same(codec.decode_entry(type(message).FromString(message.SerializeToString())), entry)


@given(st.sampled_from(Reason), text, st.dictionaries(words, text, max_size=3))
def test_an_error_keeps_its_reason_and_who_must_act(
    reason: Reason, message: str, metadata: dict[str, str]
) -> None:
    scenario = ScenarioError(reason, message, metadata)
    framed = status.decode_error(status.encode_error(scenario))
    unary = status.decode_status(status.encode_status(scenario))
    for error in (framed, unary):
        assert error is not None
        assert (error.reason, error.message, error.metadata) == (reason, message, metadata)
        assert type(error) in (ScenarioError, TwinError, PlanError)
    assert type(framed) is type(unary)


def test_an_error_of_a_later_version_blames_the_twin_and_keeps_its_name() -> None:
    error = status.decode_error(error_pb2.Error(reason="MELTED", message="it was warm"))
    assert isinstance(error, TwinError)
    assert (error.reason, error.metadata) == (Reason.TWIN_FAILED, {"reason": "MELTED"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_but_a_finite_one_goes_into_a_twin(value: float) -> None:
    message = codec.encode_step_input(StepInput(0, inputs={"x": np.array([0.0, value])}))
    with pytest.raises(FederationError, match=r"NOT_FINITE: x\[1\]"):
        codec.decode_step_input(message)
    action = codec.encode_step_input(StepInput(0, actions=(Action("m", "valve", "V1", value),)))
    with pytest.raises(FederationError, match=r"NOT_FINITE: .*valve\[V1\]"):
        codec.decode_step_input(action)


@given(blocks(), st.sampled_from(["low", "cost", "row_high", "coefficient", "column_index"]))
def test_a_block_whose_vectors_do_not_fit_is_refused(block: LinearBlock, name: str) -> None:
    message = codec.encode_block(block)
    setattr(message, name, getattr(message, name) + bytes(8))
    with pytest.raises(FederationError, match="WRONG_SHAPE"):
        codec.decode_block(message)


@given(blocks(), st.sampled_from(["low", "high", "cost", "row_low", "row_high", "coefficient"]))
def test_a_block_with_nan_is_refused(block: LinearBlock, name: str) -> None:
    getattr(block, name)[-1] = math.nan
    with pytest.raises(FederationError, match="NOT_FINITE"):
        codec.encode_block(block)


def test_a_variable_that_is_neither_input_nor_output_is_refused() -> None:
    message = twin_pb2.Description(variables=[twin_pb2.Variable(name="x", unit="1")])
    with pytest.raises(TwinError, match="INVALID_DESCRIPTION"):
        codec.decode_description(message)


# a session over the wire is a session


def test_a_served_twin_gives_what_it_gives_in_process() -> None:
    local = Session(Reservoirs(), "me")
    local.open(7, {"start_m3": 20.0})
    expected = [local.advance(step) for step in INPUTS]
    assert expected[2].events[0].causes == ("storm/1", "storm/2")

    async def story() -> None:
        async with linked() as link:
            assert same(await link.describe(), local.description)
            one_by_one = await link.session("me", 7, {"start_m3": 20.0}, epoch=1)
            assert same([(await one_by_one.advance([s]))[0] for s in INPUTS], expected)
            at_once = await link.session("me", 7, {"start_m3": 20.0}, epoch=1)
            assert same(await at_once.advance(INPUTS), expected)
            other_seed = await link.session("me", 8, {"start_m3": 20.0}, epoch=1)
            assert not same(await other_seed.advance(INPUTS), expected)

    bounded(story)


def test_many_sessions_share_one_stream_and_stay_apart() -> None:
    local = {}
    for seed in range(20):
        session = Session(Reservoirs(), f"m{seed}")
        session.open(seed, {})
        local[seed] = [session.advance(step) for step in INPUTS]

    async def story() -> None:
        async with linked() as link:

            async def run(seed: int) -> None:
                session = await link.session(f"m{seed}", seed, {}, epoch=1)
                got = [(await session.advance([step]))[0] for step in INPUTS]
                assert same(got, local[seed])
                await session.close()

            async with asyncio.TaskGroup() as group:
                for seed in range(20):
                    group.create_task(run(seed))

    bounded(story)


def test_a_restored_session_goes_on_bit_for_bit() -> None:
    async def story() -> None:
        async with linked() as link:
            first = await link.session("me", 7, {}, epoch=1)
            await first.advance(INPUTS[:2])
            state = await first.snapshot()
            expected = await first.advance(INPUTS[2:])
            assert expected[0].events, "the cause given before the snapshot must matter"
            second = await link.session("me", 7, {}, epoch=1)
            await second.restore(state)
            assert same(await second.advance(INPUTS[2:]), expected)

    bounded(story)


def test_a_state_of_something_else_is_refused() -> None:
    async def story() -> None:
        async with linked() as link:
            session = await link.session("me", 7, {}, epoch=1)
            with pytest.raises(ScenarioError, match="no state of a session"):
                await session.restore(b"rubbish")

    bounded(story)


def test_flexibility_is_that_of_the_session_asked() -> None:
    async def story() -> None:
        async with linked() as link:
            session = await link.session("me", 7, {"start_m3": 40.0}, epoch=1)
            block = await session.flexibility([HOUR_NS, HOUR_NS])
            assert block is not None
            assert block.row_high.tolist() == [80.0]
            with pytest.raises(ScenarioError, match=r"INVALID_FRAME.*no open session"):
                await link.flexibility("nobody", [HOUR_NS])

    bounded(story)


# frames are numbered


def test_a_repeated_frame_gets_the_same_answer_and_does_nothing() -> None:
    async def story() -> None:
        async with stubbed() as stub:
            before = Reservoirs.steps_done
            advance = frame(2, "advance", steps=steps(0, 1, 2))
            got = await answers(stub, frame(1, "open", member="m"), advance, advance)
            (again,) = await answers(stub, advance)
            assert len(got[1].advanced.results) == 3
            assert got[1] == got[2] == again
            assert Reservoirs.steps_done == before + 3

    bounded(story)


@pytest.mark.parametrize(
    ("bad", "reason", "expected"),
    [
        (frame(3, "advance", steps=steps(1)), "INVALID_FRAME", "2"),
        (frame(0, "advance", steps=steps(1)), "INVALID_FRAME", "2"),
        (frame(2, "open"), "INVALID_FRAME", "2"),
        (frame(2, "advance", steps=steps(2, 1)), "INVALID_FRAME", "2"),
        (frame(2, "advance", session="other", steps=steps(1)), "INVALID_FRAME", "1"),
        (frame(1, "advance", session="other", steps=steps(1)), "INVALID_FRAME", "1"),
        (twin_pb2.SessionRequest(session="s", frame=2, epoch=5), "INVALID_FRAME", "2"),
        (frame(2, "advance", epoch=4, steps=steps(1)), "STALE_EPOCH", "2"),
        (frame(1, "open", epoch=4), "STALE_EPOCH", "2"),
    ],
)
def test_a_frame_out_of_order_is_refused_and_leaves_no_trace(
    bad: twin_pb2.SessionRequest, reason: str, expected: str
) -> None:
    if not bad.epoch or bad.epoch == 1:
        bad.epoch = 5

    async def story() -> None:
        async with stubbed() as stub:
            _, refused, good = await answers(
                stub,
                frame(1, "open", epoch=5, member="m"),
                bad,
                frame(2, "advance", epoch=5, steps=steps(0)),
            )
            assert refused.error.reason == reason
            assert refused.error.metadata["expected_frame"] == expected
            assert not good.HasField("error")

    bounded(story)


def test_who_takes_over_with_a_higher_epoch_shuts_the_one_before_out() -> None:
    async def story() -> None:
        async with stubbed() as stub:
            got = await answers(
                stub,
                frame(1, "open", epoch=1, member="m"),
                frame(2, "advance", epoch=2, steps=steps(0)),
                frame(3, "advance", epoch=1, steps=steps(1)),
                frame(3, "advance", epoch=2, steps=steps(1)),
                frame(1, "open", epoch=3, member="m"),
                frame(4, "advance", epoch=2, steps=steps(2)),
                frame(2, "advance", epoch=3, steps=steps(0)),
            )
            reasons = [answer.error.reason for answer in got]
            assert reasons == ["", "", "STALE_EPOCH", "", "", "STALE_EPOCH", ""]

    bounded(story)


def test_a_link_that_takes_a_session_over_goes_on_where_the_other_was() -> None:
    local = Session(Reservoirs(), "me")
    local.open(7, {})
    expected = [local.advance(step) for step in INPUTS]

    async def story() -> None:
        async with linked() as old, await Link.connect(old.address, "water") as new:
            session = await old.session("me", 7, {}, epoch=1)
            got = await session.advance(INPUTS[:2])
            heir = await new.resume(session.id, "me", session.frame, epoch=2)
            got += await heir.advance(INPUTS[2:3])
            with pytest.raises(ScenarioError, match="STALE_EPOCH"):
                await session.advance(INPUTS[2:])
            got += await heir.advance(INPUTS[3:])
            assert same(got, expected)

    bounded(story)


def test_a_closed_session_stays_closed() -> None:
    async def story() -> None:
        async with stubbed() as stub:
            got = await answers(
                stub,
                frame(1, "open", member="m"),
                frame(2, "close"),
                frame(2, "close"),
                frame(3, "advance", steps=steps(1)),
            )
            assert got[1] == got[2]
            assert got[3].error.reason == "INVALID_FRAME"

    bounded(story)


# several frames in one message


def test_each_frame_of_a_message_of_several_has_its_answer_also_beside_a_refused_one() -> None:
    local = {}
    for name in ("a", "b"):
        session = Session(Reservoirs(), name)
        session.open(0, {})
        local[name] = [codec.encode_step_result(session.advance(StepInput(0)))]

    async def story() -> None:
        async with stubbed() as stub:
            described = await stub.Describe(twin_pb2.DescribeRequest())
            assert described.takes_batches
            assert described.max_message_bytes == ServeOptions().max_message_bytes
            nested = twin_pb2.SessionRequest(frames=[frame(3, "close", session="a")])
            call = stub.Session()
            await call.write(
                twin_pb2.SessionRequest(
                    frames=[
                        frame(1, "open", session="a", member="a"),
                        frame(2, "advance", session="a", steps=steps(0)),
                        frame(7, "advance", session="a", steps=steps(1)),
                        frame(1, "open", session="b", member="b"),
                        frame(2, "advance", session="c", steps=steps(0)),
                        frame(2, "advance", session="b", steps=steps(0)),
                        nested,
                    ]
                )
            )
            await call.done_writing()
            got: dict[tuple[str, int], twin_pb2.SessionResponse] = {}
            async for message in call:
                for answer in message.answers or [message]:
                    assert (answer.session, answer.frame) not in got
                    got[answer.session, answer.frame] = answer
            for name in ("a", "b"):
                assert got[name, 1].WhichOneof("outcome") == "opened"
                assert list(got[name, 2].advanced.results) == local[name]
            for key in (("a", 7), ("c", 2), ("", 0)):
                assert got[key].error.reason == "INVALID_FRAME"
            assert len(got) == 7

    bounded(story)


def test_a_caller_that_sends_one_frame_at_a_time_gets_one_answer_at_a_time() -> None:
    async def story() -> None:
        async with stubbed() as stub:
            call = stub.Session()
            for number in range(8):
                name = f"s{number}"
                await call.write(frame(1, "open", session=name, member=name))
                await call.write(frame(2, "advance", session=name, steps=steps(0)))
            await call.done_writing()
            got = [answer async for answer in call]
            assert not any(answer.answers for answer in got)
            assert not any(answer.HasField("error") for answer in got)
            assert sorted((answer.session, answer.frame) for answer in got) == [
                (f"s{number}", frame_) for number in range(8) for frame_ in (1, 2)
            ]

    bounded(story)


def test_frames_that_leave_together_are_kept_apart_from_a_twin_that_takes_one_at_a_time() -> None:
    async def story(address: str) -> None:
        async with await Link.connect(address, "raw") as link:
            sessions = [await link.session(f"m{i}", i, {}, epoch=1) for i in range(5)]
            for hour in range(3):
                step = StepInput(hour * HOUR_NS, inputs={"inflow": np.array([1.0, 2.0])})
                found = await asyncio.gather(*(s.advance([step]) for s in sessions))
                assert [len(results) for results in found] == [1] * 5
                assert found[4][0].outputs["volume"].tolist() == [10.0 + hour, 10.0 + 2 * hour]

    with process(str(ROOT / "tests" / "rawtwin.py"), "--port", "0") as (_, address):
        bounded(lambda: story(address))


def test_members_of_one_process_share_a_stream_until_the_last_leaves() -> None:
    async def story() -> None:
        async with linked() as one:
            other = await Link.connect(one.address, "other")
            assert one.line is other.line
            await other.session("b", 2, {}, epoch=1)
            session = await one.session("a", 1, {}, epoch=1)
            await other.close()
            assert len(await session.advance(INPUTS)) == len(INPUTS)
            third = await Link.connect(one.address, "third")
            assert third.line is one.line
            await third.close()

    bounded(story)


# where the model's code runs


class Placed(Reservoirs):
    """Reservoirs that remember which thread did each step, and may take their time."""

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        super().open(seed, parameters)
        self.seed = seed
        self.begun.clear()

    def advance(self, step: Step) -> None:
        self.where.append(threading.get_ident())
        if self.seed == 1:
            self.begun.set()
            assert self.gate_of_one.wait(20)
        if self.seed == 2 and step.time_ns == 3 * HOUR_NS:
            time.sleep(0.1)
        super().advance(step)

    where: list[int]
    begun: threading.Event
    gate_of_one: threading.Event


def placed() -> type[Placed]:
    fresh = {"where": [], "begun": threading.Event(), "gate_of_one": threading.Event()}
    return type("Placed", (Placed,), fresh)


def test_a_quick_step_is_done_where_it_is_read_and_a_slow_one_in_a_thread() -> None:
    twin = placed()

    async def story() -> None:
        async with linked(twin, ServeOptions(inline_s=0.02)) as link:
            session = await link.session("me", 2, {}, epoch=1)
            for hour in range(5):
                await session.advance([StepInput(hour * HOUR_NS)])
        here = [thread == threading.get_ident() for thread in twin.where]
        # nothing is known before the first; the slow fourth was not to be foreseen
        assert here == [False, True, True, True, False]

    bounded(story)


def test_while_a_step_takes_long_health_and_repeats_are_answered_and_the_model_is_left_alone() -> (
    None
):
    twin = placed()

    async def story() -> None:
        async with linked(twin, ServeOptions(inline_s=20.0)) as link:
            quick = await link.session("quick", 0, {}, epoch=1)
            await quick.advance([StepInput(0)])
            slow = await link.session("slow", 1, {}, epoch=1)
            waits = asyncio.create_task(slow.advance([StepInput(0)]))
            assert await asyncio.to_thread(twin.begun.wait, 20)
            async with grpc.aio.insecure_channel(link.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                asked = health_pb2.HealthCheckRequest()
                answer = await health.Check(asked, timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                again = frame(2, "advance", session=quick.id, steps=steps(0))
                stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(channel)
                (repeat,) = await answers(stub, again)
                assert len(repeat.advanced.results) == 1
            after = asyncio.create_task(quick.advance([StepInput(HOUR_NS)]))
            await asyncio.wait([after], timeout=0.1)
            assert len(twin.where) == 2, "one model at a time"
            twin.gate_of_one.set()
            assert len(await waits) == len(await after) == 1

    bounded(story)


def test_with_two_threads_a_long_step_holds_nobody_up() -> None:
    twin = placed()

    async def story() -> None:
        async with linked(twin, ServeOptions(threads=2, inline_s=20.0)) as link:
            slow = await link.session("slow", 1, {}, epoch=1)
            waits = asyncio.create_task(slow.advance([StepInput(0)]))
            assert await asyncio.to_thread(twin.begun.wait, 20)
            quick = await link.session("quick", 0, {}, epoch=1)
            for hour in range(3):
                assert await quick.advance([StepInput(hour * HOUR_NS)])
            assert not waits.done()
            twin.gate_of_one.set()
            assert len(await waits) == 1

    bounded(story)


# errors


def test_a_failing_step_blames_the_twin_and_keeps_the_steps_before_it() -> None:
    async def story() -> None:
        async with linked() as link:
            session = await link.session("me", 7, {}, epoch=1)
            state = await session.snapshot()
            bad = StepInput(HOUR_NS, inputs={"inflow": np.array([13.0, 0.0])})
            with pytest.raises(TwinError, match="ZeroDivisionError: thirteen") as caught:
                await session.advance([StepInput(0), bad, StepInput(2 * HOUR_NS)])
            assert caught.value.reason is Reason.TWIN_FAILED
            assert caught.value.metadata == {"exception": "ZeroDivisionError", "member": "me"}
            assert [result.time_ns for result in session.done] == [0]
            with pytest.raises(TwinError, match="thirteen"):
                await session.advance([StepInput(2 * HOUR_NS)])
            await session.restore(state)
            assert len(await session.advance([StepInput(0)])) == 1

    bounded(story)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (StepInput(0, inputs={"inflow": np.array([math.nan, 0.0])}), Reason.NOT_FINITE),
        (StepInput(0, inputs={"inflow": np.zeros(3)}), Reason.WRONG_SHAPE),
        (StepInput(0, inputs={"outflow": np.zeros(2)}), Reason.UNKNOWN_VARIABLE),
    ],
)
def test_a_wrong_input_is_named(bad: StepInput, reason: Reason) -> None:
    async def story() -> None:
        async with linked() as link:
            session = await link.session("me", 7, {}, epoch=1)
            with pytest.raises(FederationError) as caught:
                await session.advance([bad])
            assert caught.value.reason is reason
            assert caught.value.metadata["member"] == "me"

    bounded(story)


def test_a_wrong_parameter_is_named_and_the_link_lives_on() -> None:
    async def story() -> None:
        async with linked() as link:
            for parameters, reason in (
                ({"start": 1.0}, Reason.UNKNOWN_PARAMETER),
                ({"start_m3": math.nan}, Reason.NOT_FINITE),
            ):
                with pytest.raises(FederationError) as caught:
                    await link.session("me", 7, parameters, epoch=1)
                assert caught.value.reason is reason
            session = await link.session("me", 7, {}, epoch=1)
            assert await session.advance(INPUTS)

    bounded(story)


class Misbehaving(twin_pb2_grpc.TwinServicer):
    """Opens sessions and answers every advance with the given message."""

    def __init__(self, result: twin_pb2.StepResult) -> None:
        self.result = result

    async def Describe(  # noqa: N802
        self, request: twin_pb2.DescribeRequest, context: object
    ) -> twin_pb2.DescribeResponse:
        description = codec.encode_description(Reservoirs().describe())
        return twin_pb2.DescribeResponse(description=description)

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[twin_pb2.SessionRequest], context: object
    ) -> AsyncIterator[twin_pb2.SessionResponse]:
        async for request in request_iterator:
            answer = twin_pb2.SessionResponse(session=request.session, frame=request.frame)
            if request.HasField("advance"):
                answer.advanced.results.append(self.result)
            else:
                answer.opened.SetInParent()
            yield answer

    async def Flexibility(  # noqa: N802
        self, request: twin_pb2.FlexibilityRequest, context: object
    ) -> twin_pb2.FlexibilityResponse:
        return twin_pb2.FlexibilityResponse()


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (StepResult(0, outputs={"volume": np.array([1.0, math.nan])}), Reason.NOT_FINITE),
        (StepResult(0, outputs={"volume": np.zeros(1)}), Reason.WRONG_SHAPE),
        (StepResult(0, outputs={"colour": np.zeros(2)}), Reason.UNDECLARED_OUTPUT),
        (StepResult(0, next_ns=0), Reason.TIME_REGRESSION),
        (StepResult(5), Reason.INVALID_FRAME),
    ],
)
def test_a_twin_in_any_language_is_held_to_its_description(
    result: StepResult, reason: Reason
) -> None:
    async def story() -> None:
        server = grpc.aio.server()
        servicer = Misbehaving(codec.encode_step_result(result))  # type: ignore[abstract]
        twin_pb2_grpc.add_TwinServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with await Link.connect(f"127.0.0.1:{port}", "odd") as link:
            session = await link.session("odd", 1, {}, epoch=1)
            with pytest.raises(TwinError) as caught:
                await session.advance([StepInput(0)])
            assert caught.value.reason is reason
            with pytest.raises(TwinError, match="answered snapshot with opened"):
                await session.snapshot()
        await server.stop(0)

    bounded(story)


def test_an_oversized_frame_or_answer_hits_only_its_session() -> None:
    limit = 100_000

    async def story() -> None:
        served = ServeOptions(max_message_bytes=limit)
        async with linked(served=served, options=LinkOptions(max_message_bytes=limit)) as link:
            session = await link.session("me", 7, {"ballast_bytes": 2.0 * limit}, epoch=1)
            huge = StepInput(0, inputs={"inflow": np.zeros(limit)})
            with pytest.raises(ScenarioError, match="MESSAGE_TOO_LARGE: a frame to me has 800"):
                await session.advance([huge])
            with pytest.raises(ScenarioError, match="MESSAGE_TOO_LARGE: the answer of water"):
                await session.snapshot()
            assert await session.advance(INPUTS)

    bounded(story)


def test_a_frame_beyond_the_twins_own_limit_is_called_too_large() -> None:
    async def story() -> None:
        async with linked(served=ServeOptions(max_message_bytes=10_000)) as link:
            session = await link.session("me", 7, {}, epoch=1)
            with pytest.raises(ScenarioError) as caught:
                await session.advance([StepInput(0, inputs={"inflow": np.zeros(10_000)})])
            assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
            other = await link.session("me", 7, {}, epoch=1)
            assert await other.advance(INPUTS)

    bounded(story)


def test_a_busy_port_is_refused_by_name() -> None:
    async def story() -> None:
        async with serving(Reservoirs, "water") as (address, _):
            port = int(address.rpartition(":")[2])
            with pytest.raises(ScenarioError, match=f"PORT_IN_USE.*127.0.0.1:{port}"):
                async with serving(Reservoirs, "water", ServeOptions(port=port)):
                    pass

    bounded(story)


def test_a_twin_that_can_not_be_built_says_why() -> None:
    def broken() -> Twin:
        raise KeyError("no data")

    async def story() -> None:
        with pytest.raises(TwinError, match="TWIN_FAILED: water failed: KeyError: 'no data'"):
            async with serving(broken, "water"):
                pass

    bounded(story)


def test_where_nobody_listens_the_twin_is_unreachable() -> None:
    async def story() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(ScenarioError, match="UNREACHABLE: nothing answers as ghost"):
                await Link.connect(address, "ghost", LinkOptions(connect_timeout_s=0.3))

    bounded(story)


# streams and processes break


class Wire:
    """A TCP relay that can be deaf to the twin's answers, and be cut."""

    def __init__(self, target: str) -> None:
        self.port = int(target.rpartition(":")[2])
        self.deaf = False
        self.swallowed = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers += [writer, up_writer]
        for source, sink, answers_ in ((reader, up_writer, False), (up_reader, writer, True)):
            self._tasks.append(asyncio.create_task(self._pump(source, sink, answers_)))

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers_: bool
    ) -> None:
        while data := await source.read(65536):
            if answers_ and self.deaf:
                self.swallowed.set()
            else:
                sink.write(data)


def test_a_cut_stream_is_taken_up_again_and_nothing_is_done_twice() -> None:
    local = Session(Reservoirs(), "me")
    local.open(7, {})
    expected = [local.advance(step) for step in INPUTS]

    async def story() -> None:
        async with (
            serving(Reservoirs, "water") as (address, _),
            Wire(address) as wire,
            await Link.connect(wire.address, "water", LinkOptions(resume_timeout_s=10)) as link,
        ):
            session = await link.session("me", 7, {}, epoch=1)
            got = await session.advance(INPUTS[:1])
            before = Reservoirs.steps_done
            wire.deaf = True
            advance = asyncio.create_task(session.advance(INPUTS[1:]))
            while Reservoirs.steps_done < before + 3:
                await asyncio.sleep(0.01)
            await wire.swallowed.wait()
            wire.deaf = False
            wire.cut()
            got += await advance
            assert same(got, expected)
            assert Reservoirs.steps_done == before + 3

    bounded(story)


def test_a_stream_that_breaks_under_many_frames_loses_none_and_does_none_twice() -> None:
    local = {}
    for seed in range(8):
        session = Session(Reservoirs(), f"m{seed}")
        session.open(seed, {})
        local[seed] = [session.advance(step) for step in INPUTS]

    async def story() -> None:
        async with (
            serving(Reservoirs, "water", ServeOptions(inline_s=1.0)) as (address, _),
            Wire(address) as wire,
            await Link.connect(wire.address, "water", LinkOptions(resume_timeout_s=10)) as link,
        ):
            sessions = [await link.session(f"m{seed}", seed, {}, epoch=1) for seed in range(8)]
            got = {seed: await sessions[seed].advance(INPUTS[:1]) for seed in range(8)}
            before = Reservoirs.steps_done
            wire.deaf = True
            advances = [asyncio.create_task(session.advance(INPUTS[1:])) for session in sessions]
            while Reservoirs.steps_done < before + 3 * 8:
                await asyncio.sleep(0.01)
            await wire.swallowed.wait()
            wire.deaf = False
            wire.cut()
            for seed, advance in enumerate(advances):
                got[seed] += await advance
                assert same(got[seed], local[seed])
            assert Reservoirs.steps_done == before + 3 * 8

    bounded(story)


def test_a_session_that_nobody_comes_back_to_is_closed() -> None:
    closed = threading.Event()

    class Closing(Reservoirs):
        def close(self) -> None:
            closed.set()

    async def story() -> None:
        async with serving(Closing, "water", ServeOptions(linger_s=0.05)) as (address, _):
            async with await Link.connect(address, "water") as link:
                await link.session("me", 7, {}, epoch=1)
            assert await asyncio.to_thread(closed.wait, 20)

    bounded(story)


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that says on stderr what it serves; gives it and its address."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        try:
            assert child.stderr is not None
            line = child.stderr.readline()
            found = re.search(r"^serving \S+ at (\S+)", line)
            assert found, line + child.stderr.read()
            yield child, found[1]
        finally:
            child.kill()


def test_a_twin_without_our_sdk_gives_what_one_with_it_gives() -> None:
    local = Session(Reservoirs(), "me")
    local.open(7, {"start_m3": 20.0})
    expected = [local.advance(step) for step in INPUTS]

    async def story(address: str) -> None:
        async with await Link.connect(address, "raw") as link:
            session = await link.session("me", 7, {"start_m3": 20.0}, epoch=1)
            got = await session.advance(INPUTS[:3])
            for ours, theirs in zip(expected, got, strict=False):
                assert same(ours.outputs["volume"], theirs.outputs["volume"])
                # which input told of a cause is the SDK's to know; the raw twin leaves it out
                plain = tuple(replace(event, through=()) for event in ours.events)
                assert same(plain, theirs.events)
                assert same(ours.causes, theirs.causes)
            assert got[2].events[0].causes == ("storm/1", "storm/2")
            assert await session.flexibility([HOUR_NS]) is None
            with pytest.raises(TwinError, match="UNSUPPORTED: a raw twin has no snapshot"):
                await session.snapshot()
            await session.close()

    with process(str(ROOT / "tests" / "rawtwin.py"), "--port", "0") as (_, address):
        bounded(lambda: story(address))


@pytest.mark.parametrize("think_s", [0.0, 30.0], ids=["idle", "busy"])
def test_a_killed_twin_is_lost_at_once(think_s: float) -> None:
    async def story(child: subprocess.Popen[str], address: str) -> None:
        # far longer than the test may take: nothing here waits for a deadline
        patient = LinkOptions(answer_timeout_s=600, keepalive_s=600, resume_timeout_s=0.2)
        async with await Link.connect(address, "raw", patient) as link:
            session = await link.session("me", 7, {"think_s": think_s}, epoch=1)
            advance = asyncio.create_task(session.advance([StepInput(0)]))
            await asyncio.wait([advance], timeout=0.5 if think_s else 20)
            child.kill()
            child.wait()
            if think_s:
                with pytest.raises(TwinError, match="MEMBER_LOST"):
                    await advance
            else:
                assert len(await advance) == 1
            with pytest.raises(TwinError, match="MEMBER_LOST"):
                await session.advance([StepInput(HOUR_NS)])

    with process(str(ROOT / "tests" / "rawtwin.py"), "--port", "0") as (child, address):
        bounded(lambda: story(child, address))


def test_a_twin_that_owes_an_answer_too_long_is_lost() -> None:
    async def story() -> None:
        Reservoirs.gate = threading.Event()
        try:
            async with linked(options=LinkOptions(answer_timeout_s=0.3)) as link:
                session = await link.session("me", 7, {}, epoch=1)
                with pytest.raises(TwinError, match=r"MEMBER_LOST.*no answer within 0.3 s"):
                    await session.advance([StepInput(0)])
                Reservoirs.gate.set()
        finally:
            Reservoirs.gate = None

    bounded(story)


def test_of_members_that_share_a_stream_the_silent_one_is_lost_by_name() -> None:
    twin = placed()

    async def story() -> None:
        patience = LinkOptions(answer_timeout_s=0.5)
        async with linked(twin, ServeOptions(threads=2), patience) as link:
            other = await Link.connect(link.address, "talker", patience)
            quick = await other.session("talker", 0, {}, epoch=1)
            slow = await link.session("dreamer", 1, {}, epoch=1)
            waits = asyncio.create_task(slow.advance([StepInput(0)]))
            hours = 0
            while not waits.done():
                assert await quick.advance([StepInput(hours * HOUR_NS)])
                hours += 1
            with pytest.raises(TwinError, match=r"MEMBER_LOST.*no answer within 0.5 s"):
                await waits
            assert waits.exception().metadata["member"] == "water"  # type: ignore[union-attr]
            assert await quick.advance([StepInput(hours * HOUR_NS)])
            twin.gate_of_one.set()
            await other.close()

    bounded(story)


def test_a_restarted_twin_has_forgotten_its_sessions() -> None:
    async def story() -> None:
        async with serving(Reservoirs, "water", ServeOptions(grace_s=0)) as (address, _):
            link = await Link.connect(address, "water", LinkOptions(resume_timeout_s=20))
            session = await link.session("me", 7, {}, epoch=1)
        port = int(address.rpartition(":")[2])
        async with serving(Reservoirs, "water", ServeOptions(port=port)), link:
            with pytest.raises(TwinError, match=r"MEMBER_LOST.*was restarted"):
                await session.advance([StepInput(0)])
            fresh = await link.session("me", 7, {}, epoch=2)
            assert await fresh.advance([StepInput(0)])

    bounded(story)


# around the frames


def test_a_step_belongs_to_the_trace_of_its_caller() -> None:
    seen: list[int] = []

    class Traced(Reservoirs):
        def advance(self, step: Step) -> None:
            seen.append(trace.get_current_span().get_span_context().trace_id)
            super().advance(step)

    async def story() -> None:
        async with linked(Traced) as link:
            session = await link.session("me", 7, {}, epoch=1)
            caller = trace.SpanContext(4711, 42, is_remote=False, trace_flags=trace.TraceFlags(1))
            with trace.use_span(trace.NonRecordingSpan(caller)):
                await session.advance([StepInput(0)])
            await session.advance([StepInput(HOUR_NS)])
        assert seen[0] == 4711
        assert seen[1] != 4711

    bounded(story)


# the standard services


def test_health_is_answered_while_a_step_is_computed() -> None:
    async def story() -> None:
        Reservoirs.gate = threading.Event()
        try:
            async with linked() as link:
                session = await link.session("me", 7, {}, epoch=1)
                advance = asyncio.create_task(session.advance([StepInput(0)]))
                async with grpc.aio.insecure_channel(link.address) as channel:
                    stub = health_pb2_grpc.HealthStub(channel)
                    for service in ("", "federation.v1.Twin"):
                        answer = await stub.Check(
                            health_pb2.HealthCheckRequest(service=service), timeout=10
                        )
                        assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert not advance.done()
                Reservoirs.gate.set()
                assert len(await advance) == 1
        finally:
            Reservoirs.gate = None

    bounded(story)


def test_reflection_lists_the_services() -> None:
    async def story() -> None:
        async with (
            serving(Reservoirs, "water") as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="*")])
            )
            async for answer in call:
                names = {service.name for service in answer.list_services_response.service}
        assert names == {
            "federation.v1.Twin",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }

    bounded(story)


SERVE = """
import asyncio, sys, time
from federation.wire.serve import ServeOptions, serve
from tests.test_wire import Reservoirs

class Slow(Reservoirs):
    def advance(self, step):
        print("stepping", file=sys.stderr, flush=True)
        time.sleep(0.5)
        super().advance(step)

asyncio.run(serve(Slow, "water", ServeOptions(broker=(sys.argv[1:] or [None])[0])))
"""


def test_a_served_twin_that_is_told_to_end_finishes_its_step_and_goes() -> None:
    async def story(child: subprocess.Popen[str], address: str) -> None:
        assert child.stderr is not None
        async with await Link.connect(address, "water") as link:
            session = await link.session("me", 7, {}, epoch=1)
            advance = asyncio.create_task(session.advance([StepInput(0)]))
            assert await asyncio.to_thread(child.stderr.readline) == "stepping\n"
            child.send_signal(signal.SIGTERM)
            assert len(await advance) == 1
            assert await asyncio.to_thread(child.wait, 20) == 0
            with pytest.raises(TwinError, match="MEMBER_LOST"):
                await session.advance([StepInput(HOUR_NS)])

    with process("-c", SERVE) as (child, address):
        bounded(lambda: story(child, address))
        assert child.stderr is not None
        assert child.stderr.read() == ""
