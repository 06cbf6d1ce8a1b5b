"""Bad lines between cities: each goes on alone, and when they hear each other again they agree."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from federation.broker import clocks, outages
from federation.broker.clocks import Clocks
from federation.control.monitor import Monitor
from federation.control.rules import Rules, Usable
from federation.control.situation import Reading, Situation
from federation.core.ledger import Quality
from federation.errors import FederationError, Reason
from federation.peer.gate import Gate
from federation.peer.live import LiveCity
from federation.twin import HOUR_NS, Event, Step
from federation.v1 import broker_pb2, broker_pb2_grpc, control_pb2, control_pb2_grpc, twin_pb2
from federation.wire.link import Clock, LinkOptions, for_a_look
from federation.wire.orders import Hand
from tests.links import (
    FAR,
    LOSSY,
    PARTITION,
    BadLink,
    Fault,
    bad_link,
    one_way,
)
from tests.links_cities import (
    STEP_NS,
    City,
    Neighbours,
    agree,
    all_good,
    comparisons,
    neighbours,
    one_story,
    pace_of,
    stories,
    until,
)
from tests.test_wire import bounded
from tests.waterworks import EPOCH, GUARD, SAFE, WINDOW_NS, bundle, put, site

BOTH = (("ash", "birch"), ("birch", "ash"))


# -- the link itself -----------------------------------------------------------------------------


@asynccontextmanager
async def echo() -> Any:
    """Somebody who sends back what they get."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def back_s(ends: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> float:
    """How long a byte takes there and back."""
    reader, writer = ends
    began_s = time.monotonic()
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    return time.monotonic() - began_s


def test_a_bad_link_does_to_bytes_what_its_faults_say_and_they_add_up() -> None:
    async def story() -> None:
        async with echo() as address, bad_link(address, 3) as link:
            ends = await asyncio.open_connection("127.0.0.1", link.port)
            with link.having(Fault(delay_s=0.05), Fault(delay_s=0.1, ways=("back",))):
                assert 0.2 <= await back_s(ends) < 1.0
            with link.having(Fault(loss=0.5)):
                # a loss costs 200 ms, and twice as much again each time
                waits_s = [await back_s(ends) for _ in range(4)]
            assert max(waits_s) >= 0.2
            for fault in (PARTITION, one_way("there"), one_way("back")):
                end = link.begin(fault)
                pending = asyncio.create_task(back_s(ends))
                await asyncio.sleep(0.3)
                # ten segments go before a sender waits to be told that they came
                assert fault == one_way("back") or not pending.done()
                end()
                await pending
            assert link.reset() == 1
            assert await ends[0].read() == b""

    bounded(story)


def test_the_losses_of_a_link_follow_its_seed() -> None:
    async def waits_s(seed: int) -> list[bool]:
        async with echo() as address, bad_link(address, seed) as link:
            with link.having(Fault(loss=0.3)):
                ends = await asyncio.open_connection("127.0.0.1", link.port)
                return [await back_s(ends) > 0.15 for _ in range(5)]

    async def story() -> None:
        first, again, other = await asyncio.gather(waits_s(1), waits_s(1), waits_s(6))
        assert first == again != other

    bounded(story)


# -- two cities ----------------------------------------------------------------------------------


@contextmanager
def faulty(links: list[BadLink], *faults: Fault) -> Iterator[None]:
    """Faults on several links."""
    ends = [link.begin(fault) for link in links for fault in faults]
    try:
        yield
    finally:
        for end in ends:
            end()


async def gone_on(city: City, steps: int) -> None:
    """Wait until a city has made some steps."""
    from_ns = city.settled_ns
    await until(lambda: city.settled_ns > from_ns + steps * STEP_NS)


async def alone(city: City, neighbour: str, steps: int = 3) -> None:
    """Wait until a city has marked what it has of its neighbour, and gone on for some steps."""
    await until(lambda: city.quality(neighbour) is not Quality.GOOD)
    await gone_on(city, steps)


def test_both_cities_go_on_alone_in_a_partition_and_tell_the_same_story_of_it(
    tmp_path: Path,
) -> None:
    """Held values are marked, come with their own times, and afterwards nothing is unknown."""

    async def story() -> None:
        async with neighbours(tmp_path, BOTH, pace_of(0.5)) as found:
            await all_good(found)
            ash, birch = found.cities["ash"], found.cities["birch"]
            cut_unix_ns = time.time_ns()
            with faulty(found.between("ash", "birch"), PARTITION):
                await asyncio.gather(alone(ash, "birch"), alone(birch, "ash"))
                marked = {c.name: c.records(o, "station_load")[-1] for c, o in _both(found)}
                healed_unix_ns = time.time_ns()
            await all_good(found)
            agree(found)
            for city, other in _both(found):
                record, receive_ns = marked[city.name]
                assert record.quality in (Quality.STALE, Quality.HELD)
                # the last that was known, at the instant from which it is held
                before = [r for r, _ in city.records(other, "station_load") if r < record]
                assert record.value.tolist() == before[-1].value.tolist()
                assert cut_unix_ns < receive_ns < healed_unix_ns
                outage = next(o for o in city.outages() if o.start_ns == record.time_ns)
                assert outage.end_ns is not None
                assert outage.end_unix_ns is not None
                assert outage.end_ns > record.time_ns + 3 * STEP_NS
                assert set(outage.variables) == {"station_load", "station_noted"}
                # what came late came when the line was back, with the instants that it is of
                late = [each for each in outage.late if each.time_ns > record.time_ns]
                assert len(late) >= 3
                assert all(each.receive_ns > healed_unix_ns for each in late)
            one_story(found)
            for reader, owner in ((ash, birch), (birch, ash)):
                # it is told with the first step afterwards
                await until(partial(was_told, reader, owner))
                heard = [o for o in owner.outages() if o.is_reader][-1]
                assert heard.start_unix_ns is not None
                assert heard.end_unix_ns is not None
                assert heard.start_unix_ns < healed_unix_ns < heard.end_unix_ns
            await told_over_the_wire(ash)

    bounded(story)


def was_told(reader: City, owner: City) -> bool:
    """Whether a city knows by now that another one went on without it."""
    return bool(stories(reader, owner)[1])


def _both(found: Neighbours) -> list[tuple[City, str]]:
    return [(found.cities["ash"], "birch"), (found.cities["birch"], "ash")]


async def told_over_the_wire(city: City) -> None:
    """What a person asks of a broker is what is on its record."""
    async with grpc.aio.insecure_channel(city.broker.address) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        request = broker_pb2.ListOutagesRequest(run=city.run.name)
        answer = await stub.ListOutages(request)
        own = city.outages()
        assert [o.start_ns for o in answer.outages] == [o.start_ns for o in own]
        late = [len(o.late_values) for o in answer.outages]
        assert late == [sum(len(each.values) for each in o.late) for o in own]
        text = outages.words(answer)
        assert "birch was stale from" in text
        assert "was without this city from" in text


def test_after_every_fault_of_a_line_nothing_is_lost_and_nothing_told_twice(
    tmp_path: Path,
) -> None:
    """Silence one way and the other, a flapping line, a storm of reconnections, a fifth of the
    packets lost; and several of them at once."""

    async def story() -> None:
        async with neighbours(tmp_path, BOTH, pace_of(0.4), seed=2) as found:
            links = found.between("ash", "birch")
            first, second = links

            async def spell(*faults: Fault, seconds: float) -> None:
                with faulty(links, *faults):
                    await asyncio.sleep(seconds)

            for trouble in (
                lambda: spell(one_way("there"), seconds=1.2),
                lambda: spell(one_way("back"), seconds=1.2),
                lambda: asyncio.gather(first.flap(3, 0.3, 0.3), second.storm(10, 0.1)),
                lambda: asyncio.gather(
                    spell(LOSSY, Fault(delay_s=0.1, jitter_s=0.1), seconds=3.0),
                    first.storm(3, 0.7),
                ),
            ):
                await trouble()
                await all_good(found)
            agree(found)
            one_story(found)
            assert first.resets + second.resets > 5

    bounded(story)


def test_a_line_of_two_seconds_makes_nothing_late_where_steps_are_further_apart(
    tmp_path: Path,
) -> None:
    """It is connected, opened and answered over round trips of two seconds."""

    async def story() -> None:
        pairs, pace = BOTH[:1], pace_of(3.0)
        async with neighbours(tmp_path, pairs, pace, faults=[FAR], ahead=4) as found:
            ash = found.cities["ash"]
            at_ns = ash.joined_ns["birch"]
            await until(lambda: ash.settled_ns >= at_ns + 3 * STEP_NS)
            agree(found)
            told = [r for r, _ in ash.records("birch", "station_load")]
            # the first step pays for the stream
            assert [r.quality for r in told if r.time_ns > at_ns][:2] == [Quality.GOOD] * 2

    bounded(story)


def test_a_session_that_the_city_has_forgotten_gives_the_same_answers_again(
    tmp_path: Path,
) -> None:
    """However often, also from a saved state, and although the city's run has gone on."""

    async def story() -> None:
        async with neighbours(tmp_path, BOTH[:1], pace_of(0.05, 0.5)) as found:
            ash, birch = found.cities["ash"], found.cities["birch"]
            await all_good(found)
            for _ in range(4):
                await gone_on(ash, 30)
                gate = birch.broker.gate
                assert gate is not None
                for service in list(gate._services.values()):
                    await asyncio.to_thread(service.stop)
                gate._services.clear()
                found.links["ash", "birch"].reset()
            await all_good(found)
            ((_, comparison),) = comparisons(found)
            assert (comparison.lost, comparison.doubled, comparison.wrong) == ((), (), ())
            assert comparison.writes > 30
            assert ash.run.settled_ns < 0 or ash.broker.store.snapshots(ash.run.name, "birch")

    bounded(story)


def test_a_link_that_looks_is_patient_where_a_link_to_a_twin_is_not() -> None:
    usual = LinkOptions()
    found = for_a_look(usual)
    # a line of two seconds takes three round trips to open a stream
    assert found.attempt_s >= 6.0 <= found.connect_timeout_s
    # and gRPC's servers take a ping every five seconds at most
    assert 5.0 < found.keepalive_s < usual.keepalive_s
    # the other city keeps a session for a minute
    assert usual.resume_timeout_s < found.resume_timeout_s < 60.0


# -- who acts over a bad line ----------------------------------------------------------------------


def test_a_lease_ends_without_its_guard_and_an_order_that_the_line_held_up_does_nothing() -> None:
    async def story() -> None:
        async with (
            site() as north,
            bad_link(north.address) as link,
            Hand(link.address, GUARD) as guard,
        ):
            await put(guard, bundle(lease_s=5))
            assert [r.outputs["speed_now"][0] for r in await north.run(2)] == [7.0, 7.0]
            with link.having(PARTITION):
                late = bundle("late", {"north": 9.0}, expires_s=10)
                asked = asyncio.create_task(guard.select(late, "north", EPOCH, WINDOW_NS))
                # nobody prolongs the lease, and time goes on
                alone = [r.outputs["speed_now"][0] for r in await north.run(12)]
                assert alone == [7.0] * 3 + [SAFE] * 9
                assert not asked.done()
            with pytest.raises(FederationError) as caught:
                await asked
            assert caught.value.reason is Reason.EXPIRED
            assert [r.outputs["speed_now"][0] for r in await north.run(1)] == [SAFE]

    bounded(story)


# -- three cities --------------------------------------------------------------------------------


CHAIN = (("ash", "birch"), ("birch", "cedar"))
RING = (*CHAIN, ("cedar", "ash"))


@pytest.mark.parametrize("pairs", [CHAIN, RING], ids=["chain", "ring"])
def test_three_cities_in_a_chain_and_in_a_ring_agree_after_their_lines_were_down_by_turns(
    pairs: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    """Each is told of what its neighbour wrote, and of what that one was told of by its own; of
    nothing twice, and in a ring of nothing that it wrote itself."""

    async def story() -> None:
        async with neighbours(tmp_path, pairs, pace_of(0.4), seed=3) as found:
            await all_good(found)
            for turn, (pair, link) in enumerate(list(found.links.items())[-2:]):
                if turn % 2:
                    link.reset()
                with faulty([link], PARTITION):
                    await alone(found.cities[pair[0]], pair[1], 1)
                    # the others hear each other as before
                    rest = {p: k for p, k in found.links.items() if p != pair}
                    await all_good(replace(found, links=rest))
            await all_good(found)
            agree(found)
            one_story(found)
            ash = found.cities["ash"]
            told = ash.wrote(of="birch").keys()
            assert told & found.cities["birch"].wrote().keys()
            assert told & found.cities["cedar"].wrote().keys()
            assert not told & ash.wrote().keys()

    bounded(story)


# -- clocks that lie -----------------------------------------------------------------------------


def test_a_clock_is_believed_within_its_round_trip_and_not_after_it_has_jumped() -> None:
    now_s = [0.0]
    watched = Clocks(dict, lambda: now_s[0])

    def read(offset_s: float, round_trip_s: float = 0.01) -> str:
        now_s[0] += 10.0
        watched.take("birch", Clock(offset_s, round_trip_s))
        return watched.fault("birch", 1.0)

    assert watched.fault("birch", 1.0) == ""
    assert [read(offset_s) for offset_s in (0.1, 0.104, 0.107)] == ["", "", ""]
    # four seconds there and back: it may be anywhere within two
    assert read(1.9, 4.0) == ""
    assert "off" in read(1.6)
    # it was set: what was known is void at once, however short the round trip was
    assert watched.of("birch") == Clock(1.6, 0.01)
    # now it shows the right time, and is believed when it has done so for a while
    told = [read(0.0) for _ in range(clocks.REMEMBERED)]
    assert "jumped" in told[0]
    assert told[-1] == ""
    assert all("jumped" in each for each in told[:-1])


LIES: Mapping[str, Callable[[int], float]] = {
    "elm": lambda count: 7.0,
    "fir": lambda count: 3.0 * (count % 2),
}
"""By how much the clocks of cities are off, each time that they are asked."""


def test_nothing_acts_on_what_a_city_tells_whose_clock_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is off and one jumps. Their values are marked, their status says why, and the guard's
    monitor does not take them. LEVEL45 4."""
    asked: Counter[str] = Counter()

    async def read_clock(
        self: Gate, request: twin_pb2.ReadClockRequest, context: Any
    ) -> twin_pb2.ReadClockResponse:
        asked[self.city.name] += 1
        answer = twin_pb2.ReadClockResponse()
        lie_s = LIES[self.city.name](asked[self.city.name])
        now_ns = time.time_ns() + round(lie_s * 1e9)
        answer.receive_time.FromNanoseconds(now_ns)
        answer.send_time.FromNanoseconds(now_ns)
        return answer

    monkeypatch.setattr(Gate, "ReadClock", read_clock)
    monkeypatch.setattr(clocks, "EVERY_S", 0.2)

    async def watched(ash: City, liar: str) -> None:
        while "its clock" not in (await clock_of(ash, liar)).fault:
            await asyncio.sleep(0.1)
        await until(lambda: any(o.peer == liar for o in ash.outages()))
        # it is heard all the same: the values go on, marked
        at_ns = ash.settled_ns
        await until(lambda: ash.settled_ns > at_ns + 4 * STEP_NS)
        records = [r for r, _ in ash.records(liar, "station_load") if r.time_ns > at_ns]
        assert len({float(r.value[0]) for r in records}) >= 2
        assert {r.quality for r in records} <= {Quality.HELD, Quality.STALE}
        clock = await clock_of(ash, liar)
        assert "its clock" in clock.fault
        usable = Usable(age_min=60.0)
        name = f"{liar}.station_load"
        monitor = Monitor(
            Rules.model_construct(values={name: usable}, never=()),
            {liar: ash.run.descriptions[liar]},
        )
        last = Reading(records[-1].value, at_ns, records[-1].quality, 0.0)
        for reading, why in (
            (last, f"{name} is {last.quality.name.lower()}"),
            # an offset beyond the bound decides whatever the quality
            (last._replace(quality=Quality.GOOD, clock_error_s=7.0), "clock"),
        ):
            situation = Situation(ash.run.name, at_ns, {(liar, "station_load"): reading})
            value, fault = monitor.value(situation, name)
            assert value is None
            assert why in fault

    async def story() -> None:
        pairs = [("ash", liar) for liar in LIES]
        async with neighbours(tmp_path, pairs, pace_of(0.4)) as found:
            ash = found.cities["ash"]
            await asyncio.gather(*(watched(ash, liar) for liar in LIES))

    bounded(story)


async def clock_of(city: City, member: str) -> control_pb2.ClockReading:
    """What a city's broker says of a member's clock."""
    async with grpc.aio.insecure_channel(city.broker.address) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        answer = await stub.Why(control_pb2.WhyRequest(run=city.run.name))
        return next(m.clock for m in answer.members if m.member == member)


def from_tomorrow(event: Event) -> list[Event]:
    return [replace(event, time_ns=event.time_ns + 24 * HOUR_NS)]


def under_a_strange_name(event: Event) -> list[Event]:
    return [replace(event, id=f"ash/{event.id.rpartition('/')[2]}")]


def twice(event: Event) -> list[Event]:
    return [event, event]


def for_a_strange_cause(event: Event) -> list[Event]:
    return [replace(event, causes=("station/1",))]


STORIES = {
    "elm": from_tomorrow,
    "fir": under_a_strange_name,
    "oak": twice,
    "yew": for_a_strange_cause,
}
"""What cities make of what has happened."""


def test_a_city_that_tells_what_can_not_be_ends_no_run_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is not taken, its values are marked, and when it is honest again it is heard."""
    is_lying = [True]

    class Liar(LiveCity):
        def advance(self, step: Step) -> None:
            super().advance(step)
            if is_lying[0] and step.time_ns > 12 * STEP_NS:
                lie = STORIES[self.describe().model.removeprefix("city-")]
                step._events = [told for event in step._events for told in lie(event)]

    monkeypatch.setattr("federation.peer.gate.LiveCity", Liar)

    async def story() -> None:
        pairs = [("ash", liar) for liar in STORIES]
        async with neighbours(tmp_path, pairs, pace_of(0.2, 0.3)) as found:
            ash = found.cities["ash"]

            def marked() -> bool:
                return all(
                    any(o.peer == liar and o.quality is Quality.STALE for o in ash.outages())
                    for liar in STORIES
                )

            await until(lambda: ash.settled_ns > 12 * STEP_NS)
            await until(marked)
            await gone_on(ash, 5)
            for liar in STORIES:
                assert not [e for e in ash.events(liar) if e.event.time_ns > e.time_ns]
            is_lying[0] = False
            await all_good(found)
            for pair, comparison in comparisons(found):
                assert (comparison.doubled, comparison.wrong) == ((), ()), pair

    bounded(story)
