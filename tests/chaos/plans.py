"""The plans: each fault that the design names, at every step or in every way, with its end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from federation.errors import Reason
from tests.chaos import meddler, proxy, world
from tests.chaos.faults import (
    ALWAYS,
    BROKER,
    RECOVER,
    WATCHER,
    Cue,
    Cut,
    Degraded,
    End,
    Failed,
    Fault,
    FillDisk,
    Kill,
    Late,
    Meddle,
    Misplay,
    MoveClock,
    Obeyed,
    Order,
    OutOfSpace,
    Pause,
    Phase,
    Plan,
    Route,
    SpoilStore,
    Strike,
    TearLog,
    Undisturbed,
    recovering,
)
from tests.chaos.meddler import Meddling
from tests.chaos.proxy import Blow
from tests.chaos.world import MEMBERS

STALL_S = 0.4
WAYS: tuple[proxy.Way, ...] = ("up", "down")
BLOWS: tuple[proxy.How, ...] = get_args(proxy.How)
MEDDLINGS: tuple[meddler.How, ...] = get_args(meddler.How)

PER_RUN = 4
"""How many faults of one kind a run has; few enough to tell which of them did it."""

HOUR_S = 3600
JUMPS_S = (HOUR_S, -24 * HOUR_S, 3650 * 24 * HOUR_S, -10 * HOUR_S)

LOST = (Reason.MEMBER_LOST, Reason.UNREACHABLE)


def plans(seed: int) -> list[Plan]:
    """All plans for runs of this seed, those of the same kind one after the other."""
    steps = {name: cost.steps for name, cost in world.reference(seed).costs.items()}
    return [
        *_kills(steps),
        *_broker_kills(steps),
        *_bytes(steps),
        *_frames(steps),
        *_times(steps),
        *_misplays(steps),
        *_policies(),
        *_store(steps),
    ]


def storm(seed: int) -> Plan:
    """Six faults of any kind at any steps; every member recovers."""
    draw = random.Random(seed)
    steps = {name: cost.steps for name, cost in world.reference(seed).costs.items()}
    cues = []
    phases: tuple[Phase, ...] = ("begin", "end")
    for _ in range(6):
        member, whom = draw.choice(MEMBERS), draw.choice(MEMBERS)
        fault: Fault = draw.choice(
            (
                Kill(whom),
                Kill(member),
                Kill(BROKER),
                Cut(whom),
                Misplay(draw.choice(("raise", "nan"))),
                Pause(whom, 0.5),
                Strike(
                    whom, Blow(draw.choice(("truncate", "lose", "stall")), draw.choice(WAYS), 0.4)
                ),
                Meddle(
                    whom, Meddling(draw.choice(("request twice", "answer twice", "answer late")))
                ),
                TearLog(),
                MoveClock(member, draw.choice(JUMPS_S)),
            )
        )
        cues.append(Cue(member, draw.randint(1, steps[member]), fault, draw.choice(phases)))
    route: Route = draw.choice(("address", "meddler"))
    return Plan(f"storm-{seed}", tuple(cues), route=route, bound_s=90.0)


def _spread(count: int) -> Iterator[tuple[int, ...]]:
    """The steps 1..count in groups of at most PER_RUN, those of a group far apart."""
    groups = -(-count // PER_RUN)
    for first in range(1, groups + 1):
        yield tuple(range(first, count + 1, groups))


def _some(count: int, how_many: int = PER_RUN) -> tuple[int, ...]:
    """A few steps from begin to end."""
    return tuple(1 + round(i * (count - 1) / (how_many - 1)) for i in range(how_many))


def _kills(steps: Mapping[str, int]) -> Iterator[Plan]:
    """Every member at every step, before and after its work."""
    for member in MEMBERS:
        for index, group in enumerate(_spread(steps[member])):
            route: Route = "name" if index % 2 else "address"
            yield Plan(
                f"kill-{member}-begin-{index}",
                tuple(Cue(member, k, Kill(member)) for k in group),
                route=route,
            )
            yield Plan(
                f"kill-{member}-end-{index}",
                tuple(Cue(member, k, Kill(member), "end") for k in group),
                route=route,
            )
    for index, group in enumerate(_spread(steps["tower"])):
        yield Plan(
            f"kill-all-{index}", tuple(Cue("tower", k, Kill(m)) for k in group for m in MEMBERS)
        )


def _broker_kills(steps: Mapping[str, int]) -> Iterator[Plan]:
    """The broker while it waits for any step of any member, and after what it told its readers."""
    for member in MEMBERS:
        for index, group in enumerate(_spread(steps[member])):
            at: Phase = "end" if index % 2 else "begin"
            cues = tuple(Cue(member, k, Kill(BROKER), at) for k in group)
            yield Plan(f"kill-broker-at-{member}-{index}", cues)
    for index, group in enumerate(((1, 3, 5), (2, 4, 6))):
        cues = tuple(Cue(WATCHER, k, Kill(BROKER)) for k in group)
        yield Plan(f"kill-broker-told-{index}", cues)
    for index, group in enumerate(_spread(steps["mill"])):
        both = tuple(Cue("mill", k, Kill(whom)) for k in group for whom in ("mill", BROKER))
        yield Plan(f"kill-both-{index}", both)


def _bytes(steps: Mapping[str, int]) -> Iterator[Plan]:
    for member in MEMBERS:
        some = _some(steps[member])
        for how in BLOWS:
            for way in WAYS:
                blow = Blow(how, way, STALL_S)
                cues = tuple(Cue(member, k, Strike(member, blow)) for k in some)
                yield Plan(f"bytes-{member}-{how}-{way}", cues, route="address")
        yield Plan(f"cut-{member}", tuple(Cue(member, k, Cut(member)) for k in some))
        yield Plan(
            f"cut-{member}-under-fail",
            tuple(Cue(member, k, Cut(member), "end") for k in some),
            policies={},
        )


def _frames(steps: Mapping[str, int]) -> Iterator[Plan]:
    for member in MEMBERS:
        for how in MEDDLINGS:
            some = _some(steps[member], 2 if how == "answer lost" else PER_RUN)
            cues = tuple(Cue(member, k, Meddle(member, Meddling(how))) for k in some)
            yield Plan(f"frames-{member}-{how.replace(' ', '-')}", cues, route="meddler")


def _times(steps: Mapping[str, int]) -> Iterator[Plan]:
    for member in MEMBERS:
        first, *_, last = _some(steps[member])
        yield Plan(
            f"pause-{member}", tuple(Cue(member, k, Pause(member, 0.7)) for k in (first, last))
        )
        yield Plan(f"late-{member}", (Cue(member, first, Late(1.0)), Cue(member, last, Late(3.0))))
        some = zip(_some(steps[member]), JUMPS_S, strict=True)
        yield Plan(f"clock-{member}", tuple(Cue(member, k, MoveClock(member, s)) for k, s in some))
    yield Plan(
        "pause-broker", tuple(Cue("mill", k, Pause(BROKER, 0.7)) for k in _some(steps["mill"]))
    )
    for index, jump_s in enumerate(JUMPS_S):
        yield Plan(f"clock-broker-{index}", (Cue("mill", 6, MoveClock(BROKER, jump_s)),))


def _misplays(steps: Mapping[str, int]) -> Iterator[Plan]:
    for member in MEMBERS:
        some = _some(steps[member])
        yield Plan(f"raise-{member}", tuple(Cue(member, k, Misplay("raise")) for k in some))
        yield Plan(f"nan-{member}", tuple(Cue(member, k, Misplay("nan"), "end") for k in some))


def _for_good(member: str, step: int) -> Mapping[str, tuple[Cue, tuple[Reason, ...]]]:
    """What a member may do from a step on, and with what a run under `fail` ends then."""
    return {
        "dies": (Cue(member, step, Kill(member, returns=False)), LOST),
        "raises": (Cue(member, step, Misplay("raise"), times=ALWAYS), (Reason.TWIN_FAILED,)),
        "nan": (Cue(member, step, Misplay("nan"), "end", times=ALWAYS), (Reason.NOT_FINITE,)),
        "never": (Cue(member, step, Late(), times=ALWAYS), LOST),
    }


def _policies() -> Iterator[Plan]:
    """What each policy makes of a member that does not come right by itself."""
    patience: dict[str, Any] = {"answer_within_s": 1.0, "back_within_s": 2.0}
    for member in MEMBERS:
        for step in (1, 6):
            for what, (cue, reasons) in _for_good(member, step).items():
                for do in ("fail", "hold", "substitute", "recover"):
                    if do == "substitute" and member not in world.SPARES:
                        continue
                    if do == "recover" and step == 1:
                        continue
                    others = {name: RECOVER for name in MEMBERS if name != member}
                    mine: dict[str, Any] = {"do": do, **patience}
                    ends: dict[str, End] = {
                        "fail": Failed(reasons, member),
                        "hold": Degraded(member, "held"),
                        "substitute": Degraded(member, "substituted"),
                        "recover": Failed(reasons, member),
                    }
                    yield Plan(
                        f"{member}-{what}-at-{step}-under-{do}",
                        (cue,),
                        ends[do],
                        {**others, member: mine},
                    )
    member = "mill"
    doubled: tuple[meddler.How, ...] = ("answer twice", "request twice")
    for how in doubled:
        meddling = Meddle(member, Meddling(how))
        yield Plan(
            f"{how.replace(' ', '-')}-under-hold",
            tuple(Cue(member, k, meddling) for k in (2, 5, 8)),
            policies={member: {"do": "hold", **patience}},
            route="meddler",
        )
    slow = tuple(Cue("town", k, Late(0.6)) for k in range(7, 14))
    degraded = {"hold": Degraded(member, "held"), "substitute": Degraded(member, "substituted")}
    for do, lasting in degraded.items():
        yield Plan(
            f"dies-long-ago-under-{do}",
            (Cue(member, 4, Kill(member, returns=False)), *slow),
            lasting,
            {member: {"do": do, **patience}},
        )
    for idle in ("wind", "mill"):
        # the town is slow enough for the lease of the idle member to end
        cues = (
            *(Cue("town", 9, fault) for fault in (Late(0.6), Kill(idle))),
            Cue("town", 9, Late(3.0), "end"),
        )
        others = {name: recovering(name) for name in MEMBERS if name != idle}
        for do, end in (
            ("fail", Failed(LOST, idle)),
            ("hold", Degraded(idle, "held")),
            ("recover", Undisturbed()),
        ):
            mine = {"do": do, "answer_within_s": 8.0}
            yield Plan(f"{idle}-dies-idle-under-{do}", cues, end, {**others, idle: mine})
    yield Plan(
        "substitute-never-answers",
        (Cue(member, 4, Misplay("raise")), Cue(f"{member}-substitute", 1, Late())),
        Failed(LOST, member),
        {member: {"do": "substitute", **patience}},
        bound_s=20.0,
    )
    yield Plan(
        "late-under-hold",
        (Cue(member, 5, Late(2.0)),),
        Degraded(member, "held"),
        {member: {"do": "hold", **patience}},
    )
    yield Plan(
        "broker-killed-while-held",
        (*_broker_dies("town"), Cue(member, 4, Misplay("raise"), times=ALWAYS)),
        Degraded(member, "held"),
        {**{name: recovering(name) for name in MEMBERS}, member: {"do": "hold", **patience}},
    )
    yield Plan(
        "broker-killed-while-substituted",
        (*_broker_dies("town"), Cue(member, 4, Misplay("raise"), times=ALWAYS)),
        Degraded(member, "substituted"),
        {**{name: recovering(name) for name in MEMBERS}, member: {"do": "substitute", **patience}},
    )


def _broker_dies(while_at: str) -> tuple[Cue, ...]:
    return tuple(Cue(while_at, k, Kill(BROKER)) for k in (6, 9))


def _store(steps: Mapping[str, int]) -> Iterator[Plan]:
    for k in _some(steps["mill"]):
        yield Plan(f"disk-full-{k}", (Cue("mill", k, FillDisk()),), OutOfSpace())
    for index, group in enumerate(_spread(steps["tower"])):
        yield Plan(f"torn-log-{index}", tuple(Cue("tower", k, TearLog()) for k in group))
    yield Plan("store-spoilt", tuple(Cue("mill", k, SpoilStore()) for k in (3, 11)))
    for index, group in enumerate(((2, 9), (5, 12))):
        orders = [Order(f"S{i}", 1.0) for i in range(2)]
        cues = tuple(Cue("mill", k, order) for k, order in zip(group, orders, strict=True))
        yield Plan(f"orders-{index}", cues, Obeyed())


def named(all_plans: Sequence[Plan], only: str) -> list[Plan]:
    """The plans whose names are, or begin with, `only`."""
    exact = [plan for plan in all_plans if plan.name == only]
    return exact or [plan for plan in all_plans if plan.name.startswith(only)]
