"""Promises between cities: whatever is lost, doubled or late, and whoever dies, both are bound or
neither is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.core.aid import (
    Answer,
    Book,
    Deed,
    Record,
    State,
    Terms,
    Word,
    deed_of,
    plain_of,
)
from federation.errors import FederationError, Reason
from federation.twin import HOUR_NS

MOST = 10.0


def unsigned(message: bytes) -> bytes:
    return b""


def terms(
    quantity: float = 4.0, to: str = "ash", hour: int = 0, nonce: str = "n", **more: object
) -> Terms:
    made = Terms(
        "birch",
        to,
        "power",
        "MW",
        hour * HOUR_NS,
        (HOUR_NS,) * 2,
        (quantity,) * 2,
        (30.0,) * 2,
        100,
        nonce,
    )
    return replace(made, **more)  # type: ignore[arg-type]


@dataclass
class Side:
    """A city whose process may be killed: what counts is what is on its disk."""

    city: str
    disk: list[Record] = field(default_factory=list)
    book: Book = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.book = Book(self.city, unsigned)
        for record in self.disk:
            self.book.note(record)

    def do(self, answer: Answer, killed: str = "") -> tuple[Deed, ...]:
        """Write down and say; unless it is killed before the one, or between the two."""
        if killed == "before":
            self.start()
            return ()
        if answer.record is not None:
            self.disk.append(answer.record)
            self.book.note(answer.record)
        if killed == "after":
            self.start()
            return ()
        return answer.say

    def state(self, id_: str) -> State | None:
        held = self.book.held.get(id_)
        return None if held is None else held.state


def two() -> tuple[Side, Side]:
    return Side("birch"), Side("ash")


def test_an_offer_that_is_accepted_in_time_binds_both() -> None:
    giver, taker = two()
    (offer,) = giver.do(giver.book.offer(terms(), (MOST, MOST), 0))
    (yes,) = taker.do(taker.book.hear(offer, 1))
    assert taker.state(offer.commitment) is State.ACCEPTED
    assert taker.book.taken_at(0) == {}  # not to be counted on
    (receipt,) = giver.do(giver.book.hear(yes, 2))
    assert giver.book.given_at(0) == {"power": 4.0}
    assert taker.do(taker.book.hear(receipt, 200)) == ()
    assert taker.book.taken_at(HOUR_NS) == {"power": 4.0}
    assert taker.book.taken_at(2 * HOUR_NS) == giver.book.given_at(2 * HOUR_NS) == {}


def test_an_offer_that_nobody_accepts_in_time_binds_nobody() -> None:
    giver, taker = two()
    (offer,) = giver.do(giver.book.offer(terms(), (MOST, MOST), 0))
    (yes,) = taker.do(taker.book.hear(offer, 99))
    (no,) = giver.do(giver.book.hear(yes, 100))
    assert no.word is Word.REFUSAL
    taker.do(taker.book.hear(no, 101))
    assert giver.state(offer.commitment) is taker.state(offer.commitment) is State.LAPSED
    assert giver.book.kept("power", 0, HOUR_NS) == 0.0
    # and a second word of the taker changes nothing any more
    assert giver.do(giver.book.hear(yes, 50))[0].word is Word.REFUSAL


def test_what_is_kept_for_one_is_not_offered_to_another() -> None:
    giver, _ = two()
    giver.do(giver.book.offer(terms(7.0), (MOST, MOST), 0))
    giver.do(giver.book.offer(terms(7.0, "cedar", hour=2), (MOST, MOST), 0))  # later
    with pytest.raises(FederationError) as caught:
        giver.book.offer(terms(4.0, "cedar", hour=1), (MOST, MOST), 0)
    assert caught.value.reason is Reason.PLAN_INFEASIBLE
    giver.do(giver.book.offer(terms(3.0, "cedar", hour=1), (MOST, MOST), 0))
    assert giver.book.kept("power", 0, 4 * HOUR_NS) == 10.0


def test_who_refuses_says_why_and_frees_what_was_kept() -> None:
    giver, taker = two()
    (offer,) = giver.do(giver.book.offer(terms(), (MOST, MOST), 0))
    (no,) = taker.do(taker.book.hear(offer, 1, ("the tie line is full",)))
    giver.do(giver.book.hear(no, 2))
    assert giver.book.held[offer.commitment].why == "the tie line is full"
    assert giver.book.kept("power", 0, HOUR_NS) == 0.0


def test_what_nobody_asked_for_is_refused_and_leaves_nothing() -> None:
    giver, taker = two()
    (offer,) = giver.do(giver.book.offer(terms(), (MOST, MOST), 0))
    (no,) = taker.do(taker.book.hear(offer, 1, is_asked_for=False))
    assert no.word is Word.REFUSAL
    assert taker.disk == []


def test_both_say_what_was_delivered_and_what_differs_is_seen() -> None:
    giver, taker = two()
    (offer,) = giver.do(giver.book.offer(terms(), (MOST, MOST), 0))
    (yes,) = taker.do(taker.book.hear(offer, 1))
    (receipt,) = giver.do(giver.book.hear(yes, 2))
    taker.do(taker.book.hear(receipt, 3))
    id_ = offer.commitment
    with pytest.raises(FederationError) as caught:
        giver.book.state_delivered(id_, (4.0, 4.0), HOUR_NS)
    assert caught.value.reason is Reason.INSTANT_PASSED
    (told,) = giver.do(giver.book.state_delivered(id_, (4.0, 5.0), 2 * HOUR_NS))
    taker.do(taker.book.hear(told, 4))
    assert not taker.book.held[id_].is_settled
    (mine,) = taker.do(taker.book.state_delivered(id_, (4.0, 3.5), 2 * HOUR_NS))
    giver.do(giver.book.hear(mine, 5))
    held = giver.book.held[id_]
    # no more is paid for than was promised
    assert (held.due_usd("birch"), held.due_usd("ash")) == (240.0, 225.0)
    assert not held.is_settled
    with pytest.raises(FederationError) as caught:
        taker.book.state_delivered(id_, (4.0, 4.0), 2 * HOUR_NS)
    assert caught.value.reason is Reason.REQUEST_DIFFERS
    assert taker.do(taker.book.state_delivered(id_, (4.0, 3.5), 2 * HOUR_NS)) == (mine,)


def test_a_deed_is_the_same_after_it_was_written_down() -> None:
    giver, taker = two()
    (offer,) = giver.do(giver.book.offer(terms(0.1 + 0.2), (MOST, MOST), 0))
    (yes,) = taker.do(taker.book.hear(offer, 1))
    for deed in (offer, yes, replace(yes, word=Word.STATEMENT, delivered=(0.1, 1 / 3))):
        again = deed_of(plain_of(deed))
        assert again == deed
        assert again.message() == deed.message()
        again.check()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (terms(float("nan")), Reason.NOT_FINITE),
        (terms(-1.0), Reason.WRONG_SHAPE),
        (terms(0.0), Reason.WRONG_SHAPE),
        (terms(quantity=1.0, taker="birch"), Reason.WRONG_SHAPE),
        (terms(price_usd=(1.0,)), Reason.WRONG_SHAPE),
        (terms(periods_ns=(0, 1)), Reason.WRONG_SHAPE),
        (terms(start_ns=1 << 63), Reason.WRONG_SHAPE),
    ],
)
def test_what_is_no_promise_is_refused(broken: Terms, reason: Reason) -> None:
    giver, _ = two()
    with pytest.raises(FederationError) as caught:
        giver.book.offer(broken, (MOST, MOST), 0)
    assert caught.value.reason is reason
    assert giver.book.held == {}


CITIES = ("birch", "ash", "cedar")
HAPPENS = ["offer", *["hear"] * 4, "twice", "drop", "wait", "tick", "ask"]
KILLS = st.sampled_from(("", "", "", "before", "after"))


class World:
    """A giver, two takers, and whatever is under way between them."""

    def __init__(self) -> None:
        self.sides = {city: Side(city) for city in CITIES}
        self.away: list[tuple[str, Deed]] = []
        self.now = dict.fromkeys(CITIES, 0)
        self.terms: dict[str, Terms] = {}
        self.settled: dict[tuple[str, str], State] = {}

    def say(self, by: str, deeds: Sequence[Deed]) -> None:
        for deed in deeds:
            held = self.sides[by].book.held.get(deed.commitment)
            agreed = self.terms[deed.commitment] if held is None else held.terms
            self.away.append((agreed.other(by), deed))

    def hear(self, to: str, deed: Deed, killed: str = "") -> None:
        side = self.sides[to]
        self.say(to, side.do(side.book.hear(deed, self.now[to]), killed))

    def check(self) -> None:
        giver = self.sides["birch"]
        for id_, agreed in self.terms.items():
            here, there = giver.state(id_), self.sides[agreed.taker].state(id_)
            assert here is not None or there is None
            if there is State.BOUND:
                assert here is State.BOUND
            if there is State.LAPSED:
                assert here is not State.BOUND
            for city in (agreed.giver, agreed.taker):
                # what is settled stays so, and nobody is bound after the offer has expired
                state = self.sides[city].state(id_)
                before = self.settled.get((city, id_))
                assert before in (None, state)
                if state in (State.BOUND, State.LAPSED):
                    self.settled[city, id_] = state
                if before is None and city == "birch" and state is State.BOUND:
                    assert self.now["birch"] < agreed.expires_ns
        for hour in range(6):
            kept = sum(
                held.terms.at(hour * HOUR_NS)
                for held in giver.book.held.values()
                if held.state in (State.OFFERED, State.BOUND)
            )
            assert kept == giver.book.kept("power", hour * HOUR_NS, (hour + 1) * HOUR_NS) <= MOST
            promised = giver.book.given_at(hour * HOUR_NS).get("power", 0.0)
            counted = sum(
                self.sides[c].book.taken_at(hour * HOUR_NS).get("power", 0.0) for c in CITIES[1:]
            )
            assert counted <= promised <= MOST

    def heal(self) -> None:
        """All are up, and speak until nobody has anything to say."""
        self.away.clear()
        for _ in range(4):
            for city in CITIES:
                for other in CITIES:
                    self.say(city, self.sides[city].book.open_with(other))
            while self.away:
                self.hear(*self.away.pop(0))


@given(st.data())
def test_both_are_bound_or_neither_whatever_happens(data: st.DataObject) -> None:
    world = World()
    giver = world.sides["birch"]
    for number in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(HAPPENS))
        if what == "offer":
            made = terms(
                float(data.draw(st.integers(1, 8))),
                data.draw(st.sampled_from(CITIES[1:])),
                data.draw(st.integers(0, 3)),
                nonce=str(number),
                expires_ns=world.now["birch"] + data.draw(st.integers(1, 20)),
            )
            try:
                answer = giver.book.offer(made, (MOST, MOST), world.now["birch"])
            except FederationError as error:
                assert error.reason is Reason.PLAN_INFEASIBLE  # noqa: PT017
                continue
            killed = data.draw(KILLS)
            world.say("birch", giver.do(answer, killed)) if not killed else giver.do(answer, killed)
            if made.id in giver.book.held:
                world.terms[made.id] = made
        elif what == "wait":  # clocks go as they like
            world.now[data.draw(st.sampled_from(CITIES))] += data.draw(st.integers(1, 15))
        elif what == "tick":
            city = data.draw(st.sampled_from(CITIES))
            for answer in world.sides[city].book.tick(world.now[city]):
                world.say(city, world.sides[city].do(answer, data.draw(KILLS)))
        elif what == "ask":
            city = data.draw(st.sampled_from(CITIES))
            for other in CITIES:
                world.say(city, world.sides[city].book.open_with(other))
        elif world.away:
            index = data.draw(st.integers(0, len(world.away) - 1))
            to, deed = world.away[index] if what == "twice" else world.away.pop(index)
            if what != "drop":
                world.hear(to, deed, data.draw(KILLS))
        world.check()
    world.now = dict.fromkeys(CITIES, 10_000)
    for answer in giver.book.tick(world.now["birch"]):
        world.say("birch", giver.do(answer))
    world.check()
    world.heal()
    world.check()
    for id_, agreed in world.terms.items():
        here, there = giver.state(id_), world.sides[agreed.taker].state(id_)
        assert here in (State.BOUND, State.LAPSED)
        assert (there is State.BOUND) is (here is State.BOUND)
        assert there in (None, State.BOUND, State.LAPSED)
    # each says what was delivered, and hears what the other says
    for id_, agreed in world.terms.items():
        if giver.state(id_) is State.BOUND:
            for city in (agreed.giver, agreed.taker):
                side = world.sides[city]
                answer = side.book.state_delivered(id_, agreed.quantity, agreed.end_ns)
                world.say(city, side.do(answer, data.draw(KILLS)))
    world.heal()
    for id_, agreed in world.terms.items():
        for city in (agreed.giver, agreed.taker):
            held = world.sides[city].book.held.get(id_)
            if held is not None and held.state is State.BOUND and len(held.stated) == 2:
                assert held.is_settled
    for id_, agreed in world.terms.items():
        books = [world.sides[city].book.held.get(id_) for city in (agreed.giver, agreed.taker)]
        told = [set() if held is None else set(held.stated) for held in books]
        assert told[0] == told[1]
    # once more, and everybody from their disks: nothing is any different
    before = {city: dict(side.book.held) for city, side in world.sides.items()}
    for side in world.sides.values():
        side.start()
    world.heal()
    assert before == {city: dict(side.book.held) for city, side in world.sides.items()}
