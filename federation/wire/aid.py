"""Reads and writes what cities say to each other about aid; refuses what can't be right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from federation.core.aid import Deed, Terms, Word
from federation.errors import Reason, TwinError
from federation.twin import Vector
from federation.v1 import peer_pb2
from federation.wire.codec import decode_vector

MOST_DEEDS = 256
MOST_TEXT = 400
"""Characters of a name, a nonce or a reason."""

KINDS: Mapping[str, str] = {
    "BargainRequest.number": "number of a message",
    "BargainRequest.Open.purpose": "what for",
    "BargainRequest.Open.start_ns": "instant or period",
    "BargainRequest.Open.periods_ns": "instant or period",
    "BargainRequest.Line.good": "name of a good",
    "BargainRequest.Line.unit": "unit",
    "BargainRequest.Line.way": "direction",
    "BargainRequest.Prices.usd": "price",
    "BargainRequest.Quotas.quantity": "boundary quantity",
    "BargainRequest.Draft.quantity": "boundary quantity",
    "BargainRequest.Draft.price_usd": "price",
    "BargainRequest.Draft.nonce": "id",
    "BargainRequest.Draft.gap": "gap of the plan",
    "BargainResponse.number": "number of a message",
    "BargainResponse.Stake.high": "boundary quantity",
    "BargainResponse.Stake.parts": "which quantities depend on each other",
    "BargainResponse.Stake.whole": "which goods are whole things",
    "BargainResponse.Stake.rounds": "limit of the conversation",
    "BargainResponse.Offer.cost_usd": "cost beyond exchanging nothing",
    "BargainResponse.Offer.quantity": "boundary quantity",
    "BargainResponse.Consent.is_possible": "yes or no",
    "BargainResponse.Consent.cost_usd": "cost beyond exchanging nothing",
    "BargainResponse.Consent.quantity": "boundary quantity",
    "BargainResponse.Consent.worth_usd": "price",
    "Terms.giver": "name of a city",
    "Terms.taker": "name of a city",
    "Terms.good": "name of a good",
    "Terms.unit": "unit",
    "Terms.start_ns": "instant or period",
    "Terms.periods_ns": "instant or period",
    "Terms.quantity": "boundary quantity",
    "Terms.price_usd": "price",
    "Terms.nonce": "id",
    "Deed.word": "word of a promise",
    "Deed.commitment": "id",
    "Deed.by": "name of a city",
    "Deed.why": "why not",
    "Deed.delivered": "boundary quantity",
    "Deed.signature": "signature",
    # of google.protobuf, in drafts, stakes and terms
    "google.protobuf.Duration.seconds": "limit of the conversation",
    "google.protobuf.Duration.nanos": "limit of the conversation",
    "google.protobuf.Timestamp.seconds": "expiry",
    "google.protobuf.Timestamp.nanos": "expiry",
}
"""Every field that crosses the border in a bargain and in what follows it, and what it is."""

_WORDS = {
    Word.OFFER: peer_pb2.Deed.WORD_OFFER,
    Word.ACCEPTANCE: peer_pb2.Deed.WORD_ACCEPTANCE,
    Word.RECEIPT: peer_pb2.Deed.WORD_RECEIPT,
    Word.REFUSAL: peer_pb2.Deed.WORD_REFUSAL,
    Word.STATEMENT: peer_pb2.Deed.WORD_STATEMENT,
}
_WORD_OF = {number: word for word, number in _WORDS.items()}


def encode_terms(terms: Terms) -> peer_pb2.Terms:
    message = peer_pb2.Terms(
        giver=terms.giver,
        taker=terms.taker,
        good=terms.good,
        unit=terms.unit,
        start_ns=terms.start_ns,
        periods_ns=terms.periods_ns,
        quantity=terms.quantity,
        price_usd=terms.price_usd,
        nonce=terms.nonce,
    )
    message.expire_time.FromNanoseconds(terms.expires_ns)
    return message


def decode_terms(message: peer_pb2.Terms) -> Terms:
    """Fails with WRONG_SHAPE or NOT_FINITE."""
    for text in (message.giver, message.taker, message.good, message.unit, message.nonce):
        _check_text(text)
    at = message.expire_time
    if not (0 <= at.nanos < 10**9 and 0 <= at.seconds < 1 << 33):
        raise TwinError(Reason.WRONG_SHAPE, "a promise expires at an instant of the wall clock")
    terms = Terms(
        message.giver,
        message.taker,
        message.good,
        message.unit,
        message.start_ns,
        tuple(message.periods_ns),
        tuple(message.quantity),
        tuple(message.price_usd),
        at.seconds * 10**9 + at.nanos,
        message.nonce,
    )
    terms.check()
    return terms


def encode_deed(deed: Deed) -> peer_pb2.Deed:
    return peer_pb2.Deed(
        word=_WORDS[deed.word],
        commitment=deed.commitment,
        by=deed.by,
        terms=None if deed.terms is None else encode_terms(deed.terms),
        why=deed.why,
        delivered=deed.delivered,
        signature=deed.signature,
    )


def decode_deed(message: peer_pb2.Deed) -> Deed:
    """Fails with WRONG_SHAPE or NOT_FINITE."""
    word = _WORD_OF.get(message.word)
    if word is None:
        raise TwinError(Reason.WRONG_SHAPE, f"a deed says nothing: {message.word}")
    for text in (message.commitment, message.by, message.why):
        _check_text(text)
    deed = Deed(
        word,
        message.commitment,
        message.by,
        decode_terms(message.terms) if message.HasField("terms") else None,
        message.why,
        tuple(message.delivered),
        message.signature,
    )
    deed.check()
    return deed


def decode_deeds(messages: Iterable[peer_pb2.Deed]) -> tuple[Deed, ...]:
    """Fails with WRONG_SHAPE or NOT_FINITE; then none of them counts."""
    found = tuple(map(decode_deed, messages))
    if len(found) > MOST_DEEDS:
        raise TwinError(Reason.WRONG_SHAPE, f"more than {MOST_DEEDS} deeds at a time")
    return found


def decode_numbers(data: bytes, size: int, what: str, *, is_signed: bool = False) -> Vector:
    """So many finite numbers, none below 0 unless `is_signed`. Fails with WRONG_SHAPE or
    NOT_FINITE."""
    vector = decode_vector(data, what)
    if vector.size != size:
        text = f"{what} has {vector.size} numbers where {size} are due"
        raise TwinError(Reason.WRONG_SHAPE, text)
    if not np.isfinite(vector).all():
        raise TwinError(Reason.NOT_FINITE, f"{what} has NaN or infinity in it")
    if not is_signed and (vector < 0.0).any():
        raise TwinError(Reason.WRONG_SHAPE, f"{what} has numbers below 0")
    return vector


def check_finite(number: float, what: str) -> float:
    """Fails with NOT_FINITE."""
    if not math.isfinite(number):
        raise TwinError(Reason.NOT_FINITE, f"{what} is {number}")
    return number


def _check_text(text: str) -> None:
    if len(text) > MOST_TEXT or not all(map(str.isprintable, text)):
        raise TwinError(Reason.WRONG_SHAPE, f"{text[:40]!r} is no name and no sentence")


def markdown() -> str:
    """The table of what crosses the border, for a person."""
    of: dict[tuple[str, str], list[str]] = {}
    for name, kind in KINDS.items():
        message, _, field = name.rpartition(".")
        of.setdefault((message, kind), []).append(field)
    rows = [f"| `{message}` | {', '.join(some)} | {kind} |" for (message, kind), some in of.items()]
    return "\n".join(["| message | fields | what it is |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown())
