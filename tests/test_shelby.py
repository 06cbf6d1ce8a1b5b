"""The reference region end to end: one earthquake through power, water, roads and hospitals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from federation.__main__ import main
from federation.broker.fleet import fleet
from federation.broker.live import show
from federation.core.ledger import ActionRecord, EventRecord, Record
from federation.loop import run as run_loop
from federation.planners import planner
from federation.scenario.explain import Causes
from federation.scenario.run import Case, Outcome, bind, local_sessions, plan_member, run_local
from federation.scenario.spec import OnFailure, load
from federation.twin import HOUR_NS

ROOT = Path(__file__).parent.parent
SCENARIO = ROOT / "twins" / "regions" / "shelby" / "earthquake.yaml"
DOMAINS = {"disaster", "energy", "city", "medical"}


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """Run 1 of seed 1: the grid is hurt but not dead at once."""
    return run_local(load(SCENARIO), Case(1, 1, "plan"), planner, keep_ledger=True)


def scalars(outcome: Outcome, member: str) -> dict[str, np.ndarray]:
    """Every scalar of a member at each of its changes in the run, on common times."""
    times = sorted({t for n, s in outcome.series.items() if n.startswith(member) for t, _ in s})
    found = {}
    for name, points in outcome.series.items():
        owner, _, variable = name.partition(".")
        if owner == member:
            at = np.array([t for t, _ in points])
            values = np.array([v for _, v in points])
            found[variable] = values[np.searchsorted(at, times, side="right") - 1]
    return found


def test_a_cascade_crosses_all_four_domains_and_every_link_is_a_real_coupling(
    outcome: Outcome,
) -> None:
    scenario = load(SCENARIO)
    descriptions = {name: s.description for name, s in local_sessions(scenario).items()}
    member = plan_member(scenario, descriptions, outcome.case, planner)
    assert member is not None
    wiring = bind(scenario, descriptions, member.describe()).wiring
    real = {c.name for c in wiring.couplings}
    real |= {
        f"{a.source} => {a.target}.{actuator.name}"
        for a in wiring.actuations
        for actuator in descriptions[a.target].actuators
    }
    links = [
        (causes_owner, record.owner, channel)
        for record in outcome.events
        for cause, channel in record.via
        for causes_owner in [cause.partition("/")[0]]
    ]
    assert len(links) > 100
    for source, target, channel in links:
        assert channel in real
        assert channel.startswith(f"{source}.") or channel.startswith(f"{source} =>")
        assert f"> {target}." in channel
    causes = Causes(outcome.events, outcome.domains)
    cascade = causes.cascade()
    assert set(cascade.domains) >= DOMAINS
    assert cascade.depth >= 5


def test_without_repairs_one_chain_leads_from_the_shock_through_all_domains_to_a_death() -> None:
    unrepaired = run_local(load(SCENARIO), Case(0, 1, "none"), planner)
    causes = Causes(unrepaired.events, unrepaired.domains)
    chain = causes.chain(causes.pick("patient_died"))
    assert {causes.domain(i) for i in chain} == DOMAINS
    assert causes.events[chain[0]].event.kind == "mainshock"
    assert len(chain) >= 5


def test_the_domains_are_closed_into_loops_of_three() -> None:
    scenario = load(SCENARIO)
    couplings = scenario.couplings_resolved()
    assert len(couplings) >= 10
    graph = nx.DiGraph((c.source, c.target) for c in couplings)
    loops = [set(loop) for loop in nx.simple_cycles(graph)]
    assert sum(len(loop) >= 3 for loop in loops) >= 2


def test_power_is_balanced_at_every_step_of_a_coupled_run(outcome: Outcome) -> None:
    """Supply = served + losses within the solver's tolerance, whatever has failed."""
    energy = scalars(outcome, "energy")
    assert (energy["shed"] > 1.0).any()
    assert np.abs(energy["supply"] - energy["served"] - energy["losses"]).max() < 1e-3


def test_no_vehicle_and_no_patient_is_lost_in_a_coupled_run(outcome: Outcome) -> None:
    city = scalars(outcome, "city")
    gone = city["vehicles_demanded"] - city["vehicles_assigned"] - city["vehicles_stranded"]
    assert np.abs(gone).max() < 1e-6 * city["vehicles_demanded"].max()
    medical = scalars(outcome, "medical")
    left = medical["patients_in_system"] + medical["patients_discharged"] + medical["patients_dead"]
    assert (medical["patients_arisen"] == left).all()


def test_crews_are_never_more_than_there_are(outcome: Outcome) -> None:
    engaged: dict[str, float] = {}
    for record in outcome.ledger:
        if record.variable.endswith("crew_busy"):
            engaged[record.owner + record.variable] = float(record.value.sum())
            assert sum(engaged.values()) <= 12
    assert any(isinstance(a, ActionRecord) and not a.refusal for a in outcome.actions)
    assert not [a for a in outcome.actions if a.refusal]


def test_what_is_repaired_was_assigned_and_every_assignment_was_sent(outcome: Outcome) -> None:
    by_id = {r.event.id: r for r in outcome.events}
    repaired = [r for r in outcome.events if r.event.kind == "component_repaired"]
    assert repaired
    for record in repaired:
        kinds = {by_id[c].event.kind for c in record.event.causes}
        assert "crew_assigned" in kinds
    for record in outcome.events:
        if record.event.kind == "crew_assigned":
            assert any(by_id[c].event.kind == "crew_sent" for c in record.event.causes)


def test_the_ledger_is_in_order_and_each_variable_has_one_owner(outcome: Outcome) -> None:
    keys = [r.sort_key() for r in outcome.ledger]
    assert keys == sorted(keys)
    assert all(isinstance(r, Record) for r in outcome.ledger)
    assert all(isinstance(r, EventRecord) for r in outcome.events)
    assert all(np.isfinite(r.value).all() for r in outcome.ledger)


def test_a_run_does_not_depend_on_what_its_process_did_before(outcome: Outcome) -> None:
    scenario = load(SCENARIO)
    run_local(scenario, Case(0, 9, "plan"), planner)
    assert run_local(scenario, Case(1, 1, "plan"), planner).digest == outcome.digest


def test_services_and_workers_give_the_digest_of_one_process(tmp_path: Path) -> None:
    """Four twins in their own processes, and two Ray workers, against this process.

    The run of the services is traced, and one trace goes through broker, twins and solver.
    """
    spans = tmp_path / "spans.jsonl"

    def study(*options: str, **environment: str) -> dict[str, Any]:
        out = tmp_path / "-".join(options).replace("--", "")
        command = [sys.executable, "-m", "federation", "run", str(SCENARIO), "--json"]
        command += ["--measures", "none,plan", "--out", str(out), *options]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        summary: dict[str, Any] = json.loads(done.stdout)
        assert summary["failed_runs"] == []
        return summary

    services = study("--members", "grpc", MULTITWIN_TRACE_FILE=str(spans))
    traces: dict[str, set[tuple[str, str]]] = {}
    for line in spans.read_text(encoding="utf-8").splitlines():
        span = json.loads(line)
        service = span["resource"]["attributes"]["service.name"]
        traces.setdefault(span["context"]["trace_id"], set()).add((service, span["name"]))
    assert any(
        {("broker", "run"), ("broker", "grant"), ("broker", "plan.solve")}
        | {(domain, "twin.advance") for domain in DOMAINS}
        <= trace
        for trace in traces.values()
    )
    workers = study("--workers", "2")
    assert services["digest"] == workers["digest"]
    assert len({m["pid"] for m in services["members"]}) == 5
    out = tmp_path / "here"
    arguments = ["run", str(SCENARIO), "--measures", "none,plan", "--out", str(out)]
    assert main(arguments) == 0
    assert json.loads((out / "summary.json").read_text())["digest"] == services["digest"]


def test_a_run_whose_processes_are_all_killed_once_ends_as_if_nothing_had_been(
    outcome: Outcome, tmp_path: Path
) -> None:
    scenario = load(SCENARIO)
    recovering = {
        name: member.model_copy(update={"on_failure": OnFailure(do="recover")})
        for name, member in scenario.members.items()
    }
    scenario = scenario.model_copy(update={"members": recovering})
    falls = list(zip(scenario.members, (6, 20, 34, 50), strict=True))

    async def story() -> Outcome:
        async with fleet(scenario, tmp_path / "broker.sqlite", tmp_path) as crew:

            def fell(settled_ns: int) -> None:
                if falls and settled_ns >= falls[0][1] * HOUR_NS:
                    crew.processes[falls.pop(0)[0]].kill()

            return await crew.broker.run(scenario, outcome.case, planner, on_commit=fell)

    disturbed = run_loop(story())
    assert {member for member, _, _ in disturbed.recoveries} == set(recovering)
    assert disturbed.digest == outcome.digest


def test_a_what_if_from_the_second_day_on_has_the_first_day_in_common(
    outcome: Outcome, tmp_path: Path
) -> None:
    """Forked at 24 h: as it was, the run ends as it did; with crews sent to what is nearest, it
    has the same first day and another end."""
    scenario = load(SCENARIO)
    day_ns = 24 * HOUR_NS

    async def story() -> tuple[str, str, list[list[str]]]:
        logs = tmp_path
        async with fleet(scenario, tmp_path / "broker.sqlite", logs, planner) as crew:
            broker = crew.broker
            live = await broker.run(scenario, outcome.case, planner)
            assert live.digest == outcome.digest
            (run,), _ = broker.store.runs()
            names = [await broker.fork(run.name, day_ns, measure) for measure in ("", "nearest")]
            for name in names:
                async for state in broker.follow_run(name):
                    assert state.error is None, state.error
            found = [broker.store.run(name) for name in names]
            days = [
                [
                    show(stored.entry)
                    for stored in broker.store.entries(name, limit=1 << 40)[0]
                    if stored.entry.time_ns <= day_ns
                ]
                for name in (run.name, *names)
            ]
            return found[0].digest, found[1].digest, days

    as_it_was, nearest, days = run_loop(story())
    assert as_it_was == outcome.digest != nearest
    assert len(days[0]) > 1000
    assert days[0] == days[1] == days[2]
