"""The commands of `multitwin` about studies: many runs, and what they say together."""

from __future__ import annotations

import argparse
import csv
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation import telemetry
from federation.errors import Reason, ScenarioError
from federation.loop import run
from federation.terminal import Progress, natural, positive, say

# Each command imports its own rooms: a twin that is served needs neither solver nor plots.
if TYPE_CHECKING:
    from federation.scenario.course import Course
    from federation.scenario.design import Design
    from federation.scenario.engine import Engine
    from federation.scenario.run import Case, Outcome
    from federation.scenario.spec import Scenario

PLANNER_FACTORY = "federation.planners:planner"


# -- runs --------------------------------------------------------------------------------


def command_run(options: argparse.Namespace) -> int:
    from federation.scenario.spec import load

    scenario = load(options.scenario)
    if options.pace is not None:
        if not _are_services(scenario, options.members):
            raise ScenarioError(
                Reason.SCENARIO_INVALID, "only members that are services are paced: --members grpc"
            )
        scenario = scenario.paced(options.pace)
    out = Path(options.out or f"runs/{scenario.name}")
    if options.only:
        design = _designed(scenario, options)
        _run_alone(design, *_one_run(options.only), options, out)
        return 0
    summary = execute(scenario, options, out)
    if options.json:
        print(json.dumps(summary, indent=2))
    return 0


def execute(scenario: Scenario, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Run a study as asked, write its folder, and return the summary."""
    from federation.scenario.course import Course

    design = _designed(scenario, options)
    return _carry_out(Course(design, out, progress=Progress()), out, options)


def _designed(scenario: Scenario, options: argparse.Namespace) -> Design:
    from federation.scenario.design import design

    return design(
        scenario,
        measures=options.measures.split(",") if options.measures else (),
        runs=options.runs,
        seed=options.seed,
        members="grpc" if _are_services(scenario, options.members) else options.members,
        pace=getattr(options, "pace", None),
    )


def _are_services(scenario: Scenario, members: str) -> bool:
    """Whether all runs need services: because it is asked for, or because a member is one."""
    return members == "grpc" or any(m.address is not None for m in scenario.members.values())


def command_resume(options: argparse.Namespace) -> int:
    from federation.scenario import results
    from federation.scenario.course import Course
    from federation.scenario.design import read_design

    out = Path(options.run)
    if (out / results.SUMMARY).is_file():
        summary = results.read_summary(out)
        say(f"{out} is whole: {summary['runs']} runs, digest {summary['digest']}")
    else:
        course = Course(read_design(out), out, resumed=True, progress=Progress())
        say(f"{course.done} runs are there already")
        summary = _carry_out(course, out, options)
    if options.json:
        print(json.dumps(summary, indent=2))
    return 0


def _carry_out(course: Course, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Do what a study still needs, write its folder, and return the summary."""
    from federation.scenario import summary as told

    started_s = time.perf_counter()
    design = course.design
    scenario = design.scenario
    at_most = " at most" if design.stop is not None and design.stop.runs is None else ""
    say(f"{scenario.name}: {course.total} runs{at_most} of {scenario.horizon_h:g} h")
    members: list[dict[str, Any]] = []
    with _pausing(course, out):
        if design.members != "local":
            served = course.todo(lambda case: _is_served(case, design.members))
            members = run(_on_fleet(course, served, options, out))
        if design.members != "grpc" and not course.is_over():
            engine = _engine(scenario, options)
            local = course.todo(lambda case: not _is_served(case, design.members))
            for finding in engine.findings(local, keep=_is_reference):
                course.take(finding)
                if course.is_over():
                    break
    rows = course.gather()
    summary = {
        **told.summarise(design, rows, out),
        "members": members or told.local_members(scenario, rows, out),
        "timing": told.timing(rows, time.perf_counter() - started_s),
    }
    course.finish(summary)
    say(f"results in {out}")
    if summary["failed_runs"]:
        one = summary["failed_runs"][0]
        say(f"{len(summary['failed_runs'])} runs failed; to see one alone:")
        say(f"  multitwin rerun {out} {one['run']}:{one['measure']}")
    return summary


@contextmanager
def _pausing(course: Course, out: Path) -> Iterator[None]:
    """Keep what has come when somebody interrupts (SIGINT, SIGTERM) or something fails."""
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BaseException as error:
        course.pause()
        if isinstance(error, (KeyboardInterrupt, SystemExit)) and (out / "study.json").is_file():
            say(f"\n{course.done} of {course.total} runs are kept: multitwin resume {out}")
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _engine(scenario: Scenario, options: argparse.Namespace) -> Engine:
    from federation.scenario.engine import Engine

    workers = options.workers or (0 if options.ray else 1)
    return Engine(scenario, PLANNER_FACTORY, workers, options.ray)


def _is_reference(case: Case) -> bool:
    return case.run == 0


def _is_served(case: Case, members: str) -> bool:
    """Whether a run is done by members that are services of their own."""
    return members == "grpc" or (members == "both" and _is_reference(case))


async def _on_fleet(
    course: Course, todo: Iterator[Case], options: argparse.Namespace, out: Path
) -> list[dict[str, Any]]:
    from federation.broker.fleet import each_case, fleet, sessions_at_once
    from federation.scenario.engine import planner_factory
    from federation.scenario.finding import finding

    scenario = course.design.scenario
    at_once = 1 if course.design.members == "both" else options.workers or 1
    limit = await sessions_at_once(scenario)
    if limit and limit < at_once:
        say(f"{limit} runs at a time: the services take no more sessions")
    say("starting the members, each in a process of its own")
    out.mkdir(parents=True, exist_ok=True)
    telemetry.configure("broker")

    def take(outcome: Outcome) -> None:
        course.take(finding(outcome, scenario.horizon_ns, keep=_is_reference(outcome.case)))

    async with fleet(scenario, out / "broker.sqlite", out / "logs") as crew:
        say(f"broker at {crew.broker.address}")
        await each_case(
            crew,
            scenario,
            todo,
            planner_factory(PLANNER_FACTORY),
            take,
            keep=_is_reference,
            at_once=min(at_once, limit or at_once),
        )
        return crew.members(scenario)


def command_rerun(options: argparse.Namespace) -> int:
    from federation.scenario.archive import Study
    from federation.scenario.design import read_design

    folder = Path(options.run)
    number, measure = _one_run(options.which)
    design = read_design(folder)
    out = Path(options.out or folder / "alone" / f"{number}-{measure}")
    outcome = _run_alone(design, number, measure, options, out)
    rows = Study(folder).runs.to_pylist()
    before = next((r for r in rows if (r["run"], r["measure"]) == (number, measure)), None)
    if before is None:
        say("the study has not come to this run")
    elif (before["digest"], before["error"]) != (outcome.digest, outcome.error):
        text = before["error"] or before["digest"]
        raise ScenarioError(
            Reason.DESCRIPTION_DIFFERS,
            f"in the study this run gave something else: {text}; are the twins the same?",
            {"run": str(number), "measure": measure},
        )
    else:
        say("the same as in the study")
    return 0


def _one_run(text: str) -> tuple[int, str]:
    number, colon, measure = text.partition(":")
    if not (colon and number.isdigit() and measure):
        raise ScenarioError(
            Reason.SCENARIO_INVALID, f"{text!r} names no run: RUN:MEASURE, such as 17:none"
        )
    return int(number), measure


def _run_alone(
    design: Design, number: int, measure: str, options: argparse.Namespace, out: Path
) -> Outcome:
    """One run of a study again, as the study did it, with all that a reference run keeps."""
    from federation.scenario import results

    case = design.case(number, measure)
    say(f"run {number} under {measure}, seed {case.seed}: {_values(case.parameters)}")
    outcome = _alone(design, case, out)
    told = {"run": number, "measure": measure, "seed": case.seed, "digest": outcome.digest}
    told |= {"error": outcome.error, "kpis": outcome.kpis}
    print(json.dumps(told, indent=2))
    if outcome.failure is None:
        results.write_reference(out, [outcome])
        say(f"its ledger, events and actions are in {out}")
    return outcome


def _alone(design: Design, case: Case, out: Path) -> Outcome:
    from federation.broker.fleet import fleet, run_cases
    from federation.scenario.engine import attempt, planner_factory

    if not _is_served(case, design.members):
        return attempt(design.scenario, case, PLANNER_FACTORY, True)

    async def served() -> Outcome:
        async with fleet(design.scenario, out / "broker.sqlite", out / "logs") as crew:
            factory = planner_factory(PLANNER_FACTORY)
            (outcome,) = await run_cases(
                crew, design.scenario, [case], factory, keep=lambda case: True
            )
            return outcome

    out.mkdir(parents=True, exist_ok=True)
    return run(served())


def _values(parameters: Mapping[str, Mapping[str, float]]) -> str:
    found = [f"{m}.{name}={v:g}" for m, values in parameters.items() for name, v in values.items()]
    return ", ".join(found) or "no parameters"


# -- what runs say together ----------------------------------------------------------------


def command_compare(options: argparse.Namespace) -> int:
    from federation.scenario.compare import compare, sides

    found = [compare(a, b) for a, b in sides(options.a, options.b)]
    if not found:
        raise ScenarioError(
            Reason.SCENARIO_INVALID, "there is nothing to compare: name two measures or two studies"
        )
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for one in found:
        runs = one["runs"]
        how = (
            f"{runs} common runs, paired"
            if one["method"] == "paired"
            else (f"{runs[0]} and {runs[1]} runs, independent (Welch)")
        )
        print(f"{one['b']} against {one['a']}: {how}")
        print(f"  {'':<28}{'a':>14}{'b':>14}{'b - a':>14}   95 % interval")
        for kpi, figure in one["kpis"].items():
            low, high = figure["ci95"]
            numbers = "".join(f"{figure[k]:>14.6g}" for k in ("a", "b", "difference"))
            mark = "" if figure["excludes_0"] else "   (includes 0)"
            print(f"  {kpi:<28}{numbers}   {low:.6g} to {high:.6g}{mark}")
    return 0


def command_query(options: argparse.Namespace) -> int:
    from federation.scenario.archive import Study

    table = Study(options.run).query(options.sql)
    if options.json:
        for row in table.to_pylist():
            print(json.dumps(row, default=str))
    else:
        lines = csv.writer(sys.stdout, lineterminator="\n")
        lines.writerow(table.column_names)
        lines.writerows(tuple(row.values()) for row in table.to_pylist())
    return 0


def command_sensitivity(options: argparse.Namespace) -> int:
    from federation.scenario import results
    from federation.scenario.archive import Study
    from federation.scenario.sensitivity import DUMMY, pawn, sobol

    study = Study(options.run)
    measure = study.measure(options.measure)
    if options.sobol:
        design = study.design
        if design.members != "local":
            say("the runs of this design are done in this process and on workers")
        engine = _engine(design.scenario, options)
        found = sobol(engine, measure, options.sobol, design.seed, Progress())
        keys: tuple[str, ...] = ("S1", "S1_conf", "ST", "ST_conf")
    else:
        found = pawn(study, measure)
        keys = ("median", "maximum")
    path = study.folder / "indices.json"
    kept = results.read_json(path) if path.is_file() else {}
    kept.setdefault(found["method"], {})[measure] = found
    results.write_text(path, json.dumps(kept, indent=2, allow_nan=False) + "\n")
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['method']}, measure {measure}, {found['runs']} runs")
    for kpi, inputs in found["kpis"].items():
        print(f"\n{kpi:<40}" + "".join(f"{key:>10}" for key in keys))
        rank = sorted(inputs, key=lambda name: (name == DUMMY, -inputs[name][keys[-2]]))
        for name in rank:
            print(f"  {name:<38}" + "".join(f"{inputs[name][key]:>10.3f}" for key in keys))
    return 0


def command_cascade(options: argparse.Namespace) -> int:
    from federation.scenario.archive import Study
    from federation.scenario.cascade import frequent

    study = Study(options.run)
    found = frequent(study, study.measure(options.measure), options.paths)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"measure {found['measure']}, {found['runs']} runs: the most frequent paths\n")
    for path in found["paths"]:
        print(f"  in {path['runs']} runs, {path['count']} times: {' -> '.join(path['kinds'])}")
    return 0


def command_quantiles(options: argparse.Namespace) -> int:
    from federation.scenario import results
    from federation.scenario.archive import Study
    from federation.scenario.explain import Causes

    study = Study(options.run)
    measure, kpi = study.measure(options.measure), study.kpi(options.kpi)
    values = study.good(measure)[f"kpi.{kpi}"]
    told = []
    for percent in options.at:
        number = study.nearest(kpi, measure, percent / 100)
        folder = study.folder / "explained" / f"{number}-{measure}"
        if not (folder / "reference" / measure / "actions.parquet").is_file():
            outcome = _alone(study.design, study.design.case(number, measure), folder)
            if outcome.failure is not None:
                raise outcome.failure
            results.write_reference(folder, [outcome])
        causes = Causes(results.read_events(folder, measure), results.read_domains(folder))
        chain = causes.cascade().longest_chain
        tree = causes.tree_text(chain[0], options.lines) if chain else "nothing led to anything"
        value = float(values[number])
        print(f"{percent:g} %: {kpi} = {value:g} in run {number} under {measure}\n\n{tree}\n")
        told.append({"kpi": kpi, "percent": percent, "run": number, "value": value, "tree": tree})
    path = study.folder / "quantiles.json"
    kept = results.read_json(path) if path.is_file() else {}
    kept.setdefault(measure, {})[kpi] = told
    results.write_text(path, json.dumps(kept, indent=2) + "\n")
    return 0


def command_rare(options: argparse.Namespace) -> int:
    from federation.scenario.rare import rarity
    from federation.scenario.spec import load

    scenario = load(options.scenario)
    if _are_services(scenario, "local"):
        raise ScenarioError(
            Reason.SCENARIO_INVALID, "rare outcomes are sought with members that have a class"
        )
    found = rarity(
        _engine(scenario, options),
        options.kpi,
        options.above,
        measure=options.measure or next(iter(scenario.measures)),
        samples=options.samples,
        seed=scenario.seed if options.seed is None else options.seed,
        progress=Progress(),
    )
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    low, high = found["ci95"]
    what = f"P({found['kpi']} > {found['above']:g}) under {found['measure']}"
    if not found["is_reached"]:
        print(f"{what}: no run came there; below about {found['probability']:.2g}")
    else:
        print(f"{what} = {found['probability']:.3g}, 95 % {low:.2g} to {high:.2g}")
    print(f"coefficient of variation {found['cov']:.2f}, {found['runs']} runs:")
    for level in found["levels"]:
        print(f"  a share of {level['share']:.3f} reaches {level['threshold']:g}")
    return 0


def sensitivity(scenario: Scenario, options: argparse.Namespace, out: Path) -> None:
    """Move one assumption at a time and see how the effect of the best measure moves."""
    from federation.scenario import results, study

    measures = [study.BASELINE, options.sensitivity_measure]
    seed = scenario.seed if options.seed is None else options.seed
    moved = list(study.shifted(scenario, measures, options.sensitivity_runs, options.runs, seed))
    todo = [case for _, _, cases in moved for case in cases]
    say(f"sensitivity: {len(scenario.sensitivity)} assumptions, {len(todo)} runs")
    outcomes = _engine(scenario, options).run(todo, progress=Progress())
    results.write_sensitivity(
        out, study.effects(scenario, moved, outcomes, results.read_runs(out), measures[1])
    )


# -- the command line ------------------------------------------------------------------


def add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run a scenario, once or as an ensemble",
        description="Run a scenario under each of its measures, once or over its uncertainty. "
        "Ends when there are enough runs: --runs, or what the scenario's `stop` says. Runs go to "
        "the folder as they come, and what an earlier study left there is replaced; a run that "
        "was interrupted goes on with: multitwin resume DIR. Members with an address take part "
        "through sessions of their own.",
        epilog="In the scenario: uncertainty: {tower.start_m: {uniform: [0, 2]}}, correlation: "
        "[{of: [a.x, b.y], rho: 0.5}], sampling: latin-hypercube | sobol | FILE.csv, stop: "
        "{kpi: tower.dry_hours, half_width: 0.1, least_runs: 20, most_runs: 500}",
    )
    run.add_argument("scenario", help="the scenario's YAML file")
    study_options(run)
    run.add_argument(
        "--pace",
        type=float,
        metavar="F",
        help="F seconds of the run per second, 0 for as fast as it can (as the scenario says)",
    )
    run.add_argument(
        "--only",
        metavar="RUN:MEASURE",
        help="do this run of the study alone (with its --runs and --seed) and keep all of it",
    )
    run.add_argument("--json", action="store_true", help="print summary.json on standard output")
    run.set_defaults(do=command_run)


def add_studies(commands: Any) -> None:
    """The commands that work with the folder of a study, and the search for rare outcomes."""
    resume = commands.add_parser(
        "resume",
        help="go on with a study that was interrupted",
        description="Do the runs that a study still needs. It ends with the digest that it would "
        "have had; runs that failed because a worker or a service was lost are done again.",
    )
    resume.add_argument("run", metavar="DIR", help="the folder of the study")
    _worker_options(resume)
    resume.add_argument("--json", action="store_true", help="print summary.json")
    resume.set_defaults(do=command_resume)

    rerun = commands.add_parser(
        "rerun",
        help="do one run of a study again, alone",
        description="Do one run again, as the study did it, and say whether it gave the same; "
        "for failed runs, whose seed and number the summary lists.",
    )
    rerun.add_argument("run", metavar="DIR", help="the folder of the study")
    rerun.add_argument("which", metavar="RUN:MEASURE", help="such as 17:none")
    rerun.add_argument("--out", metavar="DIR", help="folder for its ledger (DIR/alone/...)")
    rerun.set_defaults(do=command_rerun)

    compare = commands.add_parser(
        "compare",
        help="whether two measures or studies differ",
        description="Differences of all KPIs with 95 % intervals: run by run where both have runs "
        "of the same seed, number and draws, else by Welch's test.",
        epilog="multitwin compare runs/a runs/b | runs/a:none runs/a:plan | runs/a (each measure "
        "against the first)",
    )
    compare.add_argument("a", metavar="A", help="DIR or DIR:MEASURE")
    compare.add_argument("b", metavar="B", nargs="?", help="DIR or DIR:MEASURE")
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(do=command_compare)

    query = commands.add_parser(
        "query",
        help="ask a study in SQL",
        description="One SELECT over the views runs, series and cascade, and of run 0 ledger, "
        "events and actions. Reads only. Prints CSV, or a JSON object per line.",
        epilog="""multitwin query runs/demo 'SELECT measure, avg("kpi.deaths") FROM runs GROUP """
        "BY measure'",
    )
    query.add_argument("run", metavar="DIR", help="the folder of a study")
    query.add_argument("sql", metavar="SQL")
    query.add_argument("--json", action="store_true")
    query.set_defaults(do=command_query)

    indices = commands.add_parser(
        "sensitivity",
        help="which uncertain input each KPI depends on",
        description="PAWN indices from the runs that are there; or Sobol indices, first-order and "
        "total, from N * (inputs + 2) runs that are done for it. Also kept for the report.",
    )
    indices.add_argument("run", metavar="DIR", help="the folder of a study")
    indices.add_argument("--measure", help="under this measure (the first)")
    indices.add_argument("--sobol", type=positive, metavar="N", help="a power of two, such as 64")
    _worker_options(indices)
    indices.add_argument("--json", action="store_true")
    indices.set_defaults(do=command_sensitivity)

    cascade = commands.add_parser(
        "cascade",
        help="what most often led to what, over all runs",
        description="The kinds of events along chains of causes, over all runs of a measure: the "
        "most frequent paths, and with --json the whole graph.",
    )
    cascade.add_argument("run", metavar="DIR", help="the folder of a study")
    cascade.add_argument("--measure", help="under this measure (the first)")
    cascade.add_argument("--paths", type=positive, default=20, metavar="N", help="how many (20)")
    cascade.add_argument("--json", action="store_true")
    cascade.set_defaults(do=command_cascade)

    quantiles = commands.add_parser(
        "quantiles",
        help="why bad, usual and good runs went as they did",
        description="The runs nearest to quantiles of a KPI, each with its tree of causes. They "
        "are done again for it, and kept in DIR/explained.",
    )
    quantiles.add_argument("run", metavar="DIR", help="the folder of a study")
    quantiles.add_argument("--kpi", required=True, help="such as deaths")
    quantiles.add_argument("--measure", help="under this measure (the first)")
    quantiles.add_argument(
        "--at", type=_percents, default=[5.0, 50.0, 95.0], metavar="P,..", help="(5,50,95)"
    )
    quantiles.add_argument("--lines", type=int, default=20, help="of each tree (20)")
    quantiles.set_defaults(do=command_quantiles)

    rare = commands.add_parser(
        "rare",
        help="how probable a rare, grave outcome is",
        description="P(KPI > X) by subset simulation over the uncertain inputs and what members "
        "draw: about N * (0.1 + 0.9 L) runs for a probability of 10^-L.",
    )
    rare.add_argument("scenario", help="the scenario's YAML file")
    rare.add_argument("--kpi", required=True, help="such as medical.deaths")
    rare.add_argument("--above", type=float, required=True, metavar="X", help="in the KPI's unit")
    rare.add_argument("--measure", help="under this measure (the first)")
    rare.add_argument("--samples", type=positive, default=1000, metavar="N", help="a level (1000)")
    rare.add_argument("--seed", type=natural, help="(the scenario's)")
    _worker_options(rare)
    rare.add_argument("--json", action="store_true")
    rare.set_defaults(do=command_rare)


def study_options(
    command: argparse.ArgumentParser,
    runs: int | None = None,
    workers: int | None = None,
    members: str = "local",
    out: str | None = None,
) -> None:
    command.add_argument(
        "--members",
        choices=("local", "grpc", "both"),
        default=members,
        help="twins in this process, each as a service of its own, or run 0 as services and the "
        f"others on workers ({members})",
    )
    command.add_argument(
        "--runs",
        type=positive,
        default=runs,
        metavar="N",
        help=f"runs per measure ({runs or 'as the scenario says, else 1'})",
    )
    _worker_options(command, workers)
    command.add_argument("--seed", type=natural, help="seed of everything random (the scenario's)")
    command.add_argument("--measures", metavar="A,B", help="only these measures (all)")
    command.add_argument(
        "--out", metavar="DIR", default=out, help=f"folder for the results ({out or 'runs/NAME'})"
    )


def _worker_options(command: argparse.ArgumentParser, workers: int | None = None) -> None:
    command.add_argument(
        "--workers",
        type=positive,
        default=workers,
        metavar="N",
        help=f"processes ({workers or '1; all of a cluster'})",
    )
    command.add_argument(
        "--ray",
        metavar="auto|ADDRESS",
        help="use the Ray cluster at ADDRESS; auto: the one of this machine, or else one of its "
        "own, as without this option",
    )


def _percents(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError("quantiles are between 0 and 100")
    return values
