"""Lets through to a server only those whom the table of `access` names, and ends what was revoked.

Everything is decided when an RPC begins; messages of a stream pass untouched. A stream whose
certificate is revoked or expires while it goes on is ended within `LOOK_S` of that being known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextvars import ContextVar
from inspect import isasyncgen, isawaitable
from typing import Any

import grpc

from federation.errors import FederationError, Reason, ScenarioError
from federation.wire.access import TABLE
from federation.wire.party import Part, Party
from federation.wire.status import refusing
from federation.wire.trust import LOOK_S, Bearer, Trust, unproven
from federation.wire.turnstile import Allowance, Turnstile
from federation.wire.wrapping import Handler, Wrapping

_bearer: ContextVar[Bearer | None] = ContextVar("bearer", default=None)


def caller() -> Party | None:
    """Who has called the RPC that is carried out; None in plain text: a user of this machine."""
    shown = _bearer.get()
    return None if shown is None else shown.party


def bearer() -> Bearer | None:
    """The same with the certificate that was shown, for those who remember callers for longer."""
    return _bearer.get()


def check_owns(name: str) -> None:
    """Refuse, with NOT_AUTHORISED, that a twin or a person acts under the name of another one."""
    who = caller()
    if who is not None and who.part in (Part.TWIN, Part.OPERATOR) and who.name != name:
        raise ScenarioError(
            Reason.NOT_AUTHORISED,
            f"{who} may not act as {name}: it speaks for itself alone",
            {"identity": who.uri, "name": name},
        )


class Gate(Wrapping):
    """The gate of one server, which stands under the identity of `trust`."""

    def __init__(self, trust: Trust, allowance: Allowance | None = None) -> None:
        super().__init__()
        self._trust = trust
        self._turnstile = Turnstile(allowance or Allowance(), time.monotonic)
        self._streams: dict[asyncio.Task[Any], Bearer] = {}
        self._ended: dict[asyncio.Task[Any], FederationError] = {}
        self._looking: asyncio.Task[None] | None = None

    def wrap(self, rpc: str, handler: Handler) -> Handler:
        inner = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        assert inner is not None

        async def single(request: Any, context: Any) -> Any:
            await self._admitted(rpc, context)
            answer = inner(request, context)
            return await answer if isawaitable(answer) else answer

        async def streaming(request: Any, context: Any) -> Any:
            bearer = await self._admitted(rpc, context)
            async with refusing(context):
                return await self._watched(bearer, _drained(inner(request, context), context))

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            streaming if handler.request_streaming or handler.response_streaming else single,
            handler.request_deserializer,
            handler.response_serializer,
        )

    async def _admitted(self, rpc: str, context: Any) -> Bearer:
        async with refusing(context):
            bearer = self.admit(rpc, context.auth_context())
            self._turnstile.call(bearer.party.uri)
            _bearer.set(bearer)
            return bearer
        raise AssertionError("abort raises")

    def admit(self, rpc: str, shown: Any) -> Bearer:
        """Who calls, if they may. Fails with NOT_AUTHENTICATED and NOT_AUTHORISED."""
        certificates = list(shown.get("x509_pem_cert", ()))
        if not certificates:
            raise unproven("NAMELESS", f"{rpc} is only for those who show a certificate")
        bearer = self._trust.bearer(certificates[0])
        parts = self.parts_of(bearer.party)
        if not parts or not parts <= TABLE.get(rpc, frozenset()):
            allowed = " or ".join(sorted(TABLE.get(rpc, ()))) or "nobody"
            raise ScenarioError(
                Reason.NOT_AUTHORISED,
                f"{bearer.party} may not call {rpc} at {self._trust.party}: it is for {allowed}",
                {"identity": bearer.party.uri, "rpc": rpc, "allowed": allowed},
            )
        return bearer

    def parts_of(self, party: Party) -> frozenset[Part]:
        """The parts that somebody plays here, who may do what all of them may; none for who has no
        business here at all.

        Of another city nobody is heard but its broker and its guard, and by our broker alone. Its
        guard is a guard as well as a peer, so it opens no sessions.
        """
        own = self._trust.party
        if party.city == own.city:
            return frozenset({party.part})
        if own.part is not Part.BROKER or party.part not in (Part.BROKER, Part.GUARD):
            return frozenset()
        return frozenset({Part.PEER, party.part} - {Part.BROKER})

    async def _watched(self, bearer: Bearer, work: Awaitable[Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._turnstile.enter(bearer.party.uri)
        self._streams[task] = bearer
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look())
        try:
            return await work
        except asyncio.CancelledError:
            why = self._ended.pop(task, None)
            if why is None:
                raise
            task.uncancel()
            raise why from None
        finally:
            self._turnstile.leave(bearer.party.uri)
            del self._streams[task]
            self._ended.pop(task, None)

    async def _look(self) -> None:
        """End streams that should not go on, for as long as there are any."""
        while self._streams:
            await asyncio.sleep(LOOK_S)
            for task, bearer in list(self._streams.items()):
                try:
                    self._trust.check(bearer)
                except FederationError as error:
                    if task not in self._ended:
                        self._ended[task] = error
                        task.cancel()
        self._looking = None


async def _drained(answers: Any, context: Any) -> Any:
    """See a handler of a stream through, whichever of gRPC's two ways it writes."""
    if isasyncgen(answers) or isinstance(answers, AsyncIterator):
        async for answer in answers:
            await context.write(answer)
        return None
    return await answers
