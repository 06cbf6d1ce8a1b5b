"""Makes the channels and opens the ports of every process: over mutual TLS, or in the clear.

Over TLS (1.2 or later) both ends show certificates. gRPC checks at every handshake that the other
end has the key of a certificate of the right authority and name; before a channel is used, and
when a call over it fails, the other end is greeted as well.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_status import rpc_status  # type: ignore[import-untyped]

from federation.errors import FederationError, Reason, ScenarioError
from federation.wire import status
from federation.wire.footing import FLAG, Footing, is_local, present, serving_trust
from federation.wire.greeting import greet
from federation.wire.party import Part, Party
from federation.wire.trust import Material, Trust

GREET_S = 5.0
"""How long the other end may take for a greeting."""


# -- those who call ----------------------------------------------------------------------


def channel(
    address: str, expects: Party | None, options: Sequence[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    """A channel to `address`, on the footing of who asks; in the clear to whom nobody `expects`.

    Fails with PLAIN_TEXT_REFUSED when that would be plain text to another machine. Over TLS, calls
    fail with NOT_AUTHENTICATED unless who `expects` says answers.
    """
    on = present()
    if on.trust is None or expects is None:
        if not (on.is_exposed or is_local(address)):
            raise ScenarioError(
                Reason.PLAIN_TEXT_REFUSED,
                f"{address} is on another machine, and this process has no certificate to speak to "
                f"it under: give --tls DIR (see multitwin certs), or {FLAG} if everybody in "
                "between may read and change what is said",
                {"address": address},
            )
        return grpc.aio.insecure_channel(address, options)
    return _Channel(address, expects, on.trust, options)


class _Channel(grpc.aio.Channel):
    """A channel over TLS that makes another connection when our certificates have changed.

    What goes on over the one before is left to end there.
    """

    def __init__(
        self, address: str, expects: Party, trust: Trust, options: Sequence[tuple[str, Any]]
    ) -> None:
        self.address = address
        self.expects = expects
        self.trust = trust
        self.is_greeted = False
        self._options = [
            *options,
            ("grpc.ssl_target_name_override", expects.host),
            ("grpc.default_authority", expects.host),
        ]
        self._material = trust.material()
        self._inner = self._connected()
        self._retired: set[asyncio.Task[None]] = set()

    def _connected(self) -> grpc.aio.Channel:
        material = self._material
        credentials = grpc.ssl_channel_credentials(
            material.roots(self.expects.city) or b" ", material.key, material.certificate
        )
        return grpc.aio.secure_channel(
            self.address, credentials, self._options, interceptors=[_Greeting(self)]
        )

    @property
    def present(self) -> grpc.aio.Channel:
        """The channel for what begins now."""
        material = self.trust.material()
        if material is not self._material:
            self._material = material
            before, self._inner = self._inner, self._connected()
            self.is_greeted = False
            retiring = asyncio.get_running_loop().create_task(before.close(_RETIRE_S))
            self._retired.add(retiring)
            retiring.add_done_callback(self._retired.discard)
        return self._inner

    async def greet(self) -> None:
        """Learn who is there, once; fails with NOT_AUTHENTICATED, and with OSError."""
        if not self.is_greeted:
            await greet(self.address, self.expects, self.trust)
            self.is_greeted = True

    async def channel_ready(self) -> None:
        """Come back when the right one answers. Fails with NOT_AUTHENTICATED when it is not."""
        inner = self.present
        while not self.is_greeted:
            try:
                await self.greet()
            except OSError:  # nobody is there yet
                await asyncio.sleep(0.05)
        await inner.channel_ready()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.present.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def close(self, grace: float | None = None) -> None:
        for retiring in self._retired:
            retiring.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)
        await self._inner.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _call(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        return _Call(self, lambda inner: getattr(inner, kind)(*args, **kwargs))

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("unary_unary", *args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("unary_stream", *args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("stream_unary", *args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("stream_stream", *args, **kwargs)


_RETIRE_S = 7 * 86_400.0
"""How long what goes on over a connection may outlive the certificate that opened it; the other
end ends it when that expires."""


class _Call:
    """One RPC of a channel, whichever connection that has at the time."""

    def __init__(self, owner: _Channel, make: Callable[[grpc.aio.Channel], Any]) -> None:
        self._owner = owner
        self._make = make
        self._inner = owner.present
        self._call = make(self._inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self._owner.present
        if inner is not self._inner:
            self._inner, self._call = inner, self._make(inner)
        return self._call(*args, **kwargs)


class _Greeting(grpc.aio.UnaryUnaryClientInterceptor):
    """Greets who is there before the first call, and after one that nobody answered."""

    def __init__(self, owner: _Channel) -> None:
        self._owner = owner

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        limit_s = min(client_call_details.timeout or GREET_S, GREET_S)
        await self._greet(limit_s)
        call = await continuation(client_call_details, request)
        try:
            code = await call.code()
        except asyncio.CancelledError:
            call.cancel()
            raise
        if code is grpc.StatusCode.UNAVAILABLE:
            self._owner.is_greeted = False
            await self._greet(limit_s)
        return call

    async def _greet(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._owner.greet()
        except FederationError as error:
            raise _as_rpc(error) from None
        except TimeoutError:
            silent = ScenarioError(
                Reason.UNREACHABLE,
                f"{self._owner.address} did not say who it is within {limit_s:g} s",
                {"address": self._owner.address},
            )
            raise _as_rpc(silent) from None
        except OSError:
            pass  # gRPC finds out by itself that nobody is there


def _as_rpc(error: FederationError) -> grpc.aio.AioRpcError:
    """An error of ours in the form that a failed call has."""
    said = rpc_status.to_status(status.encode_status(error))
    trailing = grpc.aio.Metadata(*said.trailing_metadata)
    return grpc.aio.AioRpcError(said.code, grpc.aio.Metadata(), trailing, said.details)


# -- those who are called ----------------------------------------------------------------


def add_port(server: grpc.aio.Server, host: str, port: int, serves: frozenset[Part]) -> int:
    """Open a port on the footing of who serves; the port that was chosen.

    `serves` are the parts that may serve what this server does. Fails with PLAIN_TEXT_REFUSED,
    with CERTIFICATE_INVALID when our certificate is for something else, and with RuntimeError when
    the port can't be had.
    """
    address = f"{host}:{port}"
    trust = serving_trust()
    if trust is None:
        if not is_local(address):
            _check_exposed(address, present())
        return server.add_insecure_port(address)
    party = trust.party
    if party.part not in serves:
        raise ScenarioError(
            Reason.CERTIFICATE_INVALID,
            f"{party} can't serve this: it takes a certificate of {' or '.join(sorted(serves))}",
            {"identity": party.uri},
        )
    trust.check_self()
    return server.add_secure_port(address, _server_credentials(trust))


def check_serves_as(name: str) -> None:
    """Refuse, with CERTIFICATE_INVALID, to serve a twin under another name than our own."""
    trust = serving_trust()
    if trust is not None and trust.party[1:] != (Part.TWIN, name):
        raise ScenarioError(
            Reason.CERTIFICATE_INVALID,
            f"this is to be the twin {name}, and the certificate is of {trust.party}",
            {"identity": trust.party.uri},
        )


def _check_exposed(address: str, on: Footing) -> None:
    if not on.is_exposed:
        raise ScenarioError(
            Reason.PLAIN_TEXT_REFUSED,
            f"{address} can be reached from other machines, and this process has no certificate: "
            f"give --tls DIR (see multitwin certs), listen at 127.0.0.1, or give {FLAG} if "
            "everybody who reaches it may do everything",
            {"address": address},
        )
    print(
        f"WARNING: {address} IS OPEN TO EVERYBODY WHO REACHES IT: no encryption, no certificates, "
        f"no authorisation ({FLAG})",
        file=sys.stderr,
        flush=True,
    )


def _server_credentials(trust: Trust) -> grpc.ServerCredentials:
    """Takes what is in force at every new connection, so that nothing has to be restarted."""
    given: list[Material] = []

    def configuration() -> Any:  # None is for no change, which the types of gRPC don't know
        material = trust.material()
        if given and given[0] is material:
            return None
        given[:] = [material]
        pair = (material.key, material.certificate)
        return grpc.ssl_server_certificate_configuration([pair], material.roots())

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=True
    )
