"""Serves what people may do with a loop, and asks it of one from the command line."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from federation.control import petitions
from federation.control.autonomy import Key
from federation.control.live import LiveLoop
from federation.control.petitions import PetitionService
from federation.control.proposal import Answer, proposal_of
from federation.errors import Reason, ScenarioError
from federation.v1 import autonomy_pb2, autonomy_pb2_grpc, peer_pb2_grpc
from federation.wire import footing, secure, status
from federation.wire.credentials import Identity, Role
from federation.wire.link import MEBIBYTE, channel_options
from federation.wire.party import Part
from federation.wire.serve import new_server, start_server
from federation.wire.status import refusing

SERVICE = autonomy_pb2.DESCRIPTOR.services_by_name["Autonomy"].full_name

ANSWER_S = 120.0
"""How long an answer to a proposal may take: what is confirmed acts before it comes back."""


def canonical(value: object) -> bytes:
    """The one form of what people sign and are shown."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class _Autonomy(autonomy_pb2_grpc.AutonomyServicer):
    def __init__(self, live: LiveLoop) -> None:
        self._live = live

    async def ListProposals(  # noqa: N802
        self,
        request: autonomy_pb2.ListProposalsRequest,
        context: grpc.aio.ServicerContext[
            autonomy_pb2.ListProposalsRequest, autonomy_pb2.ListProposalsResponse
        ],
    ) -> autonomy_pb2.ListProposalsResponse:
        async with refusing(context):
            live = self._live
            live.pass_time()
            return autonomy_pb2.ListProposalsResponse(
                proposals=[
                    autonomy_pb2.Proposal(
                        id=id_,
                        state=live.docket.states[id_].value,
                        content=canonical(proposal.plain()).decode(),
                        confirmed=live.docket.approvers(id_),
                        sentence=live.outcome(id_),
                    )
                    for id_, proposal in reversed(live.docket.proposals.items())
                ]
            )
        raise AssertionError("abort raises")

    async def Answer(  # noqa: N802
        self,
        request: autonomy_pb2.AnswerRequest,
        context: grpc.aio.ServicerContext[autonomy_pb2.AnswerRequest, autonomy_pb2.AnswerResponse],
    ) -> autonomy_pb2.AnswerResponse:
        async with refusing(context):
            answer = Answer(
                request.proposal, request.person, request.is_yes, request.signature, request.why
            )
            # an answer that has come counts, even if who gave it does not wait for what follows
            told = await asyncio.shield(self._live.answer(answer))
            return autonomy_pb2.AnswerResponse(
                state=told.state.value, sentence=told.sentence, counts=told.counts
            )
        raise AssertionError("abort raises")

    async def GetAutonomy(  # noqa: N802
        self,
        request: autonomy_pb2.GetAutonomyRequest,
        context: grpc.aio.ServicerContext[
            autonomy_pb2.GetAutonomyRequest, autonomy_pb2.GetAutonomyResponse
        ],
    ) -> autonomy_pb2.GetAutonomyResponse:
        async with refusing(context):
            live = self._live
            return autonomy_pb2.GetAutonomyResponse(
                standings=[
                    autonomy_pb2.GetAutonomyResponse.Standing(
                        twin=key.twin,
                        action=key.action,
                        operator=key.operator,
                        level=standing.level,
                        earned=standing.earned,
                    )
                    for key, standing in sorted(live.ladder.standings.items())
                ],
                at_most=live.terms.level,
                rules_version=live.rules.version,
                mode=live.guard.mode.value,
            )
        raise AssertionError("abort raises")

    async def SetLevel(  # noqa: N802
        self,
        request: autonomy_pb2.SetLevelRequest,
        context: grpc.aio.ServicerContext[
            autonomy_pb2.SetLevelRequest, autonomy_pb2.SetLevelResponse
        ],
    ) -> autonomy_pb2.SetLevelResponse:
        async with refusing(context):
            live, key = self._live, Key(request.twin, request.action, request.operator)
            message = level_message(key, request.level, request.request, live.rules.version)
            keyring = live.keys.keyring
            domain = (
                live.view.descriptions[key.twin].domain
                if key.twin in live.view.descriptions
                else ""
            )
            problem = ""
            if not request.request:
                problem = "a request has an id"
            elif domain not in live.rules.persons.get(request.person, ()):
                problem = f"{request.person!r} has no authority in {domain or 'that domain'}"
            elif not keyring.proves(request.person, Role.OPERATOR, message, request.signature):
                problem = f"{request.person!r} did not sign this"
            if problem:
                raise ScenarioError(Reason.NOT_AUTHORISED, problem, {"identity": request.person})
            moved = live.set_level(key, request.level, request.person, request.request)
            return autonomy_pb2.SetLevelResponse(level=moved.after, sentence=moved.why)
        raise AssertionError("abort raises")


def level_message(key: Key, level: int, request: str, rules_version: int) -> bytes:
    """What a person signs who sets a level."""
    return canonical(
        {**key._asdict(), "level": level, "request": request, "rules_version": rules_version}
    )


@asynccontextmanager
async def serving_people(
    live: LiveLoop, host: str = "127.0.0.1", port: int = 0, grace_s: float = 1.0
) -> AsyncIterator[str]:
    """Serve `Autonomy` and `Petitions` for a loop for as long as the context lasts; gives the
    address.

    Fails with PORT_IN_USE.
    """
    server = new_server(16 * MEBIBYTE)
    autonomy_pb2_grpc.add_AutonomyServicer_to_server(_Autonomy(live), server)
    peer_pb2_grpc.add_PetitionsServicer_to_server(PetitionService(live.petitions), server)
    services = (SERVICE, petitions.SERVICE)
    address, healthy = await start_server(server, services, host, port)
    try:
        yield address
    finally:
        await healthy.enter_graceful_shutdown()
        await server.stop(grace_s)


async def control(live: LiveLoop, host: str, port: int) -> None:
    """Run a loop until its run ends, and serve people meanwhile. Says on stderr where."""
    async with live, serving_people(live, host, port) as address:
        where = f"control of {live.view.run} at {address} (pid {os.getpid()})"
        print(where, file=sys.stderr, flush=True)
        await live.go(lambda turn: print(turn.sentence(), file=sys.stderr, flush=True))


@asynccontextmanager
async def asking(address: str) -> AsyncIterator[autonomy_pb2_grpc.AutonomyAsyncStub]:
    """Asks a loop; what it refuses is raised as a `FederationError`."""
    expects = footing.expected(Part.GUARD)
    async with secure.channel(address, expects, channel_options(64 * MEBIBYTE)) as channel:
        try:
            yield autonomy_pb2_grpc.AutonomyStub(channel)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc(error, f"the loop at {address}") from None


async def answer(
    address: str, proposal: str, person: Identity, *, is_yes: bool, why: str = ""
) -> autonomy_pb2.AnswerResponse:
    """Confirm or refuse what a loop proposes, as it shows it. Fails with UNKNOWN_BUNDLE when it
    proposes nothing of this id."""
    async with asking(address) as stub:
        listed = await stub.ListProposals(autonomy_pb2.ListProposalsRequest(), timeout=ANSWER_S)
        shown = next((p for p in listed.proposals if p.id == proposal), None)
        if shown is None:
            known = ", ".join(p.id for p in listed.proposals) or "none"
            raise ScenarioError(
                Reason.UNKNOWN_BUNDLE, f"there is no proposal {proposal}; there are {known}"
            )
        # what is signed is what was shown, digest and all
        found = proposal_of(json.loads(shown.content))
        assert found.digest() == hashlib.sha256(shown.content.encode()).hexdigest()
        return await stub.Answer(
            autonomy_pb2.AnswerRequest(
                proposal=proposal,
                person=person.name,
                is_yes=is_yes,
                signature=person.attest(found.message("yes" if is_yes else "no")),
                why=why,
            ),
            timeout=ANSWER_S,
        )
    raise AssertionError("a failed call raises")


async def set_level(
    address: str, key: Key, level: int, person: Identity, request: str = ""
) -> autonomy_pb2.SetLevelResponse:
    """Set how far a loop may go by itself with one twin's actions; once for each `request`."""
    async with asking(address) as stub:
        known = await stub.GetAutonomy(autonomy_pb2.GetAutonomyRequest(), timeout=ANSWER_S)
        request = request or uuid.uuid4().hex
        message = level_message(key, level, request, known.rules_version)
        return await stub.SetLevel(
            autonomy_pb2.SetLevelRequest(
                **key._asdict(),
                level=level,
                person=person.name,
                request=request,
                signature=person.attest(message),
            ),
            timeout=ANSWER_S,
        )
    raise AssertionError("a failed call raises")


async def print_proposals(address: str) -> None:
    """Write what a loop proposes and how far it may go, for a person."""
    async with asking(address) as stub:
        listed = await stub.ListProposals(autonomy_pb2.ListProposalsRequest(), timeout=ANSWER_S)
        levels = await stub.GetAutonomy(autonomy_pb2.GetAutonomyRequest(), timeout=ANSWER_S)
    for standing in levels.standings:
        print(
            f"{standing.twin} {standing.action} for {standing.operator}: level "
            f"{min(standing.level, levels.at_most)} (earned {standing.earned})"
        )
    for shown in listed.proposals:
        found = proposal_of(json.loads(shown.content))
        print(f"{shown.id}: {shown.state} {shown.sentence}".rstrip())
        for setpoint in found.bundle.setpoints:
            at = f"{setpoint.member}.{setpoint.actuator}[{setpoint.entity}]"
            print(f"  sets {at} to {setpoint.value:g}")
        for domain, effects in sorted(found.effects.items()):
            by = shown.confirmed.get(domain, "nobody so far")
            print(f"  {domain}: confirmed by {by}")
            for e in effects:
                print(
                    f"    {e.figure}: {e.expected:g} {e.unit} ({e.low:g} to {e.high:g}), "
                    f"{e.without:g} without"
                )
        for alternative in found.alternatives:
            print(f"  instead: {alternative.differs}, {alternative.regret:+g}")
        for words in found.reversal:
            print(f"  to undo: {words}")
