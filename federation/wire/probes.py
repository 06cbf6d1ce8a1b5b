"""Answers in the clear whether a process is healthy, for those who can't show a certificate.

Kubernetes asks by gRPC without TLS. What it may ask under an identity is `Health.Check` alone, at
a port of its own that somebody has to have asked for.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2

_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 1024),
    ("grpc.max_metadata_size", 4096),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_connection_idle_ms", 60_000),
]


@asynccontextmanager
async def probed(healthy: health.aio.HealthServicer, host: str, port: int) -> AsyncIterator[str]:
    """Answer for as long as the context lasts; gives the address, or "" when `port` is 0.

    Says on stderr that it does. Fails with RuntimeError when the port can't be had.
    """
    if not port:
        yield ""
        return
    server = grpc.aio.server(options=_OPTIONS)
    check = grpc.unary_unary_rpc_method_handler(
        healthy.Check,
        health_pb2.HealthCheckRequest.FromString,
        health_pb2.HealthCheckResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": check}),)
    )
    address = f"{host}:{server.add_insecure_port(f'{host}:{port}')}"
    await server.start()
    print(f"health alone is told in the clear at {address}", file=sys.stderr, flush=True)
    try:
        yield address
    finally:
        await server.stop(None)
