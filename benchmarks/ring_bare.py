"""The floor under the ring over sockets: gRPC streams with the same bytes and nothing above them.

A process for each place answers a request of the size of a frame with a response of the size
of its answer. A driver sends one to every place, waits for all of the answers, and begins the
next round: the processes, streams and bytes of a federation without its coordination.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import grpc
import numpy as np

from benchmarks import WARM_STEPS, print_seconds
from federation.loop import run
from federation.twin import MINUTE_NS, StepInput, StepResult
from federation.v1 import twin_pb2
from federation.wire import codec

METHOD = "/bare.Ring/Turn"


def frames(m: int) -> tuple[bytes, bytes]:
    """A frame and its answer, as the federation sends them in the middle of a run."""
    vector = np.full(m, 1000.0)
    step = codec.encode_step_input(StepInput(1000 * MINUTE_NS, inputs={"before": vector}))
    result = codec.encode_step_result(StepResult(1000 * MINUTE_NS, outputs={"after": vector}))
    session, frame = f"{'0' * 32}-1", 1001
    request = twin_pb2.SessionRequest(session=session, frame=frame, epoch=1)
    request.advance.steps.append(step)
    response = twin_pb2.SessionResponse(session=session, frame=frame)
    response.advanced.results.append(result)
    return request.SerializeToString(), response.SerializeToString()


def sockets(n: int, m: int, t: int) -> float:
    me = [sys.executable, "-m", "benchmarks.ring_bare", "place", str(m)]
    places = [subprocess.Popen(me, stdout=subprocess.PIPE, text=True) for _ in range(n)]
    try:
        addresses = []
        for place in places:
            assert place.stdout is not None
            addresses.append(place.stdout.readline().strip())
        return run(_drive(addresses, m, t))
    finally:
        for place in places:
            place.kill()
            place.wait()


async def _drive(addresses: list[str], m: int, t: int) -> float:
    """The wall time of `t` rounds over streams that are open."""
    request, response = frames(m)
    # a channel each, or gRPC would not know that the places are on hosts of their own
    channels = [grpc.aio.insecure_channel(address) for address in addresses]
    calls: list[grpc.aio.StreamStreamCall[bytes, bytes]] = [
        channel.stream_stream(METHOD)() for channel in channels
    ]

    async def turns(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        await call.write(request)
        answer = await call.read()
        if answer != response:
            raise RuntimeError(f"{answer!r} came back")

    async def rounds(count: int) -> None:
        for _ in range(count):
            await asyncio.gather(*map(turns, calls))

    await rounds(WARM_STEPS)
    started_s = time.perf_counter()
    await rounds(t)
    took_s = time.perf_counter() - started_s
    for channel in channels:
        await channel.close()
    return took_s


async def _place(m: int) -> None:
    request, response = frames(m)

    async def turn(
        requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        while await context.read() == request:
            await context.write(response)

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(turn)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare.Ring", {"Turn": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    if sys.argv[1] == "place":
        run(_place(int(sys.argv[2])))
    else:
        print_seconds({"grpc": sockets})
