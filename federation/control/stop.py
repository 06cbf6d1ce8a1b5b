"""Stops what is autonomous at twins, and lifts that: directly at the twins, broker or no broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from federation.errors import FederationError, Reason, ScenarioError
from federation.v1 import broker_pb2, broker_pb2_grpc
from federation.wire import footing, secure
from federation.wire.credentials import Identity
from federation.wire.orders import Hand
from federation.wire.party import Part
from federation.wire.roster import Post, read_roster

ANSWER_S = 0.8
"""How long one twin, or the broker, may take; all twins are asked at once, so a stop is out, and
what was not reached is known, within twice that."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one twin said: `done` names what was stopped or lifted there, or there is an error."""

    post: Post
    done: tuple[str, ...] = ()
    error: FederationError | None = None


async def find_posts(
    twins: Sequence[str] = (), broker: str | None = None, roster: Path | None = None
) -> tuple[Post, ...]:
    """Whom to ask: twins at given addresses; else those that the broker has, and those of its
    roster, which is enough when it is dead. Fails with UNREACHABLE when there is neither.
    """
    if twins:
        return tuple(Post(address, address, "") for address in twins)
    posts: dict[str, Post] = {}
    if roster is not None and roster.is_file():
        posts = {post.name: post for post in read_roster(roster)}
    elif broker is None:
        raise ScenarioError(
            Reason.MISSING_FILE, f"there is no roster {roster}; name twins, a broker or a roster"
        )
    if broker is not None:
        try:
            posts |= {post.name: post for post in await _registered(broker)}
        except grpc.aio.AioRpcError as error:
            if not posts:
                raise ScenarioError(
                    Reason.UNREACHABLE,
                    f"the broker at {broker} does not answer, and there is no roster of its "
                    "twins: name them with --twin",
                    {"address": broker},
                ) from error
    return tuple(sorted(posts.values()))


async def stop(posts: Sequence[Post], identity: Identity, reason: str) -> tuple[Verdict, ...]:
    """Stop all that is autonomous at these twins, at once."""

    async def ask(hand: Hand) -> tuple[str, ...]:
        return (await hand.halt(reason),)

    return await _at_all(posts, identity, ask)


async def lift(
    posts: Sequence[Post], identity: Identity, stops: Sequence[str] = ()
) -> tuple[Verdict, ...]:
    """Lift these stops, or all that there are when none is named."""

    async def ask(hand: Hand) -> tuple[str, ...]:
        there = [found.id for found in (await hand.look()).stops]
        wanted = [id for id in there if not stops or id in stops]
        if wanted:
            await hand.lift(wanted)
        return tuple(wanted)

    return await _at_all(posts, identity, ask)


async def release(
    posts: Sequence[Post], identity: Identity, run: str, bundle: str
) -> tuple[Verdict, ...]:
    """Undo a bundle of a run wherever it is held."""

    async def ask(hand: Hand) -> tuple[str, ...]:
        done = []
        for desk in (await hand.look()).desks:
            held = [each.bundle for each in desk.bundles if each.phase != "over"]
            if desk.run == run and bundle in held:
                await hand.release(run, desk.member, bundle)
                done.append(f"{desk.member}: {bundle}")
        return tuple(done)

    return await _at_all(posts, identity, ask)


def of_domain(posts: Sequence[Post], domain: str | None) -> tuple[Post, ...]:
    """Those of a domain, or all. Fails with UNKNOWN_MEMBER when there are none."""
    found = tuple(post for post in posts if domain is None or post.domain == domain)
    if not found:
        known = ", ".join(sorted({post.domain for post in posts})) or "none"
        raise ScenarioError(
            Reason.UNKNOWN_MEMBER, f"there is no twin of {domain or 'any domain'}; there is {known}"
        )
    return found


async def _at_all(
    posts: Sequence[Post],
    identity: Identity,
    ask: Callable[[Hand], Awaitable[tuple[str, ...]]],
) -> tuple[Verdict, ...]:
    async def one(post: Post) -> Verdict:
        # a twin that was named by its address alone may have any name
        name = "" if post.name == post.address else post.name
        async with Hand(post.address, identity, ANSWER_S, name) as hand:
            try:
                return Verdict(post, await ask(hand))
            except FederationError as error:
                return Verdict(post, error=error)

    return tuple(await asyncio.gather(*map(one, posts)))


async def _registered(broker: str) -> list[Post]:
    expects = footing.expected(Part.BROKER)
    async with secure.channel(broker, expects, [("grpc.enable_http_proxy", 0)]) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        answer = await stub.ListMembers(broker_pb2.ListMembersRequest(), timeout=ANSWER_S)
    return [Post(m.name, m.address, m.domain) for m in answer.members]
