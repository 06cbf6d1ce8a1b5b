"""What a broker knows of its runs, in the words of the wire."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from federation.broker.store import Run, State, Store, Stored
from federation.core.ledger import ActionRecord, EventRecord, Quality, Record
from federation.errors import Reason, ScenarioError
from federation.twin import Fidelity
from federation.v1 import broker_pb2, plan_pb2, scenario_pb2
from federation.wire import codec, status

PAGE_SIZE = 100

_STATES = {
    State.PENDING: scenario_pb2.Run.STATE_PENDING,
    State.RUNNING: scenario_pb2.Run.STATE_RUNNING,
    State.SUCCEEDED: scenario_pb2.Run.STATE_SUCCEEDED,
    State.FAILED: scenario_pb2.Run.STATE_FAILED,
    State.CANCELLED: scenario_pb2.Run.STATE_CANCELLED,
}

_TERMINATIONS = {
    "convergenceCriteriaSatisfied": plan_pb2.Plan.TERMINATION_OPTIMAL,
    "maxTimeLimit": plan_pb2.Plan.TERMINATION_TIME_LIMIT,
    "iterationLimit": plan_pb2.Plan.TERMINATION_WORK_LIMIT,
}


def instant(unix_ns: int) -> Timestamp:
    found = Timestamp()
    found.FromNanoseconds(unix_ns)
    return found


def entry_of(
    stored: Stored,
    fidelities: Mapping[str, Fidelity],
    stale: Collection[tuple[str, str]] = (),
) -> broker_pb2.LedgerEntry:
    """An entry for a reader; a value that is stale by now is told as such."""
    entry = stored.entry
    if isinstance(entry, Record) and (entry.owner, entry.variable) in stale:
        entry = entry._replace(quality=Quality.STALE)
    message = codec.encode_entry(entry)
    message.receive_time.FromNanoseconds(stored.receive_ns)
    if isinstance(entry, Record) and entry.quality is not Quality.SUBSTITUTED:
        message.fidelity = codec.encode_fidelity(fidelities.get(entry.owner, Fidelity.UNSTATED))
    return message


def report_of(store: Store, run: Run, stale: Collection[tuple[str, str]]) -> scenario_pb2.Run:
    kpis = [
        scenario_pb2.Kpi(
            member=member,
            name=variable,
            unit=unit,
            value=value,
            is_stale=(member, variable) in stale,
        )
        for member, variable, unit in run.figures
        if (value := store.present(run.name, member, variable)) is not None
    ]
    return scenario_pb2.Run(
        name=run.name,
        scenario=run.scenario,
        state=_STATES[run.state],
        seed=run.seed,
        time_ns=max(run.settled_ns, 0),
        horizon_ns=run.horizon_ns,
        digest=run.digest,
        error=None if run.error is None else status.encode_error(run.error),
        kpis=kpis,
        create_time=instant(run.create_ns),
        end_time=None if run.end_ns is None else instant(run.end_ns),
    )


def plans_of(store: Store, run: Run) -> list[plan_pb2.Plan]:
    """The plans of a run, newest first, as far as its ledger tells.

    A plan's assignments are the crews that its planner sent until it made the next plan; their
    end is 0 while the component has not been reported as repaired. Intentions that were not
    carried out are not in the ledger and so are left out.
    """
    made = store.events(run.name, "plan_made")
    delays = {(source, target): delay_ns for source, target, delay_ns in run.delays}
    plans = []
    for index, stored in enumerate(made):
        assert isinstance(stored.entry, EventRecord)
        owner, event = stored.entry.owner, stored.entry.event
        until = made[index + 1].number if index + 1 < len(made) else run.entries + 1
        # why the solver stopped stands nowhere else: ledger values are numbers
        why = re.search(r"(\w+)\)$", event.text)
        cost, bound = (
            store.present(run.name, owner, f"plan_{name}", stored.number)
            for name in ("cost", "bound")
        )
        plans.append(
            plan_pb2.Plan(
                name=f"{run.name}/plans/{index + 1}",
                create_time=instant(stored.receive_ns),
                time_ns=event.time_ns,
                objective=cost,
                bound=bound,
                gap=(cost - bound) / abs(cost) if cost and bound is not None else None,
                termination=_TERMINATIONS.get(
                    why.group(1) if why else "", plan_pb2.Plan.TERMINATION_UNSPECIFIED
                ),
                assignments=[
                    _assignment(store, run.name, sent.entry, delays)
                    for sent in store.actions(run.name, owner)
                    if stored.number < sent.number < until
                    and isinstance(sent.entry, ActionRecord)
                    and sent.entry.action.value > 0
                ],
            )
        )
    return plans[::-1]


def _assignment(
    store: Store, run: str, sent: ActionRecord, delays: Mapping[tuple[str, str], int]
) -> plan_pb2.Assignment:
    action = sent.action
    start_ns = sent.time_ns + delays.get((sent.owner, action.member), 0)
    repaired = [
        stored.entry.time_ns
        for stored in store.events(run, "component_repaired", action.entity)
        if stored.entry.owner == action.member and stored.entry.time_ns >= start_ns
    ]
    return plan_pb2.Assignment(
        member=action.member,
        component=action.entity,
        crews=round(action.value),
        start_ns=start_ns,
        end_ns=min(repaired, default=0),
    )


def page_of(size: int, token: str) -> tuple[int, int | None]:
    """How many, and what the token says. Fails with SCENARIO_INVALID."""
    if size < 0 or (token and not token.isdecimal()):
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"there is no page of size {size} at token {token!r}"
        )
    return min(size or PAGE_SIZE, PAGE_SIZE), int(token) if token else None
