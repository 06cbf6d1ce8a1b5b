"""Calls every RPC of a live broker and a live twin with requests that nobody would send.

Most are well-formed messages of odd contents, some are spoilt bytes or no message at all. An answer
may be anything that is explained: an `INTERNAL` or `UNKNOWN` without a reason of ours is counted,
as are calls that outlast their deadline, and a process that is gone or no longer healthy.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from federation.v1 import (
    aid_pb2,
    broker_pb2,
    control_pb2,
    peer_pb2,
    plan_pb2,
    scenario_pb2,
    twin_pb2,
)
from federation.wire import caller
from federation.wire.credentials import Identity
from tests.cities import BIRCH_POLICY, write_birch
from tests.kills import process
from tests.waterworks import GUARD, RUN

BROKER = (
    broker_pb2.DESCRIPTOR.services_by_name["Broker"],
    scenario_pb2.DESCRIPTOR.services_by_name["Scenarios"],
    control_pb2.DESCRIPTOR.services_by_name["Control"],
    plan_pb2.DESCRIPTOR.services_by_name["Plans"],
    # a city that is exported is a twin for its peers
    peer_pb2.DESCRIPTOR.services_by_name["Peers"],
    aid_pb2.DESCRIPTOR.services_by_name["Aid"],
    twin_pb2.DESCRIPTOR.services_by_name["Twin"],
)
TWIN = (twin_pb2.DESCRIPTOR.services_by_name["Twin"],)

PEER = caller.claim("spiffe://ash/peer/broker")
"""Calls come from another city; only what a city serves to its peers looks at that."""

AID_POLICY = """
  - name: aid
    who: [ash]
    what: {flexibility: [aid.x]}
"""
GOODS = """
version: 1
goods:
  x: {unit: x, gives: [{most: 3, usd_per_h: 9}], takes: [{most: 3, usd_per_h: 9}]}
"""
"""What odd texts may name among others."""

DEADLINE_S = 20.0
"""A call that takes longer hangs; on a busy machine a good one may take a second."""

LISTEN_S = 0.05
"""How long a stream that has nothing to say is listened to."""

LANES = 16

MOST_RUNS = 64
"""Documents that make sense are sent so often; each begins a run, the others are refused."""

EXPLAINED = "multitwin"

UNEXPLAINED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""What a server answers that did not expect its own error, unless it gives a reason."""

ODD_NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63))
ODD_FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.5,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    -float("inf"),
)
ODD_TEXTS = (
    "",
    "x",
    "runs/pump-1",
    "runs/pump-1/../../x",
    "../../etc/passwd",
    "north",
    "north.speed",
    "speed",
    "\0",
    "\u202e\U0001f4a5",
    "a" * 5_000,
    "'; DROP TABLE runs; --",
    "%s%n{0}",
    "- [[[[[[[[[[",
    "&a [*a, *a]",
    "127.0.0.1:1",
    RUN,
)


@dataclass
class Tally:
    """What came of the calls."""

    rpcs: int = 0
    crashes: int = 0
    hangs: int = 0
    internal: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Oddity:
    """Makes requests, the same for the same seed."""

    def __init__(self, seed: int, documents: Sequence[str]) -> None:
        self.lots = random.Random(seed)
        self._documents = documents
        self._good_left = MOST_RUNS

    def request(self, method: MethodDescriptor) -> bytes:
        lots = self.lots
        if lots.random() < 0.05:
            return lots.randbytes(lots.randrange(200))
        message = GetMessageClass(method.input_type)()
        self._fill(message, 4)
        data: bytes = message.SerializeToString()
        if data and lots.random() < 0.15:
            spoilt = bytearray(data)
            for _ in range(lots.randint(1, 4)):
                spoilt[lots.randrange(len(spoilt))] = lots.randrange(256)
            data = bytes(spoilt[: lots.randint(0, len(spoilt))])
        return data

    def _fill(self, message: Any, depth: int) -> None:
        for each in message.DESCRIPTOR.fields:
            if self.lots.random() < 0.35:
                continue
            if each.is_repeated:
                self._fill_many(message, each, depth)
            elif each.message_type is not None:
                if depth:
                    self._fill(getattr(message, each.name), depth - 1)
                    getattr(message, each.name).SetInParent()
            else:
                setattr(message, each.name, self._plain(each))

    def _fill_many(self, message: Any, each: FieldDescriptor, depth: int) -> None:
        many = getattr(message, each.name)
        entry = each.message_type
        for _ in range(self.lots.choice((0, 1, 1, 2, 5))):
            if entry is None:
                many.append(self._plain(each))
            elif entry.GetOptions().map_entry:
                key = self._plain(entry.fields_by_name["key"])
                value = entry.fields_by_name["value"]
                if value.message_type is None:
                    many[key] = self._plain(value)
                elif depth:
                    self._fill(many[key], depth - 1)
            elif depth:
                self._fill(many.add(), depth - 1)

    def _plain(self, each: FieldDescriptor) -> Any:
        lots, kind = self.lots, each.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING and each.type == FieldDescriptor.TYPE_BYTES:
            return lots.choice((b"", lots.randbytes(8), lots.randbytes(24), lots.randbytes(997)))
        if kind == FieldDescriptor.CPPTYPE_STRING:
            return self._document() if each.name == "document" else lots.choice(ODD_TEXTS)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return lots.random() < 0.5
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return lots.choice(ODD_FLOATS)
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            return lots.randrange(5)
        number = lots.choice((*ODD_NUMBERS, lots.randrange(-100, 100)))
        low, high = _BOUNDS[kind]
        return min(max(number, low), high)

    def _document(self) -> str:
        lots = self.lots
        text = lots.choice(self._documents)
        if lots.random() < 0.02 and self._good_left:
            self._good_left -= 1
            return text
        lines = text.splitlines()
        for _ in range(lots.randint(1, 3)):
            place = lots.randrange(len(lines))
            what = lots.randrange(4)
            if what == 0:
                del lines[place]
            elif what == 1:
                lines[place] = lines[place].replace(":", lots.choice((" ", ": [", ":: ", ": !!x ")))
            elif what == 2:
                lines.insert(place, f"{lots.choice(ODD_TEXTS)}: {lots.choice(ODD_FLOATS)}")
            else:
                lines[place] += lots.choice(ODD_TEXTS)
            if not lines:
                return ""
        return "\n".join(lines)


_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@dataclass
class Target:
    """A server that is called, and what is known of it."""

    name: str
    address: str
    methods: Sequence[MethodDescriptor]
    process: asyncio.subprocess.Process
    plain: grpc.Channel
    """For conversations."""


async def call(count: int, seed: int, progress: Any = None) -> Tally:
    """Call a broker and a twin so often in all; nothing is left running."""
    tally = Tally()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = _servers(folder, tally)
        targets = [await stack.enter_async_context(server) for server in servers]
        document = json.dumps(
            {
                "name": "pump",
                "region": "nowhere",
                "horizon_h": 0.01,
                "members": {"north": {"address": targets[1].address}},
            },
            indent=1,
        )
        for turn, target in enumerate(itertools.cycle(targets)):
            if tally.rpcs >= count or tally.crashes:
                break
            odd = Oddity(seed + turn, (document, document.replace('"', "")))
            todo = min(count - tally.rpcs, 5_000)
            await _one_server(target, odd, todo, tally)
            if progress:
                progress(tally)
    return tally


def _servers(folder: Path, tally: Tally) -> list[AbstractAsyncContextManager[Target]]:
    keyring = folder / "keyring.yaml"
    guard = {"name": GUARD.name, "public_key": GUARD.public_key, "roles": ["guard"]}
    known = {"identities": [{**guard, "domains": ["*"]}]}
    keyring.write_text(json.dumps(known), encoding="utf-8")
    scenario, policy = write_birch(folder, BIRCH_POLICY + AID_POLICY)
    city: tuple[str, ...] = (
        "--city",
        "birch",
        "--export",
        str(policy),
        "--scenario",
        str(scenario),
    )
    goods, key, peers = folder / "goods.yaml", folder / "birch.pem", folder / "peers.yaml"
    goods.write_text(GOODS, encoding="utf-8")
    Identity.generate("birch").save(key)
    ash = {"name": "ash", "public_key": Identity.generate("ash").public_key, "roles": ["peer"]}
    peers.write_text(json.dumps({"identities": [ash]}), encoding="utf-8")
    city += ("--aid", str(goods), "--aid-key", str(key), "--aid-keyring", str(peers))
    store, state = str(folder / "broker.sqlite"), str(folder / "north.state")
    return [
        _serving("broker", BROKER, tally, "broker", "--port", "0", "--store", store, *city),
        _serving(
            *("twin", TWIN, tally, "serve", "tests.waterworks:Pump", "--name", "north"),
            *("--keyring", str(keyring), "--state", state),
        ),
    ]


@asynccontextmanager
async def _serving(
    name: str, services: Sequence[Any], tally: Tally, *argv: str
) -> AsyncIterator[Target]:
    methods = [method for service in services for method in service.methods]
    async with process(*argv) as (address, running):
        reading = asyncio.create_task(_drain(running, name))
        try:
            with grpc.insecure_channel(address) as plain:
                yield Target(name, address, methods, running, plain)
        finally:
            if running.returncode is None:
                running.terminate()
                try:
                    await asyncio.wait_for(running.wait(), 30.0)
                except TimeoutError:
                    tally.hangs += 1
                    tally.wrong.append(f"{name} does not end")
                    running.kill()
            await reading


async def _drain(running: asyncio.subprocess.Process, name: str) -> None:
    """Read what a server says, and show what it says of errors."""
    assert running.stderr is not None
    while line := await running.stderr.readline():
        if b"Error" in line:
            print(f"{name}: {line.decode(errors='replace').rstrip()}", file=sys.stderr)


async def _one_server(target: Target, odd: Oddity, count: int, tally: Tally) -> None:
    todo: Iterator[int] = iter(range(count))

    async def lane() -> None:
        async with grpc.aio.insecure_channel(target.address) as channel:
            for _ in todo:
                method = odd.lots.choice(target.methods)
                how_many = 1 if not method.client_streaming else odd.lots.randint(1, 6)
                requests = [odd.request(method) for _ in range(how_many)]
                await _one(target, channel, method, requests, tally)

    await asyncio.gather(*(lane() for _ in range(LANES)))
    async with grpc.aio.insecure_channel(target.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        try:
            found = await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            well = found.status == health_pb2.HealthCheckResponse.SERVING
        except grpc.aio.AioRpcError as error:
            well = False
            tally.wrong.append(f"{target.name}: health: {error.code().name}")
    if target.process.returncode is not None or not well:
        tally.crashes += 1
        tally.wrong.append(f"{target.name} ended with {target.process.returncode}")


async def _one(
    target: Target,
    channel: grpc.aio.Channel,
    method: MethodDescriptor,
    requests: Sequence[bytes],
    tally: Tally,
) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    tally.rpcs += 1
    try:
        if method.client_streaming:
            await asyncio.to_thread(_converse, target.plain, path, requests)
        elif method.server_streaming:
            ask: Any = channel.unary_stream(path)
            await _listen(ask(requests[0], timeout=DEADLINE_S, metadata=PEER))
        else:
            ask = channel.unary_unary(path)
            await ask(requests[0], timeout=DEADLINE_S, metadata=PEER)
        tally.codes["OK"] += 1
    except grpc.RpcError as error:
        tally.codes[error.code().name] += 1
        what = f"{path} {requests[0][:120]!r}: {error.code().name}: {error.details()}"
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            tally.hangs += 1
            tally.wrong.append(what)
        elif error.code() in UNEXPLAINED and not _is_explained(error):
            tally.internal += 1
            tally.wrong.append(what)


async def _listen(stream: Any) -> None:
    """Read what a stream has to say, and leave when it has nothing more for the moment."""
    for _ in range(8):
        reading = asyncio.ensure_future(stream.read())
        done, _ = await asyncio.wait([reading], timeout=LISTEN_S)
        if not done:
            stream.cancel()
            try:
                await reading
            except (asyncio.CancelledError, grpc.aio.AioRpcError):
                return
            return
        if reading.result() is grpc.aio.EOF:
            break
    stream.cancel()


def _converse(channel: grpc.Channel, path: str, requests: Sequence[bytes]) -> None:
    """Say all of it, and hear the answers to the end; the server ends what the caller has ended.

    Not with asyncio, whose client answers for itself when it writes to a stream that was ended.
    """
    ask: Any = channel.stream_stream(path)
    for _ in ask(iter(requests), timeout=DEADLINE_S, metadata=PEER):
        pass


def _is_explained(error: Any) -> bool:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            details = status_pb2.Status.FromString(value).details
            return any(d.Unpack(info) and info.domain == EXPLAINED and info.reason for d in details)
    return False
