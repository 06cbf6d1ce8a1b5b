"""What the people of a city ask its broker about aid."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc

from federation.broker.store import Store
from federation.core.aid import Held, State
from federation.core.ledger import Record
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.peer.measure import means
from federation.twin import Vector
from federation.v1 import aid_pb2, aid_pb2_grpc, peer_pb2
from federation.wire.aid import encode_terms
from federation.wire.link import LinkOptions
from federation.wire.status import refusing

# Who gives no aid needs no solver.
if TYPE_CHECKING:
    from federation.peer.aid import AidDesk

_STATES = {
    State.OFFERED: aid_pb2.Commitment.STATE_OFFERED,
    State.ACCEPTED: aid_pb2.Commitment.STATE_ACCEPTED,
    State.BOUND: aid_pb2.Commitment.STATE_BOUND,
    State.LAPSED: aid_pb2.Commitment.STATE_LAPSED,
}


class AidService(aid_pb2_grpc.AidServicer):
    """Serves a city's desk to its own people, if it has one. `link` says how other cities are
    spoken to."""

    def __init__(self, desk: AidDesk | None, store: Store, link: Callable[[], LinkOptions]) -> None:
        self._any_desk, self._store, self._link = desk, store, link

    @property
    def _desk(self) -> AidDesk:
        if self._any_desk is None:
            raise TwinError(Reason.UNSUPPORTED, "this broker was told of no aid: give it --aid")
        return self._any_desk

    async def Seek(  # noqa: N802
        self,
        request: aid_pb2.SeekRequest,
        context: grpc.aio.ServicerContext[aid_pb2.SeekRequest, aid_pb2.SeekResponse],
    ) -> aid_pb2.SeekResponse:
        async with refusing(context):
            desk = self._desk
            from federation.peer.aid import HOLD_S
            from federation.peer.bargaining import Wanted, seek
            from federation.plan.bargain import TOLERANCE

            ways = {peer_pb2.BargainRequest.WAY_GIVE, peer_pb2.BargainRequest.WAY_TAKE}
            if any(line.way not in ways for line in request.lines):
                raise ScenarioError(Reason.SCENARIO_INVALID, "say of each line which way it goes")
            if not 0.0 <= request.tolerance <= 1.0:
                raise ScenarioError(Reason.SCENARIO_INVALID, "a tolerance is a share, 0 to 1")
            wanted = [
                Wanted(line.city, line.good, line.way == peer_pb2.BargainRequest.WAY_GIVE)
                for line in request.lines
            ]
            has_hold = request.HasField("hold_duration")
            hold_s = request.hold_duration.ToNanoseconds() / 1e9 if has_hold else HOLD_S
            agreement = await seek(
                desk,
                wanted,
                dict(request.addresses),
                request.start_ns,
                tuple(request.periods_ns),
                request.purpose,
                hold_s,
                request.tolerance or TOLERANCE,
                self._link(),
            )
            return aid_pb2.SeekResponse(
                commitments=[self._told(desk.held(id_)) for id_ in agreement.commitments],
                cost_usd=agreement.cost_usd,
                bound_usd=agreement.bound_usd,
                gap=agreement.gap,
                rounds=agreement.rounds,
                alone_usd=agreement.alone_usd,
            )
        raise AssertionError("abort raises")

    async def ListCommitments(  # noqa: N802
        self,
        request: aid_pb2.ListCommitmentsRequest,
        context: grpc.aio.ServicerContext[
            aid_pb2.ListCommitmentsRequest, aid_pb2.ListCommitmentsResponse
        ],
    ) -> aid_pb2.ListCommitmentsResponse:
        async with refusing(context):
            told = [self._told(held) for held in self._desk.all()]
            return aid_pb2.ListCommitmentsResponse(commitments=told)
        raise AssertionError("abort raises")

    async def Reconcile(  # noqa: N802
        self,
        request: aid_pb2.ReconcileRequest,
        context: grpc.aio.ServicerContext[aid_pb2.ReconcileRequest, aid_pb2.ReconcileResponse],
    ) -> aid_pb2.ReconcileResponse:
        async with refusing(context):
            desk = self._desk
            from federation.peer.bargaining import Envoy

            async with Envoy(desk, request.city, request.address, self._link()) as envoy:
                await envoy.reconcile()
            between = [h for h in desk.all() if h.terms.other(desk.city) == request.city]
            return aid_pb2.ReconcileResponse(commitments=list(map(self._told, between)))
        raise AssertionError("abort raises")

    async def Settle(  # noqa: N802
        self,
        request: aid_pb2.SettleRequest,
        context: grpc.aio.ServicerContext[aid_pb2.SettleRequest, aid_pb2.SettleResponse],
    ) -> aid_pb2.SettleResponse:
        async with refusing(context):
            desk = self._desk
            from federation.peer.bargaining import Envoy

            terms = desk.held(request.commitment).terms
            entity = request.entity if request.HasField("entity") else None
            run = await asyncio.to_thread(self._store.run, request.run)
            delivered = await asyncio.to_thread(
                measured,
                self._store,
                request.run,
                request.variable,
                entity,
                terms.start_ns,
                terms.periods_ns,
            )
            over_ns = terms.end_ns if run.state.is_over else run.settled_ns
            said = await asyncio.to_thread(
                desk.state_delivered, request.commitment, delivered.tolist(), over_ns
            )
            if request.address:
                other = terms.other(desk.city)
                try:
                    async with Envoy(desk, other, request.address, self._link()) as envoy:
                        await envoy.reconcile(said)
                except FederationError as error:
                    if error.reason not in (Reason.UNREACHABLE, Reason.MEMBER_LATE):
                        raise  # who is away hears it when the two reconcile
            return aid_pb2.SettleResponse(commitment=self._told(desk.held(request.commitment)))
        raise AssertionError("abort raises")

    def _told(self, held: Held) -> aid_pb2.Commitment:
        return told(held, self._desk.city)


def told(held: Held, city: str) -> aid_pb2.Commitment:
    """A promise as one of its sides tells of it."""
    other = held.terms.other(city)
    return aid_pb2.Commitment(
        id=held.terms.id,
        terms=encode_terms(held.terms),
        state=_STATES[held.state],
        why=held.why,
        delivered=held.delivered(city) or (),
        delivered_there=held.delivered(other) or (),
        due_usd=held.due_usd(city) or 0.0,
        due_there_usd=held.due_usd(other) or 0.0,
        is_settled=held.is_settled,
    )


def measured(
    store: Store,
    run: str,
    name: str,
    entity: int | None,
    start_ns: int,
    periods_ns: Sequence[int],
) -> Vector:
    """The mean of an output of a run over each period, as its ledger has it; 0 where it is below.

    Fails with UNKNOWN_VARIABLE, and with UNKNOWN_ENTITY.
    """
    member, _, variable = name.partition(".")
    end_ns = start_ns + sum(periods_ns)
    found = [
        stored.entry
        for stored in store.history(run, member, variable, 0, end_ns)
        if isinstance(stored.entry, Record)
    ]
    if not found:
        raise ScenarioError(Reason.UNKNOWN_VARIABLE, f"no {name} is on record in {run}")
    if entity is not None and not 0 <= entity < found[0].value.size:
        raise ScenarioError(Reason.UNKNOWN_ENTITY, f"{name} has {found[0].value.size} entities")
    values = [float(r.value.sum() if entity is None else r.value[entity]) for r in found]
    told = means([r.time_ns for r in found], values, start_ns, periods_ns)
    return told.clip(min=0.0)
