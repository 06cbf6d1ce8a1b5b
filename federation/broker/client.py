"""What people ask of a broker from the command line."""

from __future__ import annotations

import csv
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np

from federation.broker.why import words
from federation.twin import HOUR_NS
from federation.v1 import broker_pb2, broker_pb2_grpc, control_pb2, control_pb2_grpc
from federation.wire import codec, status
from federation.wire.link import channel_options

ANSWER_S = 30.0
"""How long a broker may take to answer a question."""

MAX_MESSAGE_BYTES = 256 << 20


@asynccontextmanager
async def asking(broker: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a broker; what it refuses is raised as a `FederationError`."""
    async with grpc.aio.insecure_channel(broker, channel_options(MAX_MESSAGE_BYTES)) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, f"the broker at {broker}") from None


async def print_why(broker: str, run: str) -> None:
    """Write what a run waits for or, when it has ended, what its time went to."""
    async with asking(broker) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        print(words(await stub.Why(control_pb2.WhyRequest(run=run), timeout=ANSWER_S)))


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
