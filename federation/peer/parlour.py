"""Where a city holds its conversations about aid, and hears what others have signed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from federation.core.aid import Deed
from federation.errors import Reason, ScenarioError, TwinError
from federation.v1 import peer_pb2
from federation.wire import aid
from federation.wire.malformed import Malformed

if TYPE_CHECKING:
    from federation.peer.aid import AidDesk

Request = peer_pb2.BargainRequest
Response = peer_pb2.BargainResponse


def no_aid(city: str) -> TwinError:
    """The error of a city that neither gives aid nor takes any."""
    text = f"{city} neither gives nor takes aid"
    return TwinError(Reason.UNSUPPORTED, text, {"city": city})


class Parlour:
    """So many conversations with each city at a time."""

    def __init__(self, desk: AidDesk) -> None:
        self.desk = desk
        self._open: dict[str, int] = {}

    async def bargain(
        self,
        asker: str,
        allow: Callable[[str, str], None],
        requests: Any,
        context: grpc.aio.ServicerContext[Request, Response],
        do: Callable[[Callable[[], Response]], Response],
    ) -> None:
        """Answer one stream; `do` carries an answer's work out, in a thread."""
        options = self.desk.options
        if self._open.get(asker, 0) >= options.conversations:
            raise ScenarioError(
                Reason.PEER_LIMIT,
                f"the limit conversations of this city: {options.conversations} at a time",
                {"limit": "conversations"},
            )
        self._open[asker] = self._open.get(asker, 0) + 1
        try:
            from federation.peer.bargaining import Conversation  # who gives no aid needs no solver

            conversation = Conversation(self.desk, asker, allow)
            async with asyncio.timeout(options.deadline_s):
                async for request in requests:
                    if isinstance(request, Malformed):
                        raise request.refusal

                    def answer(request: Request = request) -> Response:
                        return conversation.handle(request)

                    await context.write(await asyncio.to_thread(do, answer))
        except TimeoutError:
            text = f"the conversation is over after {options.deadline_s:g} s"
            raise ScenarioError(Reason.EXPIRED, text) from None
        finally:
            self._open[asker] -= 1
            if not self._open[asker]:
                del self._open[asker]

    async def pledge(self, by: str, request: peer_pb2.PledgeRequest) -> peer_pb2.PledgeResponse:
        """Hear what a city has signed, and answer with that and all that is open with it."""

        def hear() -> tuple[Deed, ...]:
            said = self.desk.hear(aid.decode_deeds(request.deeds), by)
            more = self.desk.open_with(by)
            return (*said, *(deed for deed in more if deed not in said))[: aid.MOST_DEEDS]

        said = await asyncio.to_thread(hear)
        return peer_pb2.PledgeResponse(deeds=[aid.encode_deed(deed) for deed in said])
