"""What neighbours ask of a city's actuators: the guard judges it by its owners' rules and, when it
passes, does it itself.

A neighbour goes through the stages of a bundle, and each is done at every twin that it concerns or
undone at all of them. Nothing is kept here: the twins' desks know how far a bundle has come, and
end what nobody confirms within its window, so it does not matter which life of the guard hears the
next stage. A neighbour has the priority of a loop: persons are above it, and a stop ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from federation.control.guard import Guard
from federation.control.situation import Mode, Refusal
from federation.control.view import Desks, LiveView
from federation.core.bundle import Bundle, Priority
from federation.core.desk import Phase, Receipt
from federation.errors import FederationError, Reason, ScenarioError
from federation.peer.acts import inner_id, is_inner_id
from federation.peer.reader import SCHEME, Reader
from federation.v1 import peer_pb2, peer_pb2_grpc, twin_pb2
from federation.wire import codec
from federation.wire.acting import encode_receipt
from federation.wire.credentials import Keyring, Known, Role, permit
from federation.wire.status import refusing

SERVICE = peer_pb2.DESCRIPTOR.services_by_name["Petitions"].full_name

Note = Callable[[str, Mapping[str, Any], str], None]
"""Puts on record what was asked, what became of it, and the bundle that it was about."""

_REASONS = {
    "replay": Reason.BUNDLE_OVER,
    "settled": Reason.ACTUATOR_OWNED,
    "usable": Reason.STATE_MOVED,
    "conditions": Reason.STATE_MOVED,
    "lease": Reason.NO_LEASE,
}
"""By the class of a rule the reason that a neighbour is told; else it is outside the envelope."""


class Petitions:
    """Hears them for one run. `keyring` has the neighbours' guards under their SPIFFE ids."""

    def __init__(
        self, view: LiveView, guard: Callable[[], Guard], keyring: Keyring, note: Note
    ) -> None:
        self._view, self._guard, self._keyring, self._note = view, guard, keyring, note
        self._turn = asyncio.Lock()

    async def hear(self, request: peer_pb2.HearRequest) -> peer_pb2.HearResponse:
        """Do one stage of a petition, or none of it; fails as `Petitions.Hear` does."""
        reader = Reader(request.reader)
        known, order = self._signed(reader, request.signed)
        what = order.WhichOneof("what") or ""
        if what == "look":
            return self._seen(await self._view.looks())
        bundle = codec.decode_bundle(request.bundle)
        self._check_is_meant(reader, order, what, bundle)
        async with self._turn:
            try:
                receipt = await self._do(what, known, order, bundle)
            except FederationError as error:
                self._note("petition refused", _plain(reader, what, str(error)), bundle.id)
                raise
        self._note("petition", _plain(reader, what, receipt.phase), bundle.id)
        return peer_pb2.HearResponse(receipt=encode_receipt(receipt))

    def _signed(self, reader: Reader, signed: twin_pb2.Signed) -> tuple[Known, twin_pb2.Order]:
        """Whose order it is: of a guard of the neighbour that brings it. Fails with
        NOT_AUTHORISED."""
        name = signed.identity
        if not name.startswith(SCHEME):
            name = f"{SCHEME}{reader.city}/guard/{name}"
        own = twin_pb2.Signed(identity=name, order=signed.order, signature=signed.signature)
        known, order = self._keyring.check(own)
        if Reader(name).city != reader.city or Role.GUARD not in known.roles:
            raise ScenarioError(
                Reason.NOT_AUTHORISED, f"{name} is no guard of {reader.city}", {"identity": name}
            )
        return known, order

    def _check_is_meant(
        self, reader: Reader, order: twin_pb2.Order, what: str, bundle: Bundle
    ) -> None:
        """Hold what the broker says to what was signed."""
        if what == "select":
            told = codec.decode_bundle(order.select.bundle)
            id_, digest = told.id, told.digest()
        elif what in ("operate", "confirm", "release"):
            handle = getattr(order, what)
            id_, digest = handle.bundle, handle.digest
        else:
            raise ScenarioError(Reason.NOT_AUTHORISED, f"no neighbour may ask for {what or 'that'}")
        is_same = what == "release" or (bundle.basis == digest and bundle.run == self._view.run)
        if bundle.id != inner_id(reader, id_) or not is_same:
            raise ScenarioError(Reason.NOT_AUTHORISED, f"{bundle.id} is not what was signed")

    async def _do(self, what: str, known: Known, order: twin_pb2.Order, bundle: Bundle) -> Receipt:
        looks = await self._view.looks()
        desks = self._view.told(looks)
        if what == "release":
            # one that nobody knows can't be selected any more
            return await self._release(bundle.id, _holding(looks, bundle.id) or tuple(looks))
        for member in members_of(bundle):
            domain = self._view.descriptions[member].domain
            permit(known, what, domain, Priority.AUTONOMOUS)
        self._check_seats(bundle, desks, order.epoch)
        if what != "select" and self._guard().mode is Mode.RECOVERY:
            await self._release(bundle.id, members_of(bundle))
            text = "the recovery plan is in force, and what passed before must not begin any more"
            raise ScenarioError(Reason.OUTSIDE_ENVELOPE, text, {"limit": "recovery"})
        match what:
            case "select":
                return await self._select(bundle, order.select.window_ns, looks, desks)
            case "operate":
                return await self._at_all(what, bundle, desks, members_of(bundle))
            case _:
                # the arbiter's word counts: the others are asked after it
                arbiter, *others = members_of(bundle)
                receipt = await self._at_all(what, bundle, desks, (arbiter,))
                await self._at_all(what, bundle, desks, others, undoes=False)
                self._guard().settle(bundle.id, self._view.settled_ns)
                return receipt

    async def _select(
        self,
        bundle: Bundle,
        window_ns: int,
        looks: Mapping[str, twin_pb2.ReadDeskResponse | FederationError],
        desks: Desks,
    ) -> Receipt:
        is_known = bool(_holding(looks, bundle.id, even_over=True))
        if not is_known:
            await self._judge(bundle, desks)
        hands, seats = self._view.hand, desks.seats
        at = seats[bundle.members()[0]].address
        try:
            receipts = [
                await hands(m).select(bundle, m, seats[m].epoch, window_ns, at)
                for m in members_of(bundle)
            ]
        except FederationError:
            if not is_known:  # else it may be another one under the id of one that is good
                await self._release(bundle.id, members_of(bundle))
            raise
        return _earliest(receipts)

    async def _judge(self, bundle: Bundle, desks: Desks) -> None:
        """Fails as the owners' rules have it."""
        view, guard = self._view, self._guard()
        if stopped := [m for m in members_of(bundle) if m in desks.stops]:
            raise ScenarioError(Reason.HALTED, f"{stopped[0]}: {desks.stops[stopped[0]][0]}")
        if view.settled_ns >= bundle.expires_ns:
            raise ScenarioError(Reason.EXPIRED, f"{bundle.id} expired at {bundle.expires_ns} ns")
        if needed := {name.partition(".")[0] for name in guard.rules.values}:
            await view.look_at_clocks(needed)
        refusals = guard.admit(bundle, view.situation(view.now(), desks))
        if refusals:
            raise _refused(refusals)

    async def _at_all(
        self,
        what: str,
        bundle: Bundle,
        desks: Desks,
        members: Sequence[str],
        *,
        undoes: bool = True,
    ) -> Receipt:
        """Ask for a stage at all of these members; if one of them refuses, undo the bundle."""
        receipts = []
        for member in members:
            hand, epoch = self._view.hand(member), desks.seats[member].epoch
            ask = hand.operate if what == "operate" else hand.confirm
            try:
                receipts.append(await ask(bundle, member, epoch))
            except FederationError:
                if undoes:
                    await self._release(bundle.id, members_of(bundle))
                raise
        return _earliest(receipts)

    async def _release(self, bundle: str, members: Sequence[str]) -> Receipt:
        """Undo a bundle at these members; where that can't be done, its window or lease does it."""
        run = self._view.run
        work = [self._view.hand(member).release(run, member, bundle) for member in members]
        await asyncio.gather(*work, return_exceptions=True)
        self._guard().forget(bundle)
        return Receipt(Phase.OVER, max(self._view.settled_ns, 0))

    def _check_seats(self, bundle: Bundle, desks: Desks, epoch: int) -> None:
        if not bundle.setpoints:
            raise ScenarioError(Reason.OUTSIDE_ENVELOPE, "it sets nothing", {"limit": "granted"})
        for member in members_of(bundle):
            seat = desks.seats.get(member)
            if seat is None:
                why = desks.silent.get(member, f"{member} has no actuators")
                raise ScenarioError(Reason.NOT_LIVE, why, {"member": member})
            if epoch < seat.epoch:
                raise ScenarioError(
                    Reason.STALE_EPOCH,
                    f"epoch {epoch} is over; {member} is at {seat.epoch}",
                    {"epoch": str(seat.epoch)},
                )

    def _seen(
        self, looks: Mapping[str, twin_pb2.ReadDeskResponse | FederationError]
    ) -> peer_pb2.HearResponse:
        views = [
            view
            for name, answer in looks.items()
            if not isinstance(answer, FederationError)
            for view in answer.desks
            if (view.run, view.member) == (self._view.run, name)
        ]
        return peer_pb2.HearResponse(desks=views)


async def give_way(view: LiveView) -> tuple[str, ...]:
    """Undo all that neighbours have selected or set, so that the recovery plan finds nothing in
    its way; which bundles. What can't be reached ends with its window or lease."""
    found = [
        (name, known.bundle)
        for name, answer in (await view.looks()).items()
        if not isinstance(answer, FederationError)
        for desk in answer.desks
        if (desk.run, desk.member) == (view.run, name)
        for known in desk.bundles
        if known.phase != Phase.OVER and is_inner_id(known.bundle)
    ]
    work = [view.hand(name).release(view.run, name, bundle) for name, bundle in found]
    await asyncio.gather(*work, return_exceptions=True)
    return tuple(sorted({bundle for _, bundle in found}))


def members_of(bundle: Bundle) -> tuple[str, ...]:
    """All whose word is needed, those that are set before those that are only looked at."""
    set_ = bundle.members()
    return (*set_, *sorted({c.member for c in bundle.conditions}.difference(set_)))


def _holding(
    looks: Mapping[str, twin_pb2.ReadDeskResponse | FederationError],
    bundle: str,
    *,
    even_over: bool = False,
) -> tuple[str, ...]:
    """The members whose desks know a bundle; of those that can't be asked nobody knows, so that
    they are among them when it is to be undone."""
    found = []
    for name, answer in looks.items():
        if isinstance(answer, FederationError):
            if not even_over:
                found.append(name)
            continue
        for desk in answer.desks:
            phases = [known.phase for known in desk.bundles if known.bundle == bundle]
            if phases and (even_over or phases[-1] != Phase.OVER):
                found.append(name)
                break
    return tuple(found)


def _refused(refusals: Sequence[Refusal]) -> ScenarioError:
    limit = refusals[0].rule.partition(":")[0]
    reason = _REASONS.get(limit, Reason.OUTSIDE_ENVELOPE)
    text = "; ".join(f"{refusal.rule}: {refusal.sentence}" for refusal in refusals)
    return ScenarioError(reason, text, {"limit": limit})


def _earliest(receipts: Sequence[Receipt]) -> Receipt:
    return min(receipts, key=lambda r: r.until_ns) if receipts else Receipt("", 0)


def _plain(reader: Reader, what: str, told: str) -> dict[str, Any]:
    return {"by": reader.identity, "stage": what, "told": told}


class PetitionService(peer_pb2_grpc.PetitionsServicer):
    """Serves it to the city's broker."""

    def __init__(self, petitions: Petitions) -> None:
        self._petitions = petitions

    async def Hear(  # noqa: N802
        self,
        request: peer_pb2.HearRequest,
        context: grpc.aio.ServicerContext[peer_pb2.HearRequest, peer_pb2.HearResponse],
    ) -> peer_pb2.HearResponse:
        async with refusing(context):
            # what has come is done to its end, even if who asked does not wait for it
            return await asyncio.shield(self._petitions.hear(request))
        raise AssertionError("abort raises")
