"""The `multitwin` command: where the rooms of the federation meet."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.plan.crews import CrewPlanner, Family
from federation.scenario import results, study
from federation.scenario.explain import Causes
from federation.scenario.run import Outcome, local_sessions
from federation.scenario.spec import Policy, Scenario, load
from federation.twin import HOUR_NS, MINUTE_NS, Description, Planner

DEMO = "regions/shelby/earthquake.yaml"
PLANNER_FACTORY = "federation.__main__:planner"


def planner(scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy) -> Planner:
    """The crew planner of a scenario; here, because scenario and plan are strangers."""
    repairs = scenario.repairs
    if repairs is None:
        raise ScenarioError(Reason.SCENARIO_INVALID, "the scenario has no repairs to plan")
    families = []
    for work in repairs.work:
        member, _, name = work.actuator.partition(".")
        actuators = {a.name: a for a in descriptions[member].actuators}
        if name not in actuators:
            raise ScenarioError(
                Reason.UNKNOWN_VARIABLE,
                f"{member} has no actuator {name!r}; it has {', '.join(sorted(actuators))}",
                {"member": member, "actuator": name},
            )
        actuator = actuators[name]
        components = descriptions[member].ids(actuator.kind)
        families.append(Family(member, name, components, actuator.high))
    return CrewPlanner(
        policy,
        families,
        repairs.crews,
        round(repairs.decide_every_min * MINUTE_NS),
        round(repairs.horizon_h * HOUR_NS),
        scenario.couplings_resolved(),
    )


# -- commands --------------------------------------------------------------------------


def command_run(options: argparse.Namespace) -> int:
    scenario = load(options.scenario)
    summary = execute(scenario, options)
    if options.json:
        print(json.dumps(summary, indent=2))
    return 0


def execute(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """Run a study as asked, write its folder, and return the summary."""
    started = time.perf_counter()
    out = Path(options.out or f"runs/{scenario.name}")
    seed = scenario.seed if options.seed is None else options.seed
    measures = options.measures.split(",") if options.measures else list(scenario.measures)
    todo = study.cases(scenario, measures, options.runs, seed)
    engine = study.Engine(scenario, PLANNER_FACTORY, options.workers, options.ray)
    progress = Progress(f"{scenario.name}: {len(todo)} runs")
    outcomes = engine.run(todo, keep=lambda case: case.run == 0, progress=progress)
    members = study.local_members(scenario, outcomes)
    failed = [o for o in outcomes if o.error]
    if len(failed) == len(outcomes):
        raise TwinError(Reason.TWIN_FAILED, f"every run failed; the first: {failed[0].error}")
    descriptions = {n: s.description for n, s in local_sessions(scenario).items()}
    summary = summarise(scenario, seed, measures, outcomes, descriptions, members, started)
    results.write_runs(out, outcomes, scenario.horizon_ns)
    kept = [o for o in outcomes if o.case.run == 0 and not o.error]
    results.write_reference(out, kept, descriptions)
    results.write_summary(out, summary)
    progress.say(f"results in {out}")
    return summary


def summarise(
    scenario: Scenario,
    seed: int,
    measures: Sequence[str],
    outcomes: Sequence[Outcome],
    descriptions: Mapping[str, Description],
    members: list[dict[str, Any]],
    started: float,
) -> dict[str, Any]:
    """The content of `summary.json`."""
    domains = {name: d.domain for name, d in descriptions.items()}
    first = next((o for o in outcomes if not o.error), None)
    return {
        "region": scenario.region,
        "scenario": scenario.name,
        "seed": seed,
        "digest": study.combined_digest(outcomes),
        "members": members,
        "runs": len({o.case.run for o in outcomes}),
        "failed_runs": [
            {"run": o.case.run, "measure": o.case.measure, "seed": seed, "error": o.error}
            for o in outcomes
            if o.error
        ],
        **study.figures(outcomes, measures),
        "cascade": study.cascade_of(first.events if first else (), domains),
        "timing": study.timing(outcomes, started),
    }


def command_explain(options: argparse.Namespace) -> int:
    folder = Path(options.run)
    summary = results.read_summary(folder)
    measure = options.measure or next(iter(summary["measures"]))
    causes = Causes(results.read_events(folder, measure), results.read_domains(folder))
    end = options.event or causes.pick(options.kind)
    if end not in causes.events:
        raise ScenarioError(Reason.UNKNOWN_ENTITY, f"the run has no event {end!r}")
    chain = causes.chain(end)
    cascade = causes.cascade()
    print(f"{summary['scenario']}, measure {measure}: {cascade.events} linked events in ", end="")
    print(f"{', '.join(cascade.domains)}; longest chain {cascade.depth}\n")
    print(f"From the shock to {end}:\n\n{causes.chain_text(end)}\n")
    print(f"What followed from the first event:\n\n{causes.tree_text(chain[0], options.lines)}")
    return 0


class Progress:
    """One line on standard error that says how far the work is and how long it will take."""

    def __init__(self, title: str) -> None:
        self._started = time.perf_counter()
        self._live = sys.stderr.isatty()
        self.say(title)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __call__(self, done: int, total: int, remark: str) -> None:
        spent_s = time.perf_counter() - self._started
        left_s = spent_s / done * (total - done)
        line = f"  {done}/{total}  {remark}  ({left_s:.0f} s left)"
        if self._live and done < total:
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        else:
            print(f"\r{line:<100}" if self._live else line, file=sys.stderr, flush=True)


# -- the command line ------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="multitwin",
        description="Federate digital twins: run coupled scenarios, compare what to do, see why.",
        epilog="Start with: multitwin demo  (an earthquake through power, water, roads, hospitals)",
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a scenario, once or as an ensemble")
    run.add_argument("scenario", help="the scenario's YAML file")
    _study_options(run)
    run.add_argument("--json", action="store_true", help="print summary.json on standard output")
    run.set_defaults(do=command_run)

    explain = commands.add_parser("explain", help="print why a run went as it did")
    explain.add_argument("run", help="the folder of a run, such as runs/demo")
    explain.add_argument("--measure", help="which measure's run 0 (the first)")
    explain.add_argument("--event", help="explain this event id")
    explain.add_argument(
        "--kind", default="patient_died", help="explain the most telling event of this kind"
    )
    explain.add_argument("--lines", type=int, default=40, help="how much of the tree to print (40)")
    explain.set_defaults(do=command_explain)
    return main


def _study_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--members",
        choices=("local", "grpc"),
        default="local",
        help="twins in this process, or each as a service in its own (local)",
    )
    command.add_argument("--runs", type=_positive, default=1, help="runs per measure (1)")
    command.add_argument("--workers", type=_positive, default=1, help="worker processes (1)")
    command.add_argument("--ray", metavar="ADDRESS", help="use the Ray cluster at ADDRESS")
    command.add_argument("--seed", type=int, help="seed of everything random (the scenario's)")
    command.add_argument("--measures", metavar="A,B", help="only these measures (all)")
    command.add_argument("--out", metavar="DIR", help="folder for the results (runs/NAME)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def check_packages() -> None:
    """Refuse to start when another project's `twins` stands where ours should."""
    spec = importlib.util.find_spec("twins")
    if spec is not None and getattr(importlib.import_module("twins"), "DISTRIBUTION", "") != (
        "multitwin"
    ):
        raise ScenarioError(
            Reason.FOREIGN_PACKAGE,
            f"the package 'twins' at {spec.origin} is not multitwin's; uninstall the distribution "
            "that brought it and install multitwin again",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad request, 3 a member failed, 4 no acceptable plan."""
    options = parser().parse_args(arguments)
    try:
        check_packages()
        code: int = options.do(options)
        return code
    except FederationError as error:
        print(f"multitwin: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("multitwin: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
