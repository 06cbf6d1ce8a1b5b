"""What people ask of a broker from the command line."""

from __future__ import annotations

import csv
import getpass
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import numpy as np

from federation.broker import outages
from federation.broker.why import words
from federation.core.waits import instant
from federation.errors import Reason
from federation.twin import HOUR_NS, MINUTE_NS
from federation.v1 import (
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    scenario_pb2,
    scenario_pb2_grpc,
)
from federation.wire import codec, footing, greeting, secure, status
from federation.wire.link import channel_options
from federation.wire.party import Part
from federation.wire.profile import Area, decode_profile, encode_area

ANSWER_S = 30.0
"""How long a broker may take to answer a question."""

MAX_MESSAGE_BYTES = 256 << 20


@asynccontextmanager
async def asking(broker: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a broker; what it refuses is raised as a `FederationError`."""
    expects = footing.expected(Part.BROKER)
    async with secure.channel(broker, expects, channel_options(MAX_MESSAGE_BYTES)) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            failure = status.from_rpc(error, f"the broker at {broker}")
            if failure.reason is Reason.UNREACHABLE:
                failure = await greeting.plain_refusal(broker) or failure
            raise failure from None


async def print_why(broker: str, run: str) -> None:
    """Write what a run waits for or, when it has ended, what its time went to."""
    async with asking(broker) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        print(words(await stub.Why(control_pb2.WhyRequest(run=run), timeout=ANSWER_S)))


async def print_members(
    broker: str,
    domain: str,
    area_deg: Sequence[float] | None,
    features: Sequence[str],
    step_min: float,
) -> None:
    """Write who is registered and is what is looked for, a line each."""
    request = broker_pb2.ListMembersRequest(
        domain=domain, features=features, max_period_ns=round(step_min * MINUTE_NS)
    )
    if area_deg is not None:
        west, south, east, north = area_deg
        request.area.CopyFrom(encode_area(Area(west, south, east, north)))
    async with asking(broker) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        answer = await stub.ListMembers(request, timeout=ANSWER_S)
    for member in answer.members:
        profile = decode_profile(member.profile)
        step = "" if profile.time is None else f"every {profile.time.period_ns / MINUTE_NS:g} min"
        step = "by events" if step == "every 0 min" else step
        told = (member.domain, f"{member.model} {member.version}", profile.fidelity, step)
        print("  ".join((f"{member.name:12}", f"{member.address:21}", *filter(None, told))))


async def start_run(
    broker: str, document: str, seed: int | None, pace_factor: float | None
) -> None:
    """Begin a run under the first measure of its document, and say its name."""
    async with asking(broker) as channel:
        stub: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(channel)
        request = scenario_pb2.CreateRunRequest(
            document=document, seed=seed, pace_factor=pace_factor
        )
        answer = await stub.CreateRun(request, timeout=ANSWER_S)
    print(answer.run.name)


async def add_members(broker: str, run: str, document: str, at_h: float | None) -> None:
    """Let members join a run, and say when they do."""
    async with asking(broker) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        request = control_pb2.AddMembersRequest(
            run=run, document=document, time_ns=_instant_ns(at_h), operator=_operator()
        )
        answer = await stub.AddMembers(request, timeout=ANSWER_S)
    print(f"joined at {instant(answer.time_ns)} ({answer.event})")


async def remove_member(broker: str, run: str, member: str, at_h: float | None) -> None:
    """Let a member leave a run, and say when it does."""
    async with asking(broker) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        request = control_pb2.RemoveMemberRequest(
            run=run, member=member, time_ns=_instant_ns(at_h), operator=_operator()
        )
        answer = await stub.RemoveMember(request, timeout=ANSWER_S)
    print(f"{member} leaves at {instant(answer.time_ns)} ({answer.event})")


async def replace_member(broker: str, run: str, member: str, heir: str, at_h: float | None) -> None:
    """Let another service go on for a member, and say when it did. The service is an address,
    or the name under which it is registered."""
    async with asking(broker) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        request = control_pb2.ReplaceMemberRequest(
            run=run, member=member, time_ns=_instant_ns(at_h), operator=_operator()
        )
        if ":" in heir:
            request.address = heir
        else:
            request.service = heir
        # it comes back when the run is there, which may be long
        answer = await stub.ReplaceMember(request)
    print(f"{heir} goes on for {member} at {instant(answer.time_ns)} ({answer.event})")


async def fork_run(
    broker: str, run: str, at_h: float | None, measure: str, horizon_h: float | None
) -> None:
    """Start a run with the past of another one, and say its name."""
    async with asking(broker) as channel:
        stub: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(channel)
        request = scenario_pb2.ForkRunRequest(
            name=run,
            time_ns=_instant_ns(at_h),
            measure=measure,
            horizon_ns=_instant_ns(horizon_h),
        )
        print((await stub.ForkRun(request, timeout=ANSWER_S)).run.name)


async def replay_run(
    broker: str, run: str, live: Sequence[str], recorded: Sequence[str] | None
) -> None:
    """Go through a run again and say if it was the same. Fails with REPLAY_DIFFERS."""
    async with asking(broker) as channel:
        stub: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(channel)
        request = scenario_pb2.ReplayRunRequest(
            name=run, live_members=live, recorded_members=recorded or ()
        )
        made = (await stub.ReplayRun(request, timeout=ANSWER_S)).run
        async for answer in stub.WatchRun(scenario_pb2.WatchRunRequest(name=made.name)):
            made = answer.run
    if made.state != scenario_pb2.Run.STATE_SUCCEEDED:
        raise status.decode_error(made.error)
    print(f"{made.name} is as {run}, up to {instant(made.time_ns)}: {made.digest}")


def _instant_ns(time_h: float | None) -> int | None:
    return None if time_h is None else round(time_h * HOUR_NS)


def _operator() -> str:
    """Who asks, for the record."""
    trust = footing.present().trust
    if trust is not None:
        return trust.party.name
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


async def print_outages(broker: str, run: str) -> None:
    """Write when a run went on without somebody, a line for each time."""
    async with asking(broker) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        answer = await stub.ListOutages(broker_pb2.ListOutagesRequest(run=run))
    print(outages.words(answer))


async def print_history(
    broker: str,
    run: str,
    variable: str,
    start_h: float,
    end_h: float | None,
    points: int,
    entity: int | None,
) -> None:
    """Write the past of `member.variable` as CSV, a row per value or per bucket and entity."""
    member, _, name = variable.partition(".")
    request = broker_pb2.QueryHistoryRequest(
        run=run,
        member=member,
        variable=name,
        start_ns=round(start_h * HOUR_NS),
        end_ns=None if end_h is None else round(end_h * HOUR_NS),
        buckets=points,
        entity=entity,
    )
    async with asking(broker) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        answer = await stub.QueryHistory(request)
    out = csv.writer(sys.stdout, lineterminator="\n")
    if not points:
        out.writerow(("time_h", "revision", "quality", "entity", "value"))
        for entry in answer.entries:
            record = codec.decode_entry(entry)
            value = codec.decode_vector(entry.value.values.values, name)
            quality = broker_pb2.LedgerEntry.Quality.Name(entry.value.quality)
            place = (record.time_ns / HOUR_NS, entry.value.revision, quality[len("QUALITY_") :])
            out.writerows((*place, index, number) for index, number in enumerate(value.tolist()))
        return
    out.writerow(("start_h", "end_h", "count", "entity", "first", "last", "low", "high", "mean"))
    for bucket in answer.buckets:
        span = (bucket.start_ns / HOUR_NS, bucket.end_ns / HOUR_NS, bucket.count)
        columns = [
            codec.decode_vector(data, name)
            for data in (bucket.first, bucket.last, bucket.low, bucket.high, bucket.mean)
        ]
        for index, numbers in enumerate(np.column_stack(columns).tolist()):
            out.writerow((*span, index if entity is None else entity, *numbers))
