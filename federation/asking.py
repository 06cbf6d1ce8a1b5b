"""The command `multitwin plan`: what is best to do at an instant of a run, and why nothing else."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import Reason, ScenarioError
from federation.terminal import natural, positive, say

# Each command imports its own rooms: a twin that is served needs neither solver nor plots.
if TYPE_CHECKING:
    from federation.plan.answer import Answer, Extra
    from federation.plan.joint import JointModel
    from federation.plan.suited import Suited
    from federation.plan.visits import Task
    from federation.scenario.spec import Scenario

MOST_WORTH = 15
"""So many of the highest prices are printed; `--json` has all."""


@dataclass(frozen=True)
class Question:
    """What a planner had before it at an instant: the tasks, as believed, and what they are for.

    `futures` are the same tasks with work that may be the true one.
    """

    time_ns: int
    tasks: tuple[Task, ...]
    model: JointModel
    futures: tuple[tuple[Task, ...], ...] = ()


def command_plan(options: argparse.Namespace) -> int:
    """Do a run up to an instant, plan from there, and say what follows from the plan."""
    from federation.plan.answer import answer
    from federation.scenario.spec import load

    scenario = load(options.scenario)
    extras = [_extra(*words) for words in options.extra]
    question = asked(
        scenario, options.measure, options.seed, options.run, options.at, options.futures
    )
    model = question.model
    if options.crews is not None:
        model = replace(model, crews=float(options.crews))
    say(f"{len(question.tasks)} repairs are open; planning, and asking what else there is ...")
    found = answer(model, question.tasks, extras, options.alternatives, options.bindings)
    hedged = None
    if question.futures and found.schedule is not None:
        say(f"what the work may be in {len(question.futures)} futures, and who is sent at once ...")
        hedged = _suited(replace(question, model=model), options.workers)
    if options.json:
        told = {"time_ns": question.time_ns, **asdict(found)}
        if hedged is not None:
            told["futures"] = asdict(hedged)
        print(json.dumps(told, default=list))
    else:
        print("\n".join(words(found, question, model.crews)))
        if hedged is not None:
            print("\n".join(_hedged(hedged)))
    return 0 if found.schedule is not None else 4


def _suited(question: Question, workers: int) -> Suited:
    """Here as one problem, on several workers by hedging."""
    from federation.plan.recourse import RayPool
    from federation.plan.suited import suited
    from federation.scenario.engine import ray_up

    if workers == 1:
        return suited(question.model, question.tasks, question.futures)
    with ray_up(workers, "local"):
        return suited(question.model, question.tasks, question.futures, RayPool)


def _extra(name: str, amount: str, limit: str) -> Extra:
    from federation.plan.answer import Extra

    try:
        return Extra(name, float(amount), rows=(limit,))
    except ValueError:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"--extra {name}: {amount!r} is no number"
        ) from None


def asked(
    scenario: Scenario, measure: str, seed: int | None, run: int, at_h: float, futures: int = 0
) -> Question:
    """What there is to decide in a run of a scenario at the first decision from `at_h` on.

    Until then the run is that of a study with this measure. Fails with SCENARIO_INVALID when crews
    have nothing to decide then, nobody plans for crews, or all `futures` would be alike.
    """
    from federation.plan.crews import CrewPlanner
    from federation.planners import crew_planner
    from federation.scenario.run import run_local
    from federation.scenario.spec import DispatchPolicy, Policy
    from federation.scenario.study import cases
    from federation.twin import HOUR_NS, Description, Step

    repairs = scenario.repairs
    if repairs is None:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"{scenario.name} has no repairs, and so no crews to plan for"
        )
    if not 0.0 <= at_h < scenario.horizon_h:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"--at {at_h:g}: {scenario.name} goes from hour 0 to {scenario.horizon_h:g}",
        )
    if futures and repairs.assessment is None:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"--futures {futures}: all work is known in {scenario.name}, so all futures are alike; "
            "`assessment` under `repairs` says how far off estimates are",
        )
    heard: list[Question] = []

    class Asked(CrewPlanner):
        """Sends crews as its policy says, and tells once what it had to decide."""

        def periods_ns(self) -> tuple[int, ...]:
            return self._periods_ns

        def advance(self, step: Step) -> None:
            super().advance(step)
            if not heard and step.time_ns >= at_h * HOUR_NS:
                assert self._model is not None
                may_be = tuple(tuple(self.tasks_at(step, k)) for k in range(futures))
                tasks = tuple(self.tasks_at(step))
                heard.append(Question(step.time_ns, tasks, self._model, may_be))

    def factory(
        scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy | DispatchPolicy
    ) -> CrewPlanner:
        return crew_planner(scenario, descriptions, policy, Asked)

    case = cases(scenario, [measure], run + 1, scenario.seed if seed is None else seed)[-1]
    last_h = at_h + (repairs.decide_every_min + repairs.decide_from_min) / 60.0
    cut = scenario.model_copy(update={"horizon_h": min(last_h, scenario.horizon_h)})
    run_local(cut, case, factory)
    if not heard or not heard[0].tasks:
        raise ScenarioError(
            Reason.SCENARIO_INVALID,
            f"nothing is left to repair at hour {at_h:g} of run {run}; try another --at",
        )
    return heard[0]


def words(found: Answer, question: Question, crews: float) -> Iterator[str]:
    """An answer, for a person."""
    from federation.twin import HOUR_NS

    yield (
        f"hour {question.time_ns / HOUR_NS:g}: {len(question.tasks)} repairs, {crews:g} crews; "
        f"{found.termination}, {found.status}"
    )
    schedule = found.schedule
    if schedule is None:
        yield from _no_plan(found)
        return
    yield (
        f"costs {schedule.cost_usd:,.0f} USD where sending nobody costs "
        f"{schedule.idle_cost_usd:,.0f}; no plan costs less than {schedule.bound_usd:,.0f} "
        f"(gap {schedule.gap:.1%} of what could be saved)"
    )
    yield "\nwhat to do"
    yield from (f"  {action}" for action in found.actions)
    yield "\nwhat binds it (USD saved per unit that it gives way)"
    yield from (f"  {b.usd_per_unit:14,.2f}  {b.limit} ({b.side} {b.at:g})" for b in found.bindings)
    prices = sorted(found.prices, key=lambda p: -p.usd_per_unit_h)[:MOST_WORTH]
    if prices and prices[0].usd_per_unit_h > 0:
        yield "\nwhat one unit more would save (USD per unit and hour), the highest"
    for p in prices:
        if p.usd_per_unit_h > 0:
            yield (
                f"  {p.usd_per_unit_h:14,.2f}  per {p.unit}: {p.member} {p.port} {p.entity}, "
                f"period {p.period}"
            )
    yield "\nthe next best plans" + (
        " (one is cheaper: the search for the plan, which is limited, had missed it)"
        if any(other.more_usd < 0 for other in found.alternatives)
        else ""
    )
    for other in found.alternatives:
        yield f"  {other.more_usd:+14,.0f} USD  without {other.without}: " + (
            "; ".join(other.instead) or "nothing in its place"
        )
    yield "\nwhat more would be worth (USD; in brackets if crews could do things in parts)"
    yield from (f"  {w.plan_usd:14,.0f}  {w.of} ({w.relaxed_usd:,.0f})" for w in found.worth)


def _hedged(found: Suited) -> Iterator[str]:
    costs = found.costs_usd
    yield f"\nwho sets out at once, to suit {len(costs)} futures of the work"
    yield from (f"  {action}" for action in found.at_once)
    yield (
        f"costs {found.cost_usd:,.0f} USD on the mean, from {min(costs):,.0f} to "
        f"{max(costs):,.0f}; no plan costs less than {found.bound_usd:,.0f}"
    )
    yield f"to know beforehand what the work is would save {found.forecast_usd:,.0f} USD at most"
    yield (
        "the estimates alone would send whom not every future can do with"
        if found.estimates_usd is None
        else "who is sent by the estimates alone costs "
        f"{found.estimates_usd - found.cost_usd:+,.0f} USD"
    )


def _no_plan(found: Answer) -> Iterator[str]:
    if found.conflict is not None:
        yield "\nthese can't hold together" + ("" if found.conflict.is_minimal else " (or fewer)")
        yield from (f"  {limit}" for limit in found.conflict.limits)
    if found.relaxation is not None:
        yield "\nwhat would have to give way, at the least"
        yield from (f"  {s.row} by {s.amount:g}" for s in found.relaxation.slacks)


def add_plan(commands: Any) -> None:
    """Add the command to the parser of `multitwin`."""
    plan = commands.add_parser(
        "plan",
        help="what is best to do at an instant of a run, and why",
        description="Do a run of a scenario up to an instant and plan for its crews from there: "
        "what to do, what binds, what a unit more would be worth where, the next best plans, and "
        "what one more crew would save. Ends with 4 when there is no plan, and says why.",
    )
    plan.add_argument("scenario", type=Path, metavar="SCENARIO", help="a scenario's YAML file")
    plan.add_argument("--at", type=float, default=2.0, metavar="H", help="the hour (2)")
    plan.add_argument("--measure", default="none", metavar="M", help="until then (none)")
    plan.add_argument("--seed", type=natural, metavar="S", help="of the study (the scenario's)")
    plan.add_argument("--run", type=natural, default=0, metavar="K", help="of the study (0)")
    plan.add_argument("--crews", type=positive, metavar="N", help="(as the scenario has)")
    plan.add_argument("--alternatives", type=natural, default=3, metavar="N", help="(3)")
    plan.add_argument("--bindings", type=natural, default=10, metavar="N", help="(10)")
    plan.add_argument(
        "--extra",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "AMOUNT", "LIMIT"),
        help="weigh this, too: AMOUNT is added to both sides of a limit by its name (such as a "
        "generator of 2 MW: -2 at the balance of its node)",
    )
    plan.add_argument(
        "--futures",
        type=natural,
        default=0,
        metavar="K",
        help="also plan with recourse: whom to send at once, when the work is only estimated and "
        "may be other in each of K futures (0)",
    )
    plan.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="for many futures: solve them side by side on so many workers of Ray, by progressive "
        "hedging (1: here, as one problem)",
    )
    plan.add_argument("--json", action="store_true", help="all of it, for programs")
    plan.set_defaults(do=command_plan)
