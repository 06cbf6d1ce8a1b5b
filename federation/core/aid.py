"""Who has promised what to whom: the commitments of one city, as a pure function of what was said.

A promise has one giver, who offers, and one taker, who accepts and pays. Each says a word only once
it is on record that it did (`Record`; whoever carries this out writes it down before it is sent):

    giver     offer      ------------>                     what it offers is kept for the taker
    taker                <------------  acceptance         it doubts whether that came in time
    giver     receipt    ------------>                     both are bound

The giver alone decides, by one record, whether an acceptance came before the offer expired; after
that its word is a receipt or a refusal, for ever the same. So the two can't come to hold different
things, whatever is lost, doubled or delayed and whoever dies when: at any time a taker that has
accepted either knows, or does not count on what was promised and asks again. (That there is no
third way is the two generals' problem: Gray, Notes on data base operating systems, 1978, 3.8.3.)
Whoever is to count on something is thus the last to hear, and what a giver has bound itself to
it keeps even if nobody takes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from federation.errors import Reason, ScenarioError, TwinError

SLACK = 1e-9
"""What sums of floats may be off, relative to the limit."""

MOST_PERIODS = 168
"""A week by hours."""


class Word(StrEnum):
    """What a city says about a promise."""

    OFFER = "offer"
    ACCEPTANCE = "acceptance"
    RECEIPT = "receipt"
    REFUSAL = "refusal"
    STATEMENT = "statement"


class State(StrEnum):
    """How a promise stands, at one of its sides."""

    OFFERED = "offered"
    """At the giver, which keeps what it offers."""
    ACCEPTED = "accepted"
    """At the taker, which has not heard yet whether it was in time: nothing to count on."""
    BOUND = "bound"
    LAPSED = "lapsed"


@dataclass(frozen=True, slots=True)
class Terms:
    """What is promised: `quantity[p]` of `good` in `unit` throughout period p, each paid
    `price_usd[p]`, US dollars of 2020 for a unit in that period.

    Periods follow each other from `start_ns` on, on the time line that both runs share. The offer
    expires at `expires_ns` by the giver's wall clock (Unix). `nonce` tells promises of the same
    content apart.
    """

    giver: str
    taker: str
    good: str
    unit: str
    start_ns: int
    periods_ns: tuple[int, ...]
    quantity: tuple[float, ...]
    price_usd: tuple[float, ...]
    expires_ns: int
    nonce: str

    def __post_init__(self) -> None:
        # 4 and 4.0 are hashed as the same
        for name in ("quantity", "price_usd"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @property
    def id(self) -> str:
        return hashlib.sha256(canonical(asdict(self))).hexdigest()

    @property
    def end_ns(self) -> int:
        return self.start_ns + sum(self.periods_ns)

    def spans(self) -> Iterator[tuple[int, int, float]]:
        """Each period's first instant, the first after it, and its quantity."""
        begin_ns = self.start_ns
        for length_ns, quantity in zip(self.periods_ns, self.quantity, strict=True):
            yield begin_ns, begin_ns + length_ns, quantity
            begin_ns += length_ns

    def at(self, time_ns: int) -> float:
        """How much is promised at an instant of the run; 0 before and after."""
        return next((q for begin, end, q in self.spans() if begin <= time_ns < end), 0.0)

    def pay_usd(self, delivered: Sequence[float]) -> float:
        """What is to be paid: for what was delivered, and for no more than was promised."""
        told = zip(self.price_usd, delivered, self.quantity, strict=True)
        return sum(price * min(had, promised) for price, had, promised in told)

    def other(self, city: str) -> str:
        return self.taker if city == self.giver else self.giver

    def check(self) -> None:
        """Refuse, with WRONG_SHAPE or NOT_FINITE, what is no promise."""
        if not 0 < len(self.periods_ns) <= MOST_PERIODS or min(self.periods_ns) <= 0:
            raise _misshapen(f"a promise has 1 to {MOST_PERIODS} periods of some length")
        if not len(self.periods_ns) == len(self.quantity) == len(self.price_usd):
            raise _misshapen("a promise has a quantity and a price for each of its periods")
        if not all((self.giver, self.taker, self.good, self.nonce)) or self.giver == self.taker:
            raise _misshapen("a promise has a giver, a taker that is somebody else, and a good")
        if self.start_ns < 0 or not self.start_ns <= self.end_ns < 1 << 63:
            raise _misshapen("a promise is about instants of a run")
        numbers = (*self.quantity, *self.price_usd)
        if not all(map(math.isfinite, numbers)):
            raise TwinError(Reason.NOT_FINITE, "a promise has NaN or infinity in it")
        if min(numbers) < 0.0 or not any(self.quantity):
            raise _misshapen("a promise is of something, and nothing of it is below 0")


@dataclass(frozen=True, slots=True)
class Deed:
    """One word of a city about a promise, with its signature once it has one.

    `terms` belong to offers, `why` to refusals, `delivered` to statements.
    """

    word: Word
    commitment: str
    by: str
    terms: Terms | None = None
    why: str = ""
    delivered: tuple[float, ...] = ()
    signature: bytes = b""

    def message(self) -> bytes:
        """What is signed."""
        return canonical(
            {
                "word": self.word.value,
                "commitment": self.commitment,
                "by": self.by,
                "why": self.why,
                "delivered": self.delivered,
            }
        )

    def check(self) -> None:
        """Refuse, with WRONG_SHAPE or NOT_FINITE, what says nothing."""
        if (self.terms is not None) != (self.word is Word.OFFER):
            raise _misshapen("an offer has terms, and no other word has")
        if self.terms is not None:
            self.terms.check()
            if self.terms.id != self.commitment:
                raise _misshapen("the id of an offer is not that of its terms")
            if self.terms.giver != self.by:
                raise _misshapen(f"{self.by} can't offer what {self.terms.giver} is to give")
        if not all(map(math.isfinite, self.delivered)):
            raise TwinError(Reason.NOT_FINITE, "a statement has NaN or infinity in it")
        if (self.word is not Word.STATEMENT and self.delivered) or min(
            self.delivered, default=0.0
        ) < 0.0:
            raise _misshapen("only a statement tells what was delivered, and it is not below 0")


@dataclass(frozen=True, slots=True)
class Record:
    """Something that has come to be so: a word of another city, what was said to it, or both.

    It is on disk as a whole or not at all.
    """

    kind: ClassVar[str] = "aid"
    taken: Deed | None = None
    made: Deed | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A promise as one side has it on record."""

    terms: Terms
    state: State
    offer: Deed
    last: Deed | None = None
    """The last word of this city about it, but for statements."""
    why: str = ""
    stated: Mapping[str, Deed] = field(default_factory=dict)
    """What was delivered, by the city that says so."""

    def delivered(self, city: str) -> tuple[float, ...] | None:
        found = self.stated.get(city)
        return None if found is None else found.delivered

    def due_usd(self, city: str) -> float | None:
        """What is to be paid by what this city has measured."""
        delivered = self.delivered(city)
        return None if delivered is None else self.terms.pay_usd(delivered)

    @property
    def is_settled(self) -> bool:
        """Whether both have said what was delivered, and mean the same."""
        mine, theirs = (self.due_usd(city) for city in (self.terms.giver, self.terms.taker))
        if mine is None or theirs is None:
            return False
        return abs(mine - theirs) <= 1e-6 * max(abs(mine), abs(theirs), 1.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What follows from something: what is to be written down first, and then what to say."""

    record: Record | None = None
    say: tuple[Deed, ...] = ()


NOTHING = Answer()

Sign = Callable[[bytes], bytes]
"""A signature of this city; the same for the same message."""


class Book:
    """All promises of one city. `decide` and its like change nothing; `note` is given every record
    that they answer with once it is on disk, and those of an earlier life in their order.

    Who has a word from somebody else has looked at its signature.
    """

    def __init__(self, city: str, sign: Sign) -> None:
        self.city = city
        self.held: dict[str, Held] = {}
        self._sign = sign

    # -- what follows --------------------------------------------------------------------

    def offer(self, terms: Terms, most: Sequence[float], now_ns: int) -> Answer:
        """Offer something. `most[p]` is all that this city can give of it in period p.

        Fails with EXPIRED, and with PLAN_INFEASIBLE when it is promised to others already.
        """
        terms.check()
        if terms.id in self.held:
            return Answer(say=(self.held[terms.id].offer,))
        if now_ns >= terms.expires_ns:
            raise ScenarioError(Reason.EXPIRED, f"the offer of {terms.good} has expired")
        for (begin_ns, end_ns, quantity), limit in zip(terms.spans(), most, strict=True):
            kept = self.kept(terms.good, begin_ns, end_ns)
            if quantity and kept + quantity > limit + SLACK * max(abs(limit), 1.0):
                raise ScenarioError(
                    Reason.PLAN_INFEASIBLE,
                    f"of {limit:g} {terms.unit} of {terms.good} {kept:g} are promised to others",
                    {"good": terms.good},
                )
        return self._made(Word.OFFER, terms.id, terms=terms)

    def hear(
        self,
        deed: Deed,
        now_ns: int,
        refusals: Iterable[str] = (),
        *,
        is_asked_for: bool = True,
    ) -> Answer:
        """Take a word of another city. `refusals` say why this one does not accept an offer; of
        one that nobody asked for nothing is kept but that it was refused."""
        held = self.held.get(deed.commitment)
        if deed.word is Word.OFFER:
            if held is None and not is_asked_for:
                why = "nobody has asked for it"
                return Answer(say=(self._deed(Word.REFUSAL, deed.commitment, why=why),))
            return self._hear_offer(deed, held, now_ns, tuple(refusals))
        if held is None or deed.by != held.terms.other(self.city):
            if deed.word is Word.ACCEPTANCE:
                why = "no such offer is on record here"
                return Answer(say=(self._deed(Word.REFUSAL, deed.commitment, why=why),))
            return NOTHING
        match deed.word:
            case Word.ACCEPTANCE if held.terms.giver == self.city:
                return self._hear_acceptance(deed, held, now_ns)
            case Word.RECEIPT | Word.REFUSAL if held.state is State.ACCEPTED:
                return Answer(Record(taken=deed))
            case Word.REFUSAL if held.state is State.OFFERED:
                return Answer(Record(taken=deed))
            case Word.STATEMENT:
                return self._hear_statement(deed, held)
        return NOTHING

    def tick(self, now_ns: int) -> Iterator[Answer]:
        """Withdraw the offers that have expired without an answer."""
        for id_, held in list(self.held.items()):
            if held.state is State.OFFERED and now_ns >= held.terms.expires_ns:
                yield self._made(Word.REFUSAL, id_, why="it was not accepted before it expired")

    def state_delivered(self, id_: str, delivered: Sequence[float], now_ns: int) -> Answer:
        """Say what was delivered, by the run that is at `now_ns`; once and for all.

        Fails with UNKNOWN_ENTITY, INSTANT_PASSED before the end of the promise, REQUEST_DIFFERS
        when something else was said.
        """
        held = self.held.get(id_)
        if held is None or held.state is not State.BOUND:
            text = f"nobody is bound by a promise {id_[:12] or '(none)'}"
            raise ScenarioError(Reason.UNKNOWN_ENTITY, text, {"commitment": id_})
        told = self._deed(Word.STATEMENT, id_, delivered=tuple(map(float, delivered)))
        told.check()
        if len(told.delivered) != len(held.terms.periods_ns):
            raise _misshapen("a statement has a quantity for each period of the promise")
        before = held.stated.get(self.city)
        if before is not None:
            if before.delivered != told.delivered:
                text = f"what was delivered of {id_[:12]} is on record, and is something else"
                raise ScenarioError(Reason.REQUEST_DIFFERS, text, {"commitment": id_})
            return Answer(say=(before,))
        if now_ns < held.terms.end_ns:
            text = f"{id_[:12]} goes on until {held.terms.end_ns} ns, and the run is at {now_ns} ns"
            raise ScenarioError(Reason.INSTANT_PASSED, text, {"commitment": id_})
        return Answer(Record(made=told), (told,))

    def open_with(self, city: str) -> tuple[Deed, ...]:
        """What has to be said again to a city until it has answered, in order."""
        found: list[Deed] = []
        for held in self.held.values():
            if held.terms.other(self.city) != city:
                continue
            if held.state in (State.OFFERED, State.ACCEPTED) or (
                # a taker that has not heard of its receipt may not know that it can ask
                held.state is State.BOUND
                and held.terms.giver == self.city
                and city not in held.stated
            ):
                assert held.last is not None
                found.append(held.last)
            said = held.stated
            if self.city in said and city not in said:
                found.append(said[self.city])
        return tuple(found)

    # -- what is so ----------------------------------------------------------------------

    def kept(self, good: str, begin_ns: int, end_ns: int) -> float:
        """The most that is kept for others of what this city gives, at any time of a span."""
        mine = [
            held.terms
            for held in self.held.values()
            if held.terms.giver == self.city
            and held.terms.good == good
            and held.state in (State.OFFERED, State.BOUND)
        ]
        starts = [begin_ns, *(b for t in mine for b, _, _ in t.spans() if begin_ns < b < end_ns)]
        return max((sum(t.at(at_ns) for t in mine) for at_ns in starts), default=0.0)

    def coming(self, good: str, begin_ns: int, end_ns: int) -> float:
        """The least that others have bound themselves to give, at any time of a span."""
        mine = [
            held.terms
            for held in self.held.values()
            if held.terms.taker == self.city
            and held.terms.good == good
            and held.state is State.BOUND
        ]
        starts = {begin_ns}
        for terms in mine:
            for begin, end, _ in terms.spans():
                starts |= {at for at in (begin, end) if begin_ns < at < end_ns}
        return min(sum(t.at(at_ns) for t in mine) for at_ns in starts)

    def given_at(self, time_ns: int) -> dict[str, float]:
        """What this city is bound to give at an instant of its run, by good."""
        return self._due(time_ns, giver=True)

    def taken_at(self, time_ns: int) -> dict[str, float]:
        """What others are bound to give it at an instant of its run, by good."""
        return self._due(time_ns, giver=False)

    def _due(self, time_ns: int, giver: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for held in self.held.values():
            terms = held.terms
            if held.state is State.BOUND and (terms.giver == self.city) is giver:
                quantity = terms.at(time_ns)
                if quantity:
                    found[terms.good] = found.get(terms.good, 0.0) + quantity
        return found

    # -- what has come to be so ----------------------------------------------------------

    def note(self, record: Record) -> None:
        """Take up what is on disk."""
        if record.taken is not None:
            self._note(record.taken)
        if record.made is not None:
            self._note(record.made)

    def _note(self, deed: Deed) -> None:
        if deed.word is Word.OFFER:
            assert deed.terms is not None
            last = deed if deed.by == self.city else None
            self.held[deed.commitment] = Held(deed.terms, State.OFFERED, deed, last)
            return
        held = self.held[deed.commitment]
        is_mine = deed.by == self.city
        match deed.word:
            case Word.ACCEPTANCE:
                held = replace(held, state=State.ACCEPTED)
            case Word.RECEIPT:
                held = replace(held, state=State.BOUND)
            case Word.REFUSAL:
                held = replace(held, state=State.LAPSED, why=deed.why)
            case Word.STATEMENT:
                held = replace(held, stated={**held.stated, deed.by: deed})
                self.held[deed.commitment] = held
                return
        self.held[deed.commitment] = replace(held, last=deed) if is_mine else held

    # -- within --------------------------------------------------------------------------

    def _hear_offer(
        self, deed: Deed, held: Held | None, now_ns: int, refusals: tuple[str, ...]
    ) -> Answer:
        if held is not None:
            if held.terms.taker != self.city or held.last is None:
                return NOTHING
            return Answer(say=(held.last,))
        assert deed.terms is not None
        if deed.terms.taker != self.city:
            return NOTHING
        if now_ns >= deed.terms.expires_ns:
            refusals = ("it came after it had expired", *refusals)
        if refusals:
            no = self._deed(Word.REFUSAL, deed.commitment, why="; ".join(refusals))
            return Answer(Record(deed, no), (no,))
        yes = self._deed(Word.ACCEPTANCE, deed.commitment)
        return Answer(Record(deed, yes), (yes,))

    def _hear_acceptance(self, deed: Deed, held: Held, now_ns: int) -> Answer:
        if held.state is not State.OFFERED:
            if held.last is not None and held.last.word in (Word.RECEIPT, Word.REFUSAL):
                return Answer(say=(held.last,))
            why = held.why or "it has lapsed"
            return Answer(say=(self._deed(Word.REFUSAL, deed.commitment, why=why),))
        if now_ns >= held.terms.expires_ns:
            why = "it was accepted after it had expired"
            no = self._deed(Word.REFUSAL, deed.commitment, why=why)
            return Answer(Record(deed, no), (no,))
        yes = self._deed(Word.RECEIPT, deed.commitment)
        return Answer(Record(deed, yes), (yes,))

    def _hear_statement(self, deed: Deed, held: Held) -> Answer:
        if deed.by in held.stated:
            return NOTHING  # its first word counts
        if len(deed.delivered) != len(held.terms.periods_ns):
            raise _misshapen("a statement has a quantity for each period of the promise")
        if held.state is State.BOUND:
            return Answer(Record(taken=deed))
        # who has bound itself states; a taker in doubt asks again, and hears that first
        again = (held.last,) if held.state is State.ACCEPTED and held.last else ()
        return Answer(say=again)

    def _made(self, word: Word, id_: str, terms: Terms | None = None, why: str = "") -> Answer:
        deed = self._deed(word, id_, terms, why)
        return Answer(Record(made=deed), (deed,))

    def _deed(
        self,
        word: Word,
        id_: str,
        terms: Terms | None = None,
        why: str = "",
        delivered: tuple[float, ...] = (),
    ) -> Deed:
        deed = Deed(word, id_, self.city, terms, why, delivered)
        return replace(deed, signature=self._sign(deed.message()))


# -- as plain data -------------------------------------------------------------------------


def canonical(value: object) -> bytes:
    """The one form that is hashed and signed: numbers to the bit, keys in order."""
    return json.dumps(_exact(value), sort_keys=True, separators=(",", ":")).encode()


def _exact(value: object) -> object:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): _exact(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(part) for part in value]
    return value


def plain_of(deed: Deed) -> dict[str, Any]:
    """Its fields as plain data, as JSON has them; what is empty is left out."""
    plain: dict[str, Any] = {
        "word": deed.word.value,
        "commitment": deed.commitment,
        "by": deed.by,
        "signature": deed.signature.hex(),
    }
    if deed.terms is not None:
        plain["terms"] = {k: _listed(v) for k, v in asdict(deed.terms).items()}
    if deed.why:
        plain["why"] = deed.why
    if deed.delivered:
        plain["delivered"] = list(deed.delivered)
    return plain


def deed_of(plain: Mapping[str, Any]) -> Deed:
    """The deed whose plain data these are. Fails with KeyError, TypeError or ValueError."""
    terms = plain.get("terms")
    return Deed(
        Word(plain["word"]),
        plain["commitment"],
        plain["by"],
        None if terms is None else Terms(**{k: _tupled(k, v) for k, v in terms.items()}),
        plain.get("why", ""),
        tuple(map(float, plain.get("delivered", ()))),
        bytes.fromhex(plain["signature"]),
    )


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _tupled(name: str, value: Any) -> Any:
    if name == "periods_ns":
        return tuple(map(int, value))
    return tuple(map(float, value)) if isinstance(value, list) else value


def _misshapen(text: str) -> TwinError:
    return TwinError(Reason.WRONG_SHAPE, text)
