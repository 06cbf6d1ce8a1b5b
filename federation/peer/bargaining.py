"""Both ends of a bargain between two cities: the one that answers, and the one that asks.

Nothing of a block crosses: prices go one way, and what the boundary's quantities would be, what
they cost beyond exchanging nothing, and which of them depend on each other, go the other way.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from federation.core.aid import MOST_PERIODS, Deed, Terms
from federation.errors import FederationError, PlanError, Reason, ScenarioError, TwinError
from federation.peer.aid import HOLD_S, NONCE, AidDesk
from federation.peer.estate import Ask, lines_of
from federation.plan.bargain import (
    ROUNDS,
    TOLERANCE,
    Agreed,
    Bargain,
    Consent,
    Offer,
    Prices,
    Question,
    Quotas,
    Stake,
)
from federation.plan.border import Discreet, Ends, Holding, ends_of, wholes
from federation.twin import Vector
from federation.v1 import peer_pb2, peer_pb2_grpc
from federation.wire import aid, caller, footing, secure, status
from federation.wire.codec import encode_vector
from federation.wire.link import LinkOptions, channel_options
from federation.wire.malformed import Malformed
from federation.wire.party import Part

MOST_LINES = 64
ASK_S, ASK_AT_LEAST_S = 1.0, 30.0
"""How often a city asks about what it is in doubt of: at first, and after many times in vain."""

MOST_SAID = 8
"""Turns in which two cities have told each other everything; three are enough."""

PAID = 1e-4
"""By which share of what it costs an agreement may pay less: the last digits of prices."""

_log = logging.getLogger(__name__)

Request = peer_pb2.BargainRequest
Response = peer_pb2.BargainResponse


# -- the one that answers --------------------------------------------------------------------


class Conversation:
    """One conversation with a city that asks. It changes nothing before a draft that it offers.

    `allow` fails when the export policy does not let that city have a good.
    """

    def __init__(
        self,
        desk: AidDesk,
        asker: str,
        allow: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk, self._asker, self._allow, self._clock = desk, asker, allow, clock
        self._number = 0
        self._until_s = clock() + desk.options.deadline_s
        self._is_over = False
        self._purpose = ""
        self._lines: tuple[Ask, ...] = ()
        self._start_ns = 0
        self._periods_ns: tuple[int, ...] = ()
        self._holding: Holding
        self._held: list[Vector] = []
        self._ends: Ends
        self._owner: Discreet

    def handle(self, request: Request) -> Response:
        """Answer a message. What it fails with ends the conversation."""
        kind = request.WhichOneof("ask")
        self._number += 1
        if (
            self._is_over
            or request.number != self._number
            or (kind == "open") != (self._number == 1)
        ):
            raise _out_of_order(
                f"message {request.number} ({kind}) where {self._number} is due"
                + (", and the conversation is over" if self._is_over else "")
            )
        if self._clock() > self._until_s:
            limit_s = self._desk.options.deadline_s
            raise ScenarioError(Reason.EXPIRED, f"the conversation is over after {limit_s:g} s")
        if self._number > self._desk.options.rounds + 1:
            raise ScenarioError(
                Reason.PEER_LIMIT,
                f"the limit rounds of this city: {self._desk.options.rounds} in one conversation",
                {"limit": "rounds"},
            )
        response = Response(number=self._number)
        match kind:
            case "open":
                response.stake.CopyFrom(self._open(request.open))
            case "prices":
                usd = aid.decode_numbers(request.prices.usd, self._size, "prices")
                offer = self._owner.answer(Prices(self._number, usd))
                response.offer.CopyFrom(_encode_offer(offer))
            case "quotas":
                quantity = aid.decode_numbers(request.quotas.quantity, self._size, "quotas")
                consent = self._owner.answer(self._quotas(quantity))
                assert isinstance(consent, Consent)
                response.consent.CopyFrom(_encode_consent(consent))
            case "draft":
                response.promise.CopyFrom(self._draft(request.draft))
                self._is_over = True
            case _:
                raise _out_of_order("a message that asks nothing")
        return response

    @property
    def _size(self) -> int:
        return len(self._lines) * len(self._periods_ns)

    def _quotas(self, quantity: Vector) -> Quotas:
        return Quotas(self._number, {self._desk.city: quantity})

    def _open(self, asked: Request.Open) -> Response.Stake:
        if not 0 < len(asked.lines) <= MOST_LINES:
            raise _misshapen(f"a bargain is over 1 to {MOST_LINES} lines")
        periods_ns = tuple(asked.periods_ns)
        if not 0 < len(periods_ns) <= MOST_PERIODS or min(periods_ns) <= 0:
            raise _misshapen(f"a bargain has 1 to {MOST_PERIODS} periods of some length")
        if asked.start_ns < 0 or asked.start_ns + sum(periods_ns) >= 1 << 63:
            raise _misshapen("a bargain is about instants of a run")
        ways = {Request.WAY_GIVE, Request.WAY_TAKE}
        if any(line.way not in ways for line in asked.lines):
            raise _out_of_order("a line says which way something goes")
        lines = tuple((ln.good, ln.unit, ln.way == Request.WAY_GIVE) for ln in asked.lines)
        if len({(good, gives) for good, _, gives in lines}) < len(lines):
            raise _misshapen("two lines are of one good in one direction")
        for good, _, _ in lines:
            self._allow(good, asked.purpose)
        estate = self._desk.estate
        holding = estate.holding(lines, asked.start_ns, periods_ns)
        self._purpose, self._lines, self._holding = asked.purpose, lines, holding
        self._start_ns, self._periods_ns = asked.start_ns, periods_ns
        self._take_stand()
        stake, options = self._ends.stake, self._desk.options
        answer = Response.Stake(
            high=encode_vector(stake.high),
            parts=stake.part.tolist(),
            whole=self._ends.whole.tolist(),
            rounds=options.rounds,
        )
        answer.deadline_duration.FromNanoseconds(round(options.deadline_s * 1e9))
        return answer

    def _take_stand(self) -> None:
        """Know what is held by now, and what exchanging nothing costs then."""
        desk = self._desk
        at = (self._start_ns, self._periods_ns)
        self._held = [desk.besides(good, gives, *at) for good, _, gives in self._lines]
        lines = lines_of(desk.estate, self._lines, self._held)
        rows = range(0, self._size, len(self._periods_ns))
        self._ends = ends_of(desk.city, self._holding, lines, rows)
        self._owner = Discreet(self._ends.owner)

    def _draft(self, draft: Request.Draft) -> Response.Promise:
        """Offers for what the city gives, if it can keep to all of the draft, now."""
        quantity = aid.decode_numbers(draft.quantity, self._size, "a draft")
        usd = aid.decode_numbers(draft.price_usd, self._size, "a draft's prices")
        aid.check_finite(draft.gap, "a gap")
        if len(draft.nonce) not in NONCE:
            raise _misshapen(f"a nonce has {NONCE.start} to {NONCE.stop - 1} characters")
        is_whole = np.repeat(self._ends.whole, len(self._periods_ns))
        if (quantity[is_whole] != np.rint(quantity[is_whole])).any():
            raise _misshapen("a part of a whole thing can't be promised")
        for good, _, _ in self._lines:
            self._allow(good, self._purpose)
        desk = self._desk
        hold_s = min(max(draft.hold_duration.ToNanoseconds() / 1e9, 0.0), desk.options.hold_most_s)
        with desk.lock:
            self._check_held()
            consent = self._owner.answer(self._quotas(quantity))
            if consent.cost_usd is None:
                raise PlanError(
                    Reason.PLAN_INFEASIBLE,
                    f"{desk.city} can't keep to this draft, or not any more",
                    {"city": desk.city},
                )
            paid_usd = -float(usd @ (self._ends.stake.weight * quantity))
            check_paid(desk.city, paid_usd, float(consent.cost_usd.sum()))
            given, taken = self._terms(quantity, usd, draft.nonce, round(hold_s * 1e9))
            for terms in taken:
                desk.check_guard(terms, gives=False)
            offers = desk.offer(given)
            for terms in taken:
                desk.expect(terms, hold_s)
        return Response.Promise(offers=[aid.encode_deed(deed) for deed in offers])

    def _check_held(self) -> None:
        """What others were promised since the conversation began is not there any more."""
        at = (self._start_ns, self._periods_ns)
        now = [self._desk.besides(good, gives, *at) for good, _, gives in self._lines]
        if any((a != b).any() for a, b in zip(now, self._held, strict=True)):
            self._take_stand()

    def _terms(
        self, quantity: Vector, usd: Vector, nonce: str, hold_ns: int
    ) -> tuple[list[tuple[Terms, list[float]]], list[Terms]]:
        """What the city would give, with all that it has, and what it would take."""
        given, taken = [], []
        shape = (len(self._lines), len(self._periods_ns))
        rows = zip(self._lines, quantity.reshape(shape), usd.reshape(shape), strict=True)
        city = self._desk.city
        for number, ((good, unit, gives), some, price) in enumerate(rows):
            if not some.any():
                continue
            terms = Terms(
                city if gives else self._asker,
                self._asker if gives else city,
                good,
                unit,
                self._start_ns,
                self._periods_ns,
                tuple(some.tolist()),
                tuple(price.tolist()),
                self._desk.now_ns + hold_ns,
                nonce,
            )
            if gives:
                given.append((terms, self._ends.most[number].tolist()))
            else:
                taken.append(terms)
        return given, taken


def check_paid(city: str, paid_usd: float, cost_usd: float) -> None:
    """Fails with NO_PLAN when a city is not paid what an agreement costs it."""
    if paid_usd < cost_usd - PAID * abs(cost_usd) - 0.01:
        raise PlanError(
            Reason.NO_PLAN,
            f"the draft does not pay {city} what it costs it",
            {"city": city},
        )


class Parlour:
    """Where a city holds its conversations: so many with each city at a time."""

    def __init__(self, desk: AidDesk) -> None:
        self.desk = desk
        self._open: dict[str, int] = {}

    async def bargain(
        self,
        asker: str,
        allow: Callable[[str, str], None],
        requests: Any,
        context: grpc.aio.ServicerContext[Request, Response],
        do: Callable[[Callable[[], Response]], Response],
    ) -> None:
        """Answer one stream; `do` carries an answer's work out, in a thread."""
        options = self.desk.options
        if self._open.get(asker, 0) >= options.conversations:
            raise ScenarioError(
                Reason.PEER_LIMIT,
                f"the limit conversations of this city: {options.conversations} at a time",
                {"limit": "conversations"},
            )
        self._open[asker] = self._open.get(asker, 0) + 1
        try:
            conversation = Conversation(self.desk, asker, allow)
            async with asyncio.timeout(options.deadline_s):
                async for request in requests:
                    if isinstance(request, Malformed):
                        raise request.refusal

                    def answer(request: Request = request) -> Response:
                        return conversation.handle(request)

                    await context.write(await asyncio.to_thread(do, answer))
        except TimeoutError:
            text = f"the conversation is over after {options.deadline_s:g} s"
            raise ScenarioError(Reason.EXPIRED, text) from None
        finally:
            self._open[asker] -= 1
            if not self._open[asker]:
                del self._open[asker]

    async def pledge(self, by: str, request: peer_pb2.PledgeRequest) -> peer_pb2.PledgeResponse:
        """Hear what a city has signed, and answer with that and all that is open with it."""

        def hear() -> tuple[Deed, ...]:
            said = self.desk.hear(aid.decode_deeds(request.deeds), by)
            more = self.desk.open_with(by)
            return (*said, *(deed for deed in more if deed not in said))[: aid.MOST_DEEDS]

        said = await asyncio.to_thread(hear)
        return peer_pb2.PledgeResponse(deeds=[aid.encode_deed(deed) for deed in said])


# -- the one that asks -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """A good that may be exchanged with a city, which `gives` it or takes it."""

    city: str
    good: str
    gives: bool


@dataclass(frozen=True, slots=True)
class Agreement:
    """What cities have agreed on, and how good it is; costs in US dollars of 2020.

    `cost_usd` is what this city's own plan costs and the others' cost beyond exchanging nothing,
    `bound_usd` what no agreement can go below, `alone_usd` what exchanging nothing costs.
    """

    commitments: tuple[str, ...]
    quantity: Mapping[Wanted, tuple[float, ...]]
    price_usd: Mapping[Wanted, tuple[float, ...]]
    cost_usd: float
    bound_usd: float
    alone_usd: float
    rounds: int

    @property
    def gap(self) -> float:
        return (self.cost_usd - self.bound_usd) / max(abs(self.cost_usd), 1e-9)


class Envoy:
    """Speaks for a city at the broker of another. Fails with UNREACHABLE, and as that one does."""

    def __init__(self, desk: AidDesk, city: str, address: str, options: LinkOptions) -> None:
        self.desk, self.city, self._options = desk, city, options
        self._address = address
        self._channel = secure.channel(
            address,
            footing.expected(Part.BROKER, city=city),
            channel_options(options.max_message_bytes),
        )
        self._stub: peer_pb2_grpc.PeersAsyncStub = peer_pb2_grpc.PeersStub(self._channel)
        self._who = f"{city} at {address}"
        self._call: grpc.aio.StreamStreamCall[Any, Any] | None = None
        self._number = 0

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(self._options.connect_timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            await self._channel.close()
            limit_s = self._options.connect_timeout_s
            raise ScenarioError(
                Reason.UNREACHABLE, f"nobody answers for {self._who} (tried for {limit_s:g} s)"
            ) from None
        await asyncio.to_thread(self.desk.note_place, self.city, self._address)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()

    async def ask(self, **what: Any) -> Response:
        """Put one question; each waits for its answer."""
        if self._call is None:
            metadata = caller.claim(self._options.identity)
            self._call = self._stub.Bargain(metadata=metadata)
        self._number += 1
        try:
            async with asyncio.timeout(self._options.answer_timeout_s):
                await self._call.write(Request(number=self._number, **what))
                answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, self._who) from None
        except asyncio.InvalidStateError:
            answer = grpc.aio.EOF
        except TimeoutError:
            raise TwinError(Reason.MEMBER_LATE, f"{self._who} does not answer") from None
        if not isinstance(answer, Response):
            raise await self._ended()
        if answer.number != self._number:
            raise _out_of_order(f"{self._who} answers {answer.number} to {self._number}")
        return answer

    async def _ended(self) -> FederationError:
        assert self._call is not None
        code, details = await self._call.code(), await self._call.details()
        trailing = await self._call.trailing_metadata()
        error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
        return status.from_rpc(error, self._who)

    async def reconcile(self, deeds: Sequence[Deed] = ()) -> None:
        """Say this, and all that is open; until neither has anything to say."""
        open_ = await asyncio.to_thread(self.desk.open_with, self.city)
        said = (*deeds, *(deed for deed in open_ if deed not in deeds))
        for _ in range(MOST_SAID):
            heard = await self._pledge(said[: aid.MOST_DEEDS])
            said = await asyncio.to_thread(self.desk.hear, heard, self.city)
            if not said:
                return

    async def _pledge(self, deeds: Sequence[Deed]) -> tuple[Deed, ...]:
        request = peer_pb2.PledgeRequest(deeds=[aid.encode_deed(deed) for deed in deeds])
        try:
            response = await self._stub.Pledge(
                request,
                timeout=self._options.answer_timeout_s,
                metadata=caller.claim(self._options.identity),
            )
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, self._who) from None
        return aid.decode_deeds(response.deeds)


async def keep_certain(desk: AidDesk, link: Callable[[], LinkOptions]) -> None:
    """Ask cities that this one is in doubt about, again and again, until it is not; never ends."""
    again_s: dict[str, float] = {}
    due_s: dict[str, float] = {}
    while True:
        await asyncio.sleep(ASK_S)
        doubts = desk.in_doubt()
        again_s = {city: s for city, s in again_s.items() if city in doubts}
        for city in doubts & desk.places.keys():
            now_s = time.monotonic()
            if city in again_s and now_s < due_s[city]:
                continue
            again_s[city] = min(2.0 * again_s.get(city, ASK_S / 2.0), ASK_AT_LEAST_S)
            due_s[city] = now_s + again_s[city]
            try:
                async with Envoy(desk, city, desk.places[city], link()) as envoy:
                    await envoy.reconcile()
            except (FederationError, OSError) as error:
                _log.info("aid: in doubt about %s: %s", city, error)


class _Partner:
    """A city that is asked, and its lines in the border."""

    def __init__(self, envoy: Envoy, lines: Sequence[tuple[int, Wanted]], periods: int) -> None:
        self.envoy, self.lines = envoy, lines
        self.rows = np.concatenate([np.arange(n * periods, (n + 1) * periods) for n, _ in lines])
        self.whole = np.zeros(len(lines), dtype=np.bool_)
        self.stake: Stake

    async def open(
        self, units: Mapping[str, str], start_ns: int, periods_ns: Sequence[int], purpose: str
    ) -> None:
        size, parts = self.rows.size, len(periods_ns)
        ways = {True: Request.WAY_GIVE, False: Request.WAY_TAKE}
        told = Request.Open(purpose=purpose, start_ns=start_ns, periods_ns=periods_ns)
        for _, line in self.lines:
            told.lines.add(good=line.good, unit=units[line.good], way=ways[line.gives])
        answer = (await self.envoy.ask(open=told)).stake
        high = aid.decode_numbers(answer.high, size, "a stake")
        if len(answer.parts) != size or len(answer.whole) != len(self.lines):
            raise _misshapen(f"{self.envoy.city} has another number of quantities than it has")
        part = np.array(answer.parts, dtype=np.int64)
        if part.max(initial=0) >= size:
            raise _misshapen(f"{self.envoy.city} has more parts than quantities")
        self.whole = np.array(answer.whole, dtype=np.bool_)
        weight = np.repeat([-1.0 if line.gives else 1.0 for _, line in self.lines], parts)
        self.stake = Stake(
            self.envoy.city, self.rows, np.arange(size), weight, part, np.zeros(size), high
        )

    async def answer(self, question: Prices | Quotas) -> Offer | Consent:
        size, parts = self.rows.size, int(self.stake.part.max(initial=-1)) + 1
        city = self.envoy.city
        if isinstance(question, Prices):
            usd = encode_vector(np.maximum(question.usd[self.rows], 0.0))
            offer = (await self.envoy.ask(prices=Request.Prices(usd=usd))).offer
            cost = aid.decode_numbers(offer.cost_usd, parts, "costs", is_signed=True)
            quantity = aid.decode_numbers(offer.quantity, size, "an offer", is_signed=True)
            return Offer(question.round, city, np.append(cost, 0.0), quantity)
        quotas = encode_vector(np.maximum(question.quantity[city], 0.0))
        told = (await self.envoy.ask(quotas=Request.Quotas(quantity=quotas))).consent
        if not told.is_possible:
            nothing = np.zeros(size)
            return Consent(question.round, city, None, nothing, nothing)
        cost = aid.decode_numbers(told.cost_usd, parts, "costs", is_signed=True)
        quantity = aid.decode_numbers(told.quantity, size, "a consent", is_signed=True)
        worth = aid.decode_numbers(told.worth_usd, size, "worths")
        return Consent(question.round, city, np.append(cost, 0.0), quantity, worth)


async def seek(
    desk: AidDesk,
    wanted: Sequence[Wanted],
    addresses: Mapping[str, str],
    start_ns: int,
    periods_ns: Sequence[int],
    purpose: str = "",
    hold_s: float = HOLD_S,
    tolerance: float = TOLERANCE,
    link: LinkOptions | None = None,
) -> Agreement:
    """Bargain with other cities for what costs all of them together least, and bind them to it.

    Fails with NO_PLAN when nothing is agreed on, UNKNOWN_MEMBER when a city has no address, and as
    the cities do; what was offered until then is declined. When a city is lost while they sign,
    the desk has what stands, and `Envoy.reconcile` finds out what became of the rest.
    """
    options = link or LinkOptions()
    periods_ns = tuple(periods_ns)
    if not wanted or len(set(wanted)) < len(wanted):
        raise ScenarioError(Reason.SCENARIO_INVALID, "say what is wanted, each once")
    if not 0 < len(periods_ns) <= MOST_PERIODS or min(periods_ns) <= 0 or start_ns < 0:
        raise ScenarioError(Reason.SCENARIO_INVALID, "say for which periods, and from when on")
    for one in wanted:
        if one.city not in addresses:
            text = f"nobody said where {one.city} is"
            raise ScenarioError(Reason.UNKNOWN_MEMBER, text, {"member": one.city})
    units = await asyncio.to_thread(desk.estate.units)
    for one in wanted:
        if one.good not in units:
            text = f"{desk.city} has no good {one.good!r}"
            raise ScenarioError(Reason.UNKNOWN_VARIABLE, text, {"good": one.good})
    ends = await asyncio.to_thread(_own_ends, desk, wanted, units, start_ns, periods_ns)
    own = await asyncio.to_thread(Discreet, ends.owner)
    async with AsyncExitStack() as stack:
        partners = []
        for city in dict.fromkeys(one.city for one in wanted):
            envoy = Envoy(desk, city, addresses[city], options)
            await stack.enter_async_context(envoy)
            lines = [(n, one) for n, one in enumerate(wanted) if one.city == city]
            partners.append(_Partner(envoy, lines, len(periods_ns)))
        await asyncio.gather(*(p.open(units, start_ns, periods_ns, purpose) for p in partners))
        deal = _Deal(desk, wanted, ends, own, partners, len(periods_ns))
        await deal.settle(tolerance)
        return await deal.bind(units, start_ns, periods_ns, hold_s)


def _own_ends(
    desk: AidDesk,
    wanted: Sequence[Wanted],
    units: Mapping[str, str],
    start_ns: int,
    periods_ns: tuple[int, ...],
) -> Ends:
    """This city's end: what the others give, it takes."""
    asked = [(one.good, units[one.good], not one.gives) for one in wanted]
    held = [desk.besides(good, gives, start_ns, periods_ns) for good, _, gives in asked]
    holding = desk.estate.holding(tuple(dict.fromkeys(asked)), start_ns, periods_ns)
    lines = lines_of(desk.estate, asked, held)
    return ends_of(
        desk.city, holding, lines, range(0, len(wanted) * len(periods_ns), len(periods_ns))
    )


class _Deal:
    """One bargain of this city with others, from the first price to the last signature."""

    def __init__(
        self,
        desk: AidDesk,
        wanted: Sequence[Wanted],
        ends: Ends,
        own: Discreet,
        partners: Sequence[_Partner],
        periods: int,
    ) -> None:
        self._desk, self._wanted, self._ends, self._own = desk, wanted, ends, own
        self._partners, self._periods = partners, periods
        self._quantity = np.zeros(len(wanted) * periods)
        self._usd = np.zeros(len(wanted) * periods)
        self._costs: dict[str, float] = {}
        self._bound_usd = 0.0
        self._rounds = 0

    async def _answers(self, question: Prices | Quotas) -> list[Offer | Consent]:
        own = self._ends.owner
        return list(
            await asyncio.gather(
                asyncio.to_thread(own.answer, question),
                *(partner.answer(question) for partner in self._partners),
            )
        )

    async def settle(self, tolerance: float) -> None:
        """Find quantities and prices; fails with NO_PLAN."""
        stakes = (self._ends.stake, *(p.stake for p in self._partners))
        rows = len(self._wanted) * self._periods
        bargain = Bargain(stakes, np.zeros(rows), tolerance, ROUNDS)
        (question,) = bargain.start()
        while not isinstance(question, Agreed):
            following: tuple[Question, ...] = ()
            for answer in await self._answers(question):
                following = bargain.handle(answer) or following
            (question,) = following
        self._bound_usd, self._usd = question.bound_usd, question.prices_usd
        agreed = np.array(question.quantity[self._desk.city])
        for partner in self._partners:
            theirs = question.quantity[partner.envoy.city]
            agreed[partner.rows] = np.minimum(agreed[partner.rows], theirs)
        is_whole = self._ends.whole.copy()
        for partner in self._partners:
            for (number, _), whole in zip(partner.lines, partner.whole, strict=True):
                is_whole[number] |= whole
        best: tuple[float, Vector, dict[str, float]] | None = None
        tries = wholes(agreed, np.repeat(is_whole, self._periods))
        for extra, quantity in enumerate((*tries, np.zeros(rows)), 1):
            costs = await self._try(question.rounds + extra, quantity)
            if costs is not None and (best is None or sum(costs.values()) < best[0]):
                best = (sum(costs.values()), quantity, costs)
        self._rounds = question.rounds + len(tries) + 1
        if best is None:
            raise PlanError(Reason.NO_PLAN, "the cities agree on nothing")
        _, self._quantity, self._costs = best
        self._make_fair()

    async def _try(self, number: int, quantity: Vector) -> dict[str, float] | None:
        """What everybody's part in these quantities costs them; None when somebody can't."""
        own = {self._desk.city: quantity}
        asked = Quotas(number, own | {p.envoy.city: quantity[p.rows] for p in self._partners})
        answers = await self._answers(asked)
        found = {a.owner: a.cost_usd for a in answers}
        costs = {city: float(usd.sum()) for city, usd in found.items() if usd is not None}
        return costs if len(costs) == len(answers) else None

    def _make_fair(self) -> None:
        """Prices at the border that cover what it costs each city to keep to its part.

        They do by themselves where nothing is whole and the bargain went to its end (duality).
        """
        for partner in self._partners:
            rows, weight = partner.rows, partner.stake.weight
            lacking = self._costs[partner.envoy.city] * (1 + PAID / 2) + float(
                (self._usd[rows] * weight) @ self._quantity[rows]
            )
            if lacking <= 0.0:
                continue
            given, taken = rows[weight < 0], rows[weight > 0]
            amount = float(self._quantity[given].sum())
            income = float(self._usd[given] @ self._quantity[given])
            spent = float(self._usd[taken] @ self._quantity[taken])
            if income > 0.0:
                self._usd[given] *= 1.0 + lacking / income
            elif amount > 0.0:
                self._usd[given] += lacking / amount
            elif spent > 0.0:
                self._usd[taken] *= max(0.0, 1.0 - lacking / spent)
        paid_usd = -float((self._usd * self._ends.stake.weight) @ self._quantity)
        extra = self._costs[self._desk.city] - self._own.alone_usd
        check_paid(self._desk.city, paid_usd, extra)

    async def bind(
        self, units: Mapping[str, str], start_ns: int, periods_ns: tuple[int, ...], hold_s: float
    ) -> Agreement:
        """Have it offered, and accept; or offer, where this city gives."""
        desk, nonce = self._desk, secrets.token_hex(16)
        shape = (len(self._wanted), self._periods)
        quantity, usd = self._quantity.reshape(shape), self._usd.reshape(shape)
        cost_usd = sum(self._costs.values())
        gap = (cost_usd - self._bound_usd) / max(abs(cost_usd), 1e-9)

        def terms_of(number: int, expires_ns: int) -> Terms:
            one = self._wanted[number]
            return Terms(
                one.city if one.gives else desk.city,
                desk.city if one.gives else one.city,
                one.good,
                units[one.good],
                start_ns,
                periods_ns,
                tuple(quantity[number].tolist()),
                tuple(usd[number].tolist()),
                expires_ns,
                nonce,
            )

        some = [number for number in range(len(self._wanted)) if quantity[number].any()]
        gifts = [(terms_of(n, desk.now_ns + round(hold_s * 1e9)), self._ends.most[n].tolist())
                 for n in some if not self._wanted[n].gives]  # fmt: skip
        taken = [terms_of(n, 0) for n in some if self._wanted[n].gives]
        await asyncio.to_thread(_prepare, desk, [terms for terms, _ in gifts], taken, hold_s)
        active = [p for p in self._partners if self._quantity[p.rows].any()]
        offers: dict[str, tuple[Deed, ...]] = {}
        try:
            for partner in active:
                told = await self._drafted(partner, nonce, hold_s, gap)
                offers[partner.envoy.city] = told
            mine = await asyncio.to_thread(desk.offer, gifts)
        except FederationError as error:
            await asyncio.to_thread(desk.forget, taken)
            await self._decline(active, offers, error)
            raise
        for partner in active:
            city = partner.envoy.city
            heard = await asyncio.to_thread(desk.hear, offers[city], city)
            own = [deed for deed in mine if deed.terms is not None and deed.terms.taker == city]
            await partner.envoy.reconcile((*heard, *own))
        ids = [deed.commitment for told in (*offers.values(), mine) for deed in told]
        return Agreement(
            tuple(ids),
            {one: tuple(q.tolist()) for one, q in zip(self._wanted, quantity, strict=True)},
            {one: tuple(p.tolist()) for one, p in zip(self._wanted, usd, strict=True)},
            cost_usd,
            self._bound_usd,
            self._own.alone_usd,
            self._rounds,
        )

    async def _drafted(
        self, partner: _Partner, nonce: str, hold_s: float, gap: float
    ) -> tuple[Deed, ...]:
        """The offers of a partner; fails with WRONG_SHAPE when they are not what was drafted."""
        draft = Request.Draft(
            quantity=encode_vector(self._quantity[partner.rows]),
            price_usd=encode_vector(self._usd[partner.rows]),
            nonce=nonce,
            gap=gap,
        )
        draft.hold_duration.FromNanoseconds(round(hold_s * 1e9))
        promise = (await partner.envoy.ask(draft=draft)).promise
        deeds = aid.decode_deeds(promise.offers)
        for deed in deeds:
            self._desk.check_signed(deed, partner.envoy.city)
        wanted = {
            one.good: self._quantity[n * self._periods : (n + 1) * self._periods]
            for n, one in partner.lines
            if one.gives
        }
        told = {d.terms.good: d.terms.quantity for d in deeds if d.terms is not None}
        if told != {good: tuple(q.tolist()) for good, q in wanted.items() if q.any()}:
            raise _misshapen(f"{partner.envoy.city} offers something else than was drafted")
        return deeds

    async def _decline(
        self,
        partners: Sequence[_Partner],
        offers: Mapping[str, tuple[Deed, ...]],
        error: FederationError,
    ) -> None:
        """Say at once that nothing comes of it; who can't be reached finds out by the clock."""
        for partner in partners:
            told = offers.get(partner.envoy.city, ())
            if told:
                why = f"nothing came of it: {error.reason.value}"
                said = await asyncio.to_thread(self._desk.decline, told, why)
                try:
                    await partner.envoy.reconcile(said)
                except FederationError:
                    continue


def _prepare(desk: AidDesk, given: Sequence[Terms], taken: Sequence[Terms], hold_s: float) -> None:
    """Ask this city's guard before others are asked to keep anything, and expect their offers."""
    for terms in given:
        desk.check_guard(terms, gives=True)
    for terms in taken:
        desk.check_guard(terms, gives=False)
    for terms in taken:
        desk.expect(terms, hold_s)


def _encode_offer(offer: Offer | Consent) -> Response.Offer:
    assert offer.cost_usd is not None
    return Response.Offer(
        cost_usd=encode_vector(offer.cost_usd[:-1]), quantity=encode_vector(offer.quantity)
    )


def _encode_consent(consent: Consent) -> Response.Consent:
    if consent.cost_usd is None:
        return Response.Consent(is_possible=False)
    return Response.Consent(
        is_possible=True,
        cost_usd=encode_vector(consent.cost_usd[:-1]),
        quantity=encode_vector(consent.quantity),
        worth_usd=encode_vector(consent.worth_usd),
    )


def _misshapen(text: str) -> TwinError:
    return TwinError(Reason.WRONG_SHAPE, text)


def _out_of_order(text: str) -> ScenarioError:
    return ScenarioError(Reason.INVALID_FRAME, text)
