"""What neighbours ask of a city's actuators: held to the export policy, put into the city's own
words, and then for the city's own guard to confirm or refuse.

The neighbour's guard signs each order, so that its broker, or anybody on the way, can ask for
nothing; the policy says which actuators it may set on the city itself, and the city's guard, which
alone can act on its twins, judges the rest by its owners' rules. The neighbour learns that it was
refused and for which of the stable reasons, and nothing in the city's own words.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.export import Export
from federation.peer.policy import Sort
from federation.peer.reader import Reader
from federation.v1 import peer_pb2, peer_pb2_grpc, twin_pb2
from federation.wire import codec, footing, secure, status
from federation.wire.link import MEBIBYTE, channel_options
from federation.wire.party import Part

HEAR_S = 4.0
"""How long the city's guard may take; less than the neighbour waits."""

KEPT = 1024
"""How many bundles and answers are remembered, of all neighbours together."""

MOST_SETPOINTS = 1_000
"""How many setpoints and conditions a bundle may have; the owners' rules may say less."""

_K = TypeVar("_K")
_V = TypeVar("_V")


class Warden(Protocol):
    """The city's own guard, as its broker reaches it."""

    async def hear(self, petition: peer_pb2.HearRequest) -> peer_pb2.HearResponse:
        """Fails as `Petitions.Hear` does, and with UNREACHABLE."""


class GuardAt:
    """The city's guard at an address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel: grpc.aio.Channel | None = None

    async def hear(self, petition: peer_pb2.HearRequest) -> peer_pb2.HearResponse:
        if self._channel is None:
            options = [*channel_options(16 * MEBIBYTE), ("grpc.enable_http_proxy", 0)]
            self._channel = secure.channel(self.address, footing.expected(Part.GUARD), options)
        stub: peer_pb2_grpc.PetitionsAsyncStub = peer_pb2_grpc.PetitionsStub(self._channel)
        try:
            return await stub.Hear(petition, timeout=HEAR_S)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, "the guard of the city") from None

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


class Petition(NamedTuple):
    """An order as it came, whoever signed it."""

    order: twin_pb2.Order
    signed: twin_pb2.Signed
    what: str


def read_petition(rpc: str, signed: twin_pb2.Signed, city: str) -> Petition:
    """The order that is asked for by an RPC of a city. Whose signature it is, its guard finds out.

    Fails with INVALID_FRAME, and with NOT_AUTHORISED for what is meant for somebody else.
    """
    try:
        order = twin_pb2.Order.FromString(signed.order)
    except DecodeError:
        raise ScenarioError(Reason.INVALID_FRAME, "what was signed is no order") from None
    what = order.WhichOneof("what") or "nothing"
    if what != rpc:
        raise ScenarioError(Reason.NOT_AUTHORISED, f"{what} was signed, and {rpc} is asked for")
    if order.city != city:
        raise ScenarioError(
            Reason.NOT_AUTHORISED, f"this was signed for {order.city or 'a twin'}, not for {city}"
        )
    return Petition(order, signed, what)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a reader may do on the city now, and how it is told of what it may not."""

    reader: Reader
    run: str
    export: Export
    refuse: Callable[[Sort, str], ScenarioError]


class Acts:
    """The petitions of all neighbours of one city."""

    def __init__(self, city: str, warden: Warden | None) -> None:
        self.city = city
        self._warden = warden
        self._bundles: OrderedDict[tuple[str, str], Bundle] = OrderedDict()
        """By the reader's city and the bundle's id the bundle as it was told."""
        self._answers: OrderedDict[tuple[str, str], tuple[str, twin_pb2.Receipt]] = OrderedDict()
        """By the reader and the id of a request what it said, and what it was answered."""

    async def order(self, petition: Petition, present: Standing) -> twin_pb2.Receipt:
        """Do what is asked, or refuse it; the same again gets the same answer."""
        order, reader = petition.order, _named(present.reader)
        if not order.request:
            raise ScenarioError(Reason.REQUEST_DIFFERS, "a request has an id")
        key, content = (reader.identity, order.request), _content(order)
        if key in self._answers:
            before, answer = self._answers[key]
            if before != content:
                raise ScenarioError(
                    Reason.REQUEST_DIFFERS,
                    f"the request {order.request} was made before, and said something else",
                    {"request": order.request},
                )
            return answer
        heard = await self._hear(petition, reader, self._bundle(petition, present))
        if petition.what == "select":
            told = codec.decode_bundle(order.select.bundle)
            _keep(self._bundles, (reader.city, told.id), told)
        _keep(self._answers, key, (content, heard.receipt))
        return heard.receipt

    async def look(self, petition: Petition, present: Standing) -> twin_pb2.DeskView:
        """What is in force in the city by this reader's bundles, in its words."""
        reader, order = _named(present.reader), petition.order
        heard = await self._hear(petition, reader, None)
        names = {(e.member, e.variable): e.name for e in present.export.actuators}
        found = twin_pb2.DeskView(run=order.run, member=order.member)
        phases: dict[str, tuple[str, str]] = {}
        prefix = inner_id(reader, "")
        for desk in heard.desks:
            found.epoch = max(found.epoch, desk.epoch)
            found.time_ns = max(found.time_ns, desk.time_ns)
            for each in desk.in_force:
                name = names.get((desk.member, each.actuator))
                if name is not None and each.bundle.startswith(prefix):
                    told = found.in_force.add()
                    told.CopyFrom(each)
                    told.actuator, told.bundle = name, each.bundle.removeprefix(prefix)
                    told.signer = self.city
            for known in desk.bundles:
                if known.bundle.startswith(prefix):
                    id_ = known.bundle.removeprefix(prefix)
                    if phases.get(id_, ("", ""))[0] != "over":
                        phases[id_] = (known.phase, _told_end(known))
        for id_, (phase, why) in phases.items():
            found.bundles.add(bundle=id_, phase=phase, why=why)
        return found

    def _bundle(self, petition: Petition, present: Standing) -> Bundle:
        """The bundle that an order is about, in the city's own words."""
        order, reader = petition.order, present.reader
        if petition.what == "select":
            return translated(codec.decode_bundle(order.select.bundle), order, present)
        handle = getattr(order, petition.what)
        if petition.what == "release":  # towards safety, whatever is exported by now
            nothing = Bundle(handle.bundle, order.run, (), Priority.AUTONOMOUS, 0, 0, "")
            return replace(nothing, id=inner_id(reader, handle.bundle))
        known = self._bundles.get((reader.city, handle.bundle))
        if known is None:
            raise ScenarioError(
                Reason.UNKNOWN_BUNDLE,
                f"{self.city} has not selected the bundle {handle.bundle}",
                {"bundle": handle.bundle},
            )
        if known.digest() != handle.digest:
            raise ScenarioError(
                Reason.REQUEST_DIFFERS,
                f"the bundle {handle.bundle} was selected with other content",
            )
        return translated(known, order, present)

    async def _hear(
        self, petition: Petition, reader: Reader, bundle: Bundle | None
    ) -> peer_pb2.HearResponse:
        if self._warden is None:
            raise _told(
                ScenarioError(Reason.NOT_LIVE, "no guard"), self.city, "nobody there may act"
            )
        asked = peer_pb2.HearRequest(reader=reader.identity, signed=petition.signed)
        if bundle is not None:
            asked.bundle.CopyFrom(codec.encode_bundle(bundle))
        try:
            return await self._warden.hear(asked)
        except FederationError as error:
            raise _told(error, self.city) from None


def translated(told: Bundle, order: twin_pb2.Order, present: Standing) -> Bundle:
    """A bundle in the city's own words; fails with NOT_EXPORTED for what the reader may not set or
    hold it to, and with SCENARIO_INVALID or NOT_AUTHORISED for what is no bundle of its own."""
    export, member = present.export, order.member
    if len(told.setpoints) + len(told.conditions) > MOST_SETPOINTS:
        raise ScenarioError(Reason.SCENARIO_INVALID, f"a bundle has {MOST_SETPOINTS} parts at most")
    meant = {s.member for s in told.setpoints} | {c.member for c in told.conditions}
    if told.run != order.run or not meant <= {member}:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"a city is told its own part of a bundle: what is for {member} in {order.run}",
        )
    if told.priority is not Priority.AUTONOMOUS:
        raise ScenarioError(
            Reason.NOT_AUTHORISED, "a neighbour has the priority of a loop, and no other"
        )
    entries = {entry.name: entry for entry in export.actuators}
    kinds = {a.name: a.kind for a in export.description.actuators}
    setpoints = []
    for each in told.setpoints:
        entry = entries.get(each.actuator)
        if entry is None or each.entity not in export.description.ids(kinds[entry.name]):
            raise present.refuse(Sort.ACTION, each.actuator)
        setpoints.append(
            Setpoint(entry.member, entry.variable, each.entity, each.value, each.lease_ns)
        )
    views = {view.name: view for view in export.views}
    kinds = {v.name: v.kind for v in export.description.outputs()}
    conditions = []
    for each_ in told.conditions:
        view = views.get(each_.variable)
        # a condition on what is told coarsely would tell it finely
        if (
            view is None
            or not view.resolution.is_of_each_at_once
            or view.resolution.round_to is not None
            or each_.entity not in export.description.ids(kinds[view.name])
        ):
            raise present.refuse(Sort.VARIABLE, each_.variable)
        conditions.append(
            Condition(view.member, view.variable, each_.entity, each_.low, each_.high)
        )
    return replace(
        told,
        id=inner_id(present.reader, told.id),
        run=present.run,
        setpoints=tuple(setpoints),
        conditions=tuple(conditions),
        author=present.reader.city,
        basis=told.digest(),
    )


def inner_id(reader: Reader, bundle: str) -> str:
    """The id that a neighbour's bundle has in the city. No bundle of the city's own has a colon."""
    return f"{reader.city}:{bundle}"


def is_inner_id(bundle: str) -> bool:
    """Whether a bundle is a neighbour's."""
    return ":" in bundle


def _named(reader: Reader) -> Reader:
    if not reader.city:
        raise ScenarioError(
            Reason.NOT_AUTHORISED, f"{reader} speaks for no city, and only a city's guard acts"
        )
    return reader


def _content(order: twin_pb2.Order) -> str:
    """What tells an order from another one under its id; not under which epoch it was repeated."""
    said = twin_pb2.Order()
    said.CopyFrom(order)
    said.ClearField("epoch")
    return hashlib.sha256(said.SerializeToString(deterministic=True)).hexdigest()


def _keep(kept: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)


def _told_end(known: twin_pb2.DeskView.Known) -> str:
    return "it has ended there" if known.phase == "over" else ""


_WORDS: Mapping[Reason, str] = {
    Reason.HALTED: "what is autonomous is stopped there",
    Reason.EXPIRED: "it has expired",
    Reason.OUTSIDE_ENVELOPE: "it is outside what its owners allow",
    Reason.NO_LEASE: "it needs a lease, and not so long a one",
    Reason.ACTUATOR_OWNED: "somebody else holds it",
    Reason.SELECTED_BY_OTHER: "it is selected for something else",
    Reason.STATE_MOVED: "things there are not as the bundle has it any more",
    Reason.UNKNOWN_BUNDLE: "it has not selected this bundle",
    Reason.BUNDLE_OVER: "this bundle is over there",
    Reason.REQUEST_DIFFERS: "this was asked before, with other content",
    Reason.NOT_AUTHORISED: "its guard does not believe that this was signed by one of yours",
    Reason.STALE_EPOCH: "another coordinator is at work there by now: look, and ask again",
    Reason.NOT_LIVE: "it has no run that goes on, or can't act on it now",
    Reason.UNREACHABLE: "its guard does not answer",
}


def _told(error: FederationError, city: str, words: str = "") -> ScenarioError:
    """What a neighbour is told of a refusal: its reason, and nothing in the city's own words."""
    known = error.reason in _WORDS
    reason = error.reason if known else Reason.NOT_LIVE
    metadata = {"city": city}
    if reason is Reason.OUTSIDE_ENVELOPE and "limit" in error.metadata:
        metadata["limit"] = error.metadata["limit"]
    if reason is Reason.STALE_EPOCH and "epoch" in error.metadata:
        metadata["epoch"] = error.metadata["epoch"]
    return ScenarioError(reason, f"{city} refuses: {words or _WORDS[reason]}", metadata)
