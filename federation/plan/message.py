"""Writes an answer as the message that goes over the wire."""

from __future__ import annotations

import math
from collections.abc import Sequence

from federation.plan.answer import Answer
from federation.plan.visits import Task
from federation.twin import HOUR_NS
from federation.v1 import plan_pb2

_TERMINATIONS = {
    "convergenceCriteriaSatisfied": plan_pb2.Plan.TERMINATION_OPTIMAL,
    "iterationLimit": plan_pb2.Plan.TERMINATION_WORK_LIMIT,
    "infeasible": plan_pb2.Plan.TERMINATION_INFEASIBLE,
}
_SIDES = {"low": plan_pb2.Binding.SIDE_LOW, "high": plan_pb2.Binding.SIDE_HIGH}


def encode_answer(
    answer: Answer, tasks: Sequence[Task], name: str = "", time_ns: int = 0
) -> plan_pb2.Plan:
    """The answer to the question of these tasks, asked at `time_ns` of the run."""
    message = plan_pb2.Plan(
        name=name,
        time_ns=time_ns,
        termination=_TERMINATIONS.get(answer.termination, plan_pb2.Plan.TERMINATION_FAILED),
        bindings=[
            plan_pb2.Binding(
                limit=b.limit, side=_SIDES[b.side], at=b.at, usd_per_unit=b.usd_per_unit
            )
            for b in answer.bindings
        ],
        prices=[
            plan_pb2.LocationalPrice(
                member=p.member,
                port=p.port,
                entity=p.entity,
                unit=p.unit,
                period=p.period,
                usd_per_unit=p.usd_per_unit,
                usd_per_unit_hour=p.usd_per_unit_h,
            )
            for p in answer.prices
        ],
        alternatives=[
            plan_pb2.Alternative(
                without=a.without, cost_usd=a.cost_usd, more_usd=a.more_usd, instead=a.instead
            )
            for a in answer.alternatives
        ],
        worths=[
            plan_pb2.Worth(of=w.of, plan_usd=w.plan_usd, relaxed_usd=w.relaxed_usd)
            for w in answer.worth
        ],
    )
    if answer.schedule is not None:
        cost_usd, bound_usd = answer.schedule.cost_usd, answer.schedule.bound_usd
        message.objective = cost_usd
        if math.isfinite(bound_usd):
            message.bound = bound_usd
            message.gap = (cost_usd - bound_usd) / max(abs(cost_usd), 1e-9)
        for visit in answer.schedule.visits:
            message.assignments.add(
                member=tasks[visit.task].member,
                component=tasks[visit.task].component,
                crews=round(visit.crews),
                start_ns=time_ns + round(visit.start_h * HOUR_NS),
                end_ns=time_ns + round(visit.end_h * HOUR_NS),
            )
    if answer.conflict is not None:
        message.conflicts.extend(answer.conflict.limits)
        message.conflicts_minimal = answer.conflict.is_minimal
    if answer.relaxation is not None:
        for slack in answer.relaxation.slacks:
            message.relaxation.add(
                row=slack.row, amount=slack.amount, penalty_usd=slack.penalty_usd
            )
    return message
