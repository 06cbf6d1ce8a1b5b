"""What is told of two cities at the end comes from their records, and what is wrong is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cities import GIVER, HIT, quantity, summary
from benchmarks.cities_files import document, write
from benchmarks.cities_record import CityRecord, covers, orders, promises
from benchmarks.cities_wire import BEYOND, BROKER, apart, can_separate
from federation.control import rules
from federation.peer.policy import read_policy
from federation.scenario.spec import load, parse
from federation.twin import HOUR_NS, MINUTE_NS, Vector
from federation.v1 import aid_pb2
from federation.wire.credentials import Keyring

BOUND, LAPSED = aid_pb2.Commitment.STATE_BOUND, aid_pb2.Commitment.STATE_LAPSED


def promise(
    id_: str, state: aid_pb2.Commitment.State.ValueType, *quantity: float
) -> aid_pb2.Commitment:
    made = aid_pb2.Commitment(id=id_, state=state)
    made.terms.start_ns = 2 * HOUR_NS
    made.terms.periods_ns.extend([HOUR_NS] * len(quantity))
    made.terms.quantity.extend(quantity)
    return made


def test_a_promise_holds_in_its_periods_and_not_where_nothing_was_promised() -> None:
    terms = promise("a", BOUND, 100.0, 0.0, 50.0).terms
    minutes = (119, 120, 179, 180, 239, 240, 299, 300)
    assert [covers(terms, m * MINUTE_NS) for m in minutes] == [
        False, True, True, False, False, True, True, False,
    ]  # fmt: skip
    assert [quantity(terms, m * MINUTE_NS) for m in (119, 150, 250)] == [0.0, 100.0, 50.0]


def test_what_one_book_has_alone_is_lost_and_what_it_has_twice_is_doubled() -> None:
    here = [promise("a", BOUND, 1.0), promise("b", BOUND, 1.0), promise("c", LAPSED, 1.0)]
    there = [promise("a", BOUND, 1.0), promise("b", LAPSED, 1.0), promise("a", BOUND, 1.0)]
    found = promises(here, there)
    assert (found.delivered, found.lost, found.doubled) == (1, 1, 1)


class Orders(CityRecord):
    """A record of which only the orders that took effect are known."""

    def __init__(self, *causes: str) -> None:
        self.causes = list(causes)

    def orders(self) -> list[str]:
        return self.causes


def test_an_order_that_took_no_effect_is_lost_and_one_that_took_two_is_doubled() -> None:
    found = orders(Orders("operator/1", "operator/2", "operator/2"), ["operator/1", "operator/3"])
    assert (found.delivered, found.lost, found.doubled) == (1, 1, 1)


class Flows(CityRecord):
    """A record of which only what flowed is known."""

    def __init__(self, *flows: tuple[int, int, float]) -> None:
        self.known = [(a, b, np.array([mw])) for a, b, mw in flows]

    def flows(self) -> list[tuple[int, int, Vector]]:
        return self.known


def test_power_without_a_promise_behind_it_is_counted_by_its_steps() -> None:
    bound = [promise("a", BOUND, 100.0)]
    within = Flows((2 * HOUR_NS, 3 * HOUR_NS, -100.0), (3 * HOUR_NS, 9 * HOUR_NS, 0.0))
    assert within.acted_after_expiry(bound) == 0
    assert within.flow_mwh(-1.0) == 100.0
    late = Flows((2 * HOUR_NS, 3 * HOUR_NS + 10 * MINUTE_NS, 40.0))
    assert late.acted_after_expiry(bound) == 2
    assert late.acted_after_expiry([]) == 14


def test_what_the_trials_lost_is_summed_and_a_line_that_never_came_back_says_so() -> None:
    def trial(name: str, lost: int, reconverge_s: float | None) -> dict[str, object]:
        counts = {"delivered": 5, "lost": lost, "doubled": 0, "acted_after_expiry": 0}
        return {"trial": name, **counts, "reconverge_s": reconverge_s, "shelby": {}, "mojave": {}}

    found = summary([trial("aid, whole", 0, None), trial("aid, cut", 2, 1.5)], "proxy")
    assert (found["delivered"], found["lost"], found["reconverge_s"]) == (10, 2, 1.5)
    assert summary([trial("aid, cut", 0, None)], "proxy")["reconverge_s"] is None


def test_the_files_of_both_cities_are_in_order_and_each_believes_the_other(tmp_path: Path) -> None:
    for plan, files in zip((HIT, GIVER), write((HIT, GIVER), tmp_path, 500.0), strict=True):
        scenario = load(files.scenario)
        assert scenario.parameters["energy.tie_lines_on"] == 1
        policy = read_policy(files.policy.read_text(encoding="utf-8"), "policy")
        assert any(rule.name == "mutual-aid" for rule in policy.rules)
        power = rules.parse(files.rules.read_text(encoding="utf-8")).aid["power"]
        assert (power.gives_at_most == 0.0) is plan.hit
        Keyring.load(files.keyring)
    text = document(HIT, horizon_h=6, pace={"factor": 60.0}, neighbour=("mojave", "127.0.0.1:1"))
    members = parse(text).members
    assert members["mojave"].peer is not None
    assert members["mojave"].peer.session == "live"


@pytest.mark.parametrize("kind", ["netns", "proxy"])
def test_a_line_that_is_cut_carries_nothing_and_carries_it_when_it_is_healed(
    kind: str, tmp_path: Path
) -> None:
    if kind == "netns" and not can_separate():
        pytest.skip("this machine lets us have no network namespaces")

    async def story() -> None:
        async with apart(tmp_path, kind) as line:
            one, other = line.places
            server = await asyncio.create_subprocess_exec(
                *other.prefix, "python3", "-c", ECHO, str(other.port),
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert server.stdout is not None
            await server.stdout.readline()
            port = BEYOND if one.prefix else int(one.beyond.rpartition(":")[2])
            assert other.port == BROKER or not other.prefix
            caller = await asyncio.create_subprocess_exec(
                *one.prefix, "python3", "-c", CALLER, str(port),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert caller.stdin is not None
            assert caller.stdout is not None

            async def ask(word: bytes, within_s: float) -> bytes:
                caller.stdin.write(word + b"\n")  # type: ignore[union-attr]
                async with asyncio.timeout(within_s):
                    return await caller.stdout.readline()  # type: ignore[union-attr]

            assert await ask(b"one", 10) == b"one\n"
            line.cut()
            with pytest.raises(TimeoutError):
                await ask(b"two", 0.7)
            line.heal()
            async with asyncio.timeout(20):
                assert await caller.stdout.readline() == b"two\n"
            assert await ask(b"three", 10) == b"three\n"
            for process in (caller, server):
                process.terminate()
                await process.wait()

    asyncio.run(story())


ECHO = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    print("ready", flush=True)
    line, _ = server.accept()
    while word := line.recv(100):
        line.sendall(word)
"""

CALLER = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as line:
    for word in sys.stdin.buffer:
        line.sendall(word)
        sys.stdout.buffer.write(line.recv(100))
        sys.stdout.buffer.flush()
"""
