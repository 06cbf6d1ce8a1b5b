"""The services of a broker on the wire: each call asks the broker, and says what it answers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc

from federation.broker.branches import Attempt
from federation.broker.registering import BrokerService
from federation.broker.seats import Place
from federation.broker.tell import page_of, plans_of
from federation.core.messages import Ordered
from federation.errors import Reason, ScenarioError
from federation.scenario.future import Future
from federation.v1 import (
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    plan_pb2,
    plan_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
)
from federation.wire import codec
from federation.wire.gate import check_owns
from federation.wire.status import refusing

if TYPE_CHECKING:
    from federation.broker.server import BrokerServer

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (broker_pb2, "Broker"),
        (scenario_pb2, "Scenarios"),
        (plan_pb2, "Plans"),
        (control_pb2, "Control"),
    )
)


def add_services(broker: BrokerServer, server: grpc.aio.Server) -> BrokerService:
    """Answer for a broker at a server; the service at which members register."""
    service = _Broker(broker)
    broker_pb2_grpc.add_BrokerServicer_to_server(service, server)
    scenario_pb2_grpc.add_ScenariosServicer_to_server(_Scenarios(broker), server)
    plan_pb2_grpc.add_PlansServicer_to_server(_Plans(broker), server)
    control_pb2_grpc.add_ControlServicer_to_server(_Control(broker), server)
    return service


class _Broker(BrokerService):
    """Registration, with every lease on record, and the state of runs for those who watch."""

    def __init__(self, broker: BrokerServer) -> None:
        super().__init__(broker.registry)
        self._broker = broker

    async def Register(  # noqa: N802
        self,
        request: broker_pb2.RegisterRequest,
        context: grpc.aio.ServicerContext[broker_pb2.RegisterRequest, broker_pb2.RegisterResponse],
    ) -> broker_pb2.RegisterResponse:
        response = await super().Register(request, context)
        async with refusing(context):
            store = self._broker.store
            await asyncio.to_thread(store.keep_lease_epoch, response.lease.epoch)
        self._broker.note_arrival()
        return response

    async def Leave(  # noqa: N802
        self,
        request: broker_pb2.LeaveRequest,
        context: grpc.aio.ServicerContext[broker_pb2.LeaveRequest, broker_pb2.LeaveResponse],
    ) -> broker_pb2.LeaveResponse:
        leases = self.registry.members(time.monotonic_ns())
        left = [lease.member.name for lease in leases if lease.id == request.lease]
        response = await super().Leave(request, context)
        self._broker.note_roster(left)
        return response

    async def Watch(  # noqa: N802
        self,
        request: broker_pb2.WatchRequest,
        context: grpc.aio.ServicerContext[broker_pb2.WatchRequest, broker_pb2.WatchResponse],
    ) -> AsyncIterator[broker_pb2.WatchResponse]:
        async with refusing(context):
            async for response in self._broker.follow(
                request.run, request.cursor, request.members, request.variables
            ):
                yield response

    async def QueryHistory(  # noqa: N802
        self,
        request: broker_pb2.QueryHistoryRequest,
        context: grpc.aio.ServicerContext[
            broker_pb2.QueryHistoryRequest, broker_pb2.QueryHistoryResponse
        ],
    ) -> broker_pb2.QueryHistoryResponse:
        async with refusing(context):
            return await self._broker.history(request)
        raise AssertionError("abort raises")

    async def ListOutages(  # noqa: N802
        self,
        request: broker_pb2.ListOutagesRequest,
        context: grpc.aio.ServicerContext[
            broker_pb2.ListOutagesRequest, broker_pb2.ListOutagesResponse
        ],
    ) -> broker_pb2.ListOutagesResponse:
        async with refusing(context):
            return await self._broker.outages(request)
        raise AssertionError("abort raises")


class _Scenarios(scenario_pb2_grpc.ScenariosServicer):
    def __init__(self, broker: BrokerServer) -> None:
        self._broker = broker

    async def CreateRun(  # noqa: N802
        self,
        request: scenario_pb2.CreateRunRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.CreateRunRequest, scenario_pb2.CreateRunResponse
        ],
    ) -> scenario_pb2.CreateRunResponse:
        async with refusing(context):
            seed = request.seed if request.HasField("seed") else None
            pace = request.pace_factor if request.HasField("pace_factor") else None
            name = await self._broker.create(request.document, seed, pace)
            return scenario_pb2.CreateRunResponse(run=await self._report(name))
        raise AssertionError("abort raises")

    async def GetRun(  # noqa: N802
        self,
        request: scenario_pb2.GetRunRequest,
        context: grpc.aio.ServicerContext[scenario_pb2.GetRunRequest, scenario_pb2.GetRunResponse],
    ) -> scenario_pb2.GetRunResponse:
        async with refusing(context):
            run = await self._broker.find(request.name)
            return scenario_pb2.GetRunResponse(
                run=await self._broker.report(run), document=run.document, measure=run.measure
            )
        raise AssertionError("abort raises")

    async def ListRuns(  # noqa: N802
        self,
        request: scenario_pb2.ListRunsRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.ListRunsRequest, scenario_pb2.ListRunsResponse
        ],
    ) -> scenario_pb2.ListRunsResponse:
        async with refusing(context):
            size, before = page_of(request.page_size, request.page_token)
            runs, more = await asyncio.to_thread(self._broker.store.runs, size, before)
            return scenario_pb2.ListRunsResponse(
                runs=[await self._report(run.name) for run in runs],
                next_page_token="" if more is None else str(more),
            )
        raise AssertionError("abort raises")

    async def WatchRun(  # noqa: N802
        self,
        request: scenario_pb2.WatchRunRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.WatchRunRequest, scenario_pb2.WatchRunResponse
        ],
    ) -> AsyncIterator[scenario_pb2.WatchRunResponse]:
        async with refusing(context):
            async for run in self._broker.follow_run(request.name):
                yield scenario_pb2.WatchRunResponse(run=await self._broker.report(run))

    async def CancelRun(  # noqa: N802
        self,
        request: scenario_pb2.CancelRunRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.CancelRunRequest, scenario_pb2.CancelRunResponse
        ],
    ) -> scenario_pb2.CancelRunResponse:
        async with refusing(context):
            live = await self._broker.live(request.name)
            if live is not None:
                await live.cancel()
            return scenario_pb2.CancelRunResponse(run=await self._report(request.name))
        raise AssertionError("abort raises")

    async def ForkRun(  # noqa: N802
        self,
        request: scenario_pb2.ForkRunRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.ForkRunRequest, scenario_pb2.ForkRunResponse
        ],
    ) -> scenario_pb2.ForkRunResponse:
        async with refusing(context):
            if request.actions:
                _named(request.operator)
            name = await self._broker.fork(
                request.name,
                request.time_ns if request.HasField("time_ns") else None,
                request.measure,
                request.horizon_ns if request.HasField("horizon_ns") else None,
                [
                    Ordered(request.operator, codec.decode_action(action))
                    for action in request.actions
                ],
                _future(request.future) if request.HasField("future") else None,
            )
            return scenario_pb2.ForkRunResponse(
                run=await self._report(name), is_future=request.HasField("future")
            )
        raise AssertionError("abort raises")

    async def TryFutures(  # noqa: N802
        self,
        request: scenario_pb2.TryFuturesRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.TryFuturesRequest, scenario_pb2.TryFuturesResponse
        ],
    ) -> AsyncIterator[scenario_pb2.TryFuturesResponse]:
        async with refusing(context):
            attempts = [
                Attempt(a.measure, _future(a.future) if a.HasField("future") else None)
                for a in request.attempts
            ]
            trying = self._broker.try_futures(
                request.name, request.time_ns, request.horizon_ns, attempts, request.figures
            )
            async with aclosing(trying) as all_tried:
                async for response in all_tried:
                    yield response

    async def ReplayRun(  # noqa: N802
        self,
        request: scenario_pb2.ReplayRunRequest,
        context: grpc.aio.ServicerContext[
            scenario_pb2.ReplayRunRequest, scenario_pb2.ReplayRunResponse
        ],
    ) -> scenario_pb2.ReplayRunResponse:
        async with refusing(context):
            name = await self._broker.replay(
                request.name, request.live_members, request.recorded_members
            )
            return scenario_pb2.ReplayRunResponse(run=await self._report(name))
        raise AssertionError("abort raises")

    async def _report(self, name: str) -> scenario_pb2.Run:
        return await self._broker.report(await self._broker.find(name))


class _Plans(plan_pb2_grpc.PlansServicer):
    def __init__(self, broker: BrokerServer) -> None:
        self._broker = broker

    async def ListPlans(  # noqa: N802
        self,
        request: plan_pb2.ListPlansRequest,
        context: grpc.aio.ServicerContext[plan_pb2.ListPlansRequest, plan_pb2.ListPlansResponse],
    ) -> plan_pb2.ListPlansResponse:
        async with refusing(context):
            size, start = page_of(request.page_size, request.page_token)
            run = await self._broker.find(request.run)
            plans = await asyncio.to_thread(plans_of, self._broker.store, run)
            older = plans if start is None else plans[max(len(plans) - start, 0) :]
            left = len(older) - size
            return plan_pb2.ListPlansResponse(
                plans=older[:size], next_page_token=str(left) if left > 0 else ""
            )
        raise AssertionError("abort raises")


class _Control(control_pb2_grpc.ControlServicer):
    def __init__(self, broker: BrokerServer) -> None:
        self._broker = broker

    async def SubmitAction(  # noqa: N802
        self,
        request: control_pb2.SubmitActionRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.SubmitActionRequest, control_pb2.SubmitActionResponse
        ],
    ) -> control_pb2.SubmitActionResponse:
        async with refusing(context):
            _named(request.operator)
            live = await self._broker.live(request.run)
            if live is None:
                raise ScenarioError(
                    Reason.OUTSIDE_ENVELOPE, f"{request.run} has ended", {"run": request.run}
                )
            taken = await live.submit(request.operator, codec.decode_action(request.action))
            return control_pb2.SubmitActionResponse(event=taken.event, time_ns=taken.time_ns)
        raise AssertionError("abort raises")

    async def AddMembers(  # noqa: N802
        self,
        request: control_pb2.AddMembersRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.AddMembersRequest, control_pb2.AddMembersResponse
        ],
    ) -> control_pb2.AddMembersResponse:
        async with refusing(context):
            _named(request.operator)
            time_ns = request.time_ns if request.HasField("time_ns") else None
            taken = await self._broker.join(
                request.run, request.document, time_ns, request.operator
            )
            return control_pb2.AddMembersResponse(event=taken.event, time_ns=taken.time_ns)
        raise AssertionError("abort raises")

    async def RemoveMember(  # noqa: N802
        self,
        request: control_pb2.RemoveMemberRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.RemoveMemberRequest, control_pb2.RemoveMemberResponse
        ],
    ) -> control_pb2.RemoveMemberResponse:
        async with refusing(context):
            _named(request.operator)
            time_ns = request.time_ns if request.HasField("time_ns") else None
            taken = await self._broker.part(request.run, request.member, time_ns, request.operator)
            return control_pb2.RemoveMemberResponse(event=taken.event, time_ns=taken.time_ns)
        raise AssertionError("abort raises")

    async def ReplaceMember(  # noqa: N802
        self,
        request: control_pb2.ReplaceMemberRequest,
        context: grpc.aio.ServicerContext[
            control_pb2.ReplaceMemberRequest, control_pb2.ReplaceMemberResponse
        ],
    ) -> control_pb2.ReplaceMemberResponse:
        async with refusing(context):
            _named(request.operator)
            time_ns = request.time_ns if request.HasField("time_ns") else None
            match request.WhichOneof("heir"):
                case "service":
                    place = Place(request.service)
                case "address":
                    place = Place(request.address, request.address)
                case _:
                    raise ScenarioError(
                        Reason.SCENARIO_INVALID, "say who takes over: a service or an address"
                    )
            taken = await self._broker.replace(
                request.run, request.member, place, time_ns, request.operator
            )
            return control_pb2.ReplaceMemberResponse(event=taken.event, time_ns=taken.time_ns)
        raise AssertionError("abort raises")

    async def StopRun(  # noqa: N802
        self,
        request: control_pb2.StopRunRequest,
        context: grpc.aio.ServicerContext[control_pb2.StopRunRequest, control_pb2.StopRunResponse],
    ) -> control_pb2.StopRunResponse:
        async with refusing(context):
            _named(request.operator)
            live = await self._broker.live(request.run)
            if live is not None:
                await live.cancel(request.operator, request.reason)
            run = await self._broker.find(request.run)
            return control_pb2.StopRunResponse(run=await self._broker.report(run))
        raise AssertionError("abort raises")

    async def Why(  # noqa: N802
        self,
        request: control_pb2.WhyRequest,
        context: grpc.aio.ServicerContext[control_pb2.WhyRequest, control_pb2.WhyResponse],
    ) -> control_pb2.WhyResponse:
        async with refusing(context):
            return await self._broker.why(request.run)
        raise AssertionError("abort raises")


def _future(message: scenario_pb2.Future) -> Future:
    seed = message.seed if message.HasField("seed") else None
    if seed is not None and seed < 0:
        raise ScenarioError(Reason.SCENARIO_INVALID, f"{seed} is no seed of a future")
    for name, value in message.parameters.items():
        if not math.isfinite(value):
            raise ScenarioError(
                Reason.NOT_FINITE, f"the parameter {name} is {value}", {"parameter": name}
            )
    believed = {b.member: codec.decode_values(b.outputs) for b in message.believed}
    return Future(message.number, seed, dict(message.parameters), believed)


def _named(operator: str) -> None:
    if not operator.strip():
        raise ScenarioError(Reason.SCENARIO_INVALID, "say who asks: the operator is empty")
    check_owns(operator)
