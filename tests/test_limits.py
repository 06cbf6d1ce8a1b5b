"""What one caller may ask of a server: who asks too much is held back, and the others are not."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from federation import loop
from federation.errors import Reason, ScenarioError
from federation.wire import serve
from federation.wire.serve import new_server, start_server
from federation.wire.turnstile import MOST_KNOWN, Allowance, Turnstile


def passes(gate: Turnstile, identity: str) -> bool:
    try:
        gate.call(identity)
    except ScenarioError as refusal:
        return refusal.reason is not Reason.TOO_MANY_CALLS
    return True


@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=200), st.floats(0.5, 20), st.integers(1, 9)
)
def test_nobody_calls_more_often_than_allowed_over_any_span(
    pauses_s: list[float], calls_per_s: float, burst: int
) -> None:
    now_s = 0.0
    gate = Turnstile(Allowance(calls_per_s, burst), lambda: now_s)
    passed_s = []
    for pause_s in pauses_s:
        now_s += pause_s
        if passes(gate, "ann"):
            passed_s.append(now_s)
    for first, start_s in enumerate(passed_s):
        for count, end_s in enumerate(passed_s[first:], 1):
            assert count <= burst + (end_s - start_s) * calls_per_s + 1e-6


def test_who_waits_as_long_as_told_is_let_in_and_others_never_wait() -> None:
    now_s = 100.0
    gate = Turnstile(Allowance(calls_per_s=4.0, burst=2.0), lambda: now_s)
    assert [passes(gate, "ann") for _ in range(3)] == [True, True, False]
    assert passes(gate, "bob")
    with pytest.raises(ScenarioError) as refusal:
        gate.call("ann")
    now_s += float(refusal.value.metadata["retry_after_s"])
    assert passes(gate, "ann")
    assert not passes(gate, "ann")


def test_an_identity_has_so_many_streams_and_a_new_one_when_it_has_left_one() -> None:
    gate = Turnstile(Allowance(streams=2), lambda: 0.0)
    gate.enter("ann")
    gate.enter("ann")
    with pytest.raises(ScenarioError, match="2 streams open"):
        gate.enter("ann")
    gate.enter("bob")
    gate.leave("ann")
    gate.enter("ann")


def test_a_crowd_of_names_takes_no_memory_without_end_and_open_streams_are_not_forgotten() -> None:
    gate = Turnstile(Allowance(streams=1), lambda: 0.0)
    gate.enter("ann")
    for number in range(MOST_KNOWN + 500):
        gate.call(f"n{number}")
    assert len(gate._accounts) == MOST_KNOWN
    with pytest.raises(ScenarioError, match="1 streams open"):
        gate.enter("ann")


def test_who_connects_and_says_nothing_is_put_out_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "HANDSHAKE_MS", 1_500)

    async def story() -> tuple[float, float]:
        server = new_server(1 << 20)
        address, _ = await start_server(server, ("federation.v1.Broker",), "127.0.0.1", 0)
        host, _, port = address.rpartition(":")
        began_s = time.monotonic()
        silent = []
        for _ in range(200):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"PRI * HT")
            silent.append((reader, writer))
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        answered_s = time.monotonic() - began_s
        for reader, writer in silent:
            async with asyncio.timeout(30):
                while await reader.read(1_000):
                    pass
            writer.close()
        ended_s = time.monotonic() - began_s
        await server.stop(0)
        return answered_s, ended_s

    answered_s, ended_s = loop.run(story())
    assert answered_s < ended_s
