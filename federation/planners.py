"""Makes the planner that a scenario asks for, since scenario and plan are strangers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from federation.errors import Reason, ScenarioError

# A planner's rooms are imported when there is one to make: a scenario may have nothing to plan.
if TYPE_CHECKING:
    from federation.plan.crews import CrewPlanner
    from federation.scenario.spec import DispatchPolicy, Policy, Scenario
    from federation.twin import Actuator, Description, Planner


_CrewPlanner = TypeVar("_CrewPlanner", bound="CrewPlanner")


def planner(
    scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy | DispatchPolicy
) -> Planner:
    """The planner of a scenario; here, because scenario and plan are strangers."""
    if scenario.dispatch is not None:
        return _dispatch_planner(scenario, descriptions, policy)
    if policy != "level5":
        from federation.plan import crews

        return crew_planner(scenario, descriptions, policy, crews.CrewPlanner)
    from federation.control.foresight import Foreseeing, ForesightPlanner
    from federation.control.foresight_crews import LATER_FUTURES, CrewProposer, Sources
    from federation.twin import HOUR_NS

    common = _of_crews(scenario, descriptions)
    _check_weighted(scenario)
    repairs = scenario.repairs
    assert repairs is not None
    proposer = CrewProposer(
        sources=[Sources(work.remaining, work.busy, work.travel) for work in repairs.work],
        renew=repairs.renew,
        **common,
    )
    rehearse_ns = round(repairs.rehearse_h * HOUR_NS)
    ahead = Foreseeing(rehearse_ns, repairs.futures, LATER_FUTURES)
    return ForesightPlanner(proposer, common["period_ns"], ahead)


def crew_planner(
    scenario: Scenario,
    descriptions: Mapping[str, Description],
    policy: Policy | DispatchPolicy,
    make: type[_CrewPlanner],
) -> _CrewPlanner:
    """What sends the crews of a scenario by a policy that foresees nothing."""
    if policy not in ("none", "nearest", "plan", "once"):
        raise ScenarioError(Reason.SCENARIO_INVALID, f"crews are not sent by {policy!r}")
    return make(policy, **_of_crews(scenario, descriptions))


def _of_crews(scenario: Scenario, descriptions: Mapping[str, Description]) -> dict[str, Any]:
    """What every planner of crews is made with."""
    from federation.plan.belief import Assessment
    from federation.plan.crews import Family
    from federation.twin import HOUR_NS, MINUTE_NS

    repairs = scenario.repairs
    if repairs is None:
        raise ScenarioError(Reason.SCENARIO_INVALID, "the scenario has no repairs to plan")
    families = []
    for work in repairs.work:
        member, name, actuator = _actuator(descriptions, work.actuator)
        components = descriptions[member].ids(actuator.kind)
        families.append(Family(member, name, components, actuator.high))
    given = repairs.assessment
    return {
        "families": families,
        "crews": repairs.crews,
        "period_ns": round(repairs.decide_every_min * MINUTE_NS),
        "horizon_ns": round(repairs.horizon_h * HOUR_NS),
        "couplings": scenario.couplings_resolved(),
        "assessment": Assessment(given.sigma, *given.inspected_after_h) if given else None,
        "offset_ns": round(repairs.decide_from_min * MINUTE_NS),
    }


def _check_weighted(scenario: Scenario) -> None:
    if not scenario.weighted:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, "level5 needs `weighted`: what it is to make small"
        )


def _dispatch_planner(
    scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy | DispatchPolicy
) -> Planner:
    from federation.plan.dispatch import Control, DispatchPlanner, Rule
    from federation.twin import HOUR_NS, MINUTE_NS, SYSTEM

    dispatch = scenario.dispatch
    assert dispatch is not None
    if policy not in ("none", "rule", "once", "level5"):
        raise ScenarioError(Reason.SCENARIO_INVALID, f"no actuator is set by {policy!r}")
    controls = []
    for name in dispatch.actuators:
        member, own, actuator = _actuator(descriptions, name)
        ids = descriptions[member].ids(actuator.kind)
        controls.append(
            Control(
                member,
                own,
                actuator.kind,
                actuator.unit,
                ids,
                actuator.low,
                actuator.high,
                actuator.safe_default,
            )
        )
    place = {name: index for index, name in enumerate(dispatch.actuators)}
    rules, sources, entities = [], {}, {}
    for rule in dispatch.rules if policy in ("rule", "level5") else ():
        if rule.actuator not in place:
            raise ScenarioError(
                Reason.SCENARIO_INVALID, f"a rule sets {rule.actuator}, which is not dispatched"
            )
        control = controls[place[rule.actuator]]
        for name in filter(None, (rule.lacking, rule.size, rule.store)):
            member, _, output = name.partition(".")
            known = {v.name: v for v in descriptions[member].outputs()}
            if output not in known:
                raise ScenarioError(
                    Reason.UNKNOWN_VARIABLE,
                    f"{member} has no output {output!r}",
                    {"member": member, "variable": output},
                )
            kind = known[output].kind
            if kind != (control.kind if name == rule.size else SYSTEM):
                raise ScenarioError(
                    Reason.SCENARIO_INVALID, f"a rule can't use {name}, which is per {kind}"
                )
            sources[member, output] = kind, known[output].unit
            entities[kind] = descriptions[member].ids(kind)
        rules.append(
            Rule(
                place[rule.actuator],
                _pair(rule.lacking),
                rule.value,
                _pair(rule.size) if rule.size else None,
                _pair(rule.store) if rule.store else None,
            )
        )
    period_ns = round(dispatch.decide_every_min * MINUTE_NS)
    delay_ns = round(dispatch.delay_min * MINUTE_NS)
    horizon_ns = round(dispatch.horizon_h * HOUR_NS)
    couplings, members = scenario.couplings_resolved(), dispatch.members or None
    if policy == "level5":
        from federation.control.foresight import Foreseeing, ForesightPlanner
        from federation.control.foresight_dispatch import DispatchProposer

        _check_weighted(scenario)
        ahead_ns = round(dispatch.rehearse_h * HOUR_NS)
        proposer = DispatchProposer(
            controls,
            rules,
            period_ns,
            delay_ns,
            horizon_ns,
            couplings,
            members,
            sources,
            entities,
            dispatch.news,
            ahead_ns,
        )
        ahead = Foreseeing(ahead_ns, dispatch.futures, dispatch.later_futures)
        return ForesightPlanner(proposer, period_ns, ahead)
    return DispatchPlanner(
        policy,
        controls,
        rules,
        period_ns,
        delay_ns,
        horizon_ns,
        couplings,
        members,
        sources,
        entities,
    )


def _pair(name: str) -> tuple[str, str]:
    member, _, variable = name.partition(".")
    return member, variable


def _actuator(descriptions: Mapping[str, Description], path: str) -> tuple[str, str, Actuator]:
    """Member, name and description of an actuator `member.name`."""
    member, name = _pair(path)
    actuators = {a.name: a for a in descriptions[member].actuators}
    if name not in actuators:
        raise ScenarioError(
            Reason.UNKNOWN_VARIABLE,
            f"{member} has no actuator {name!r}; it has {', '.join(sorted(actuators))}",
            {"member": member, "actuator": name},
        )
    return member, name, actuators[name]
