"""The `multitwin` command: where the rooms of the federation meet."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from federation import telemetry
from federation.acting import add_acting
from federation.aiding import add_aid, add_aid_options, aid_options
from federation.asking import add_plan
from federation.certs import add_certs
from federation.errors import FederationError, Reason, ScenarioError
from federation.exporting import add_policy
from federation.loop import run
from federation.planners import planner
from federation.studies import add_run, add_studies, execute, sensitivity, study_options
from federation.terminal import (
    broker_option,
    footing_of,
    footing_options,
    positive,
    run_argument,
    say,
)

DEMO = "regions/shelby/earthquake.yaml"


# -- commands --------------------------------------------------------------------------
# Each imports its own rooms: a twin that is served needs neither solver nor plots.


def command_demo(options: argparse.Namespace) -> int:
    """Run 0 in five processes, the other runs on workers, then sensitivity and the report."""
    from federation.scenario.report import write_report
    from federation.scenario.spec import load

    spec = importlib.util.find_spec("twins")
    if spec is None or spec.origin is None:
        raise ScenarioError(
            Reason.MISSING_EXTRA, "the demo's twins are not installed: install multitwin[twins]"
        )
    scenario = load(Path(spec.origin).parent / DEMO)
    out = Path(options.out)
    execute(scenario, options, out)
    if options.sensitivity_runs:
        sensitivity(scenario, options, out)
    say(f"report in {write_report(out)}")
    say(f"next: multitwin explain {out}")
    return 0


def command_explain(options: argparse.Namespace) -> int:
    from federation.scenario import results
    from federation.scenario.explain import Causes

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
    print(f"From {chain[0]} to {end}:\n\n{causes.chain_text(end)}\n")
    print(f"What followed from {chain[0]}:\n\n{causes.tree_text(chain[0], options.lines)}")
    return 0


def command_report(options: argparse.Namespace) -> int:
    from federation.scenario.report import write_report

    print(write_report(Path(options.run)))
    return 0


def command_serve(options: argparse.Namespace) -> int:
    from federation.scenario.run import build_twin
    from federation.wire.credentials import Keyring
    from federation.wire.serve import INLINE_S, ServeOptions, serve

    config = dict(_setting(text) for text in options.config)
    sys.path.insert(0, os.getcwd())
    name = options.name or options.twin.rpartition(":")[2].lower()
    telemetry.configure(name)
    run(
        serve(
            lambda: build_twin(options.twin, config),
            name,
            ServeOptions(
                host=options.host,
                port=options.port,
                broker=options.broker,
                advertise=options.advertise,
                inline_s=INLINE_S,
                max_message_bytes=options.max_message_mib << 20,
                max_sessions=options.max_sessions,
                keyring=Keyring() if options.keyring is None else Keyring.load(options.keyring),
                state_file=options.state,
                health_port=options.health_port,
            ),
        )
    )
    return 0


def command_broker(options: argparse.Namespace) -> int:
    from federation.broker.server import BrokerOptions, serve_broker

    telemetry.configure("broker")
    run(
        serve_broker(
            BrokerOptions(
                host=options.host,
                port=options.port,
                store=options.store,
                scenario_folder=options.scenarios,
                planner=planner,
                keep_runs=options.keep_runs,
                roster=_roster_of(options),
                health_port=options.health_port,
                max_message_bytes=options.max_message_mib << 20,
                city=options.city,
                export=options.export,
                city_scenario=options.scenario,
                aid=aid_options(options),
            )
        )
    )
    return 0


def _roster_of(options: argparse.Namespace) -> Path | None:
    """Where a broker notes its twins: beside its store, if that is a file, unless told."""
    if options.roster is not None:
        return Path(options.roster)
    return None if "://" in options.store else Path(f"{options.store}.roster.json")


def command_why(options: argparse.Namespace) -> int:
    from federation.broker.client import print_why

    run(print_why(options.broker, options.run))
    return 0


def command_outages(options: argparse.Namespace) -> int:
    from federation.broker.client import print_outages

    run(print_outages(options.broker, options.run))
    return 0


def command_member_list(options: argparse.Namespace) -> int:
    from federation.broker.client import print_members

    run(
        print_members(
            options.broker, options.domain, options.area, options.feature, options.step_min
        )
    )
    return 0


def command_member_add(options: argparse.Namespace) -> int:
    from federation.broker.client import add_members

    document = _text_of(Path(options.document))
    run(add_members(options.broker, options.run, document, options.at))
    return 0


def command_member_remove(options: argparse.Namespace) -> int:
    from federation.broker.client import remove_member

    run(remove_member(options.broker, options.run, options.member, options.at))
    return 0


def command_member_replace(options: argparse.Namespace) -> int:
    from federation.broker.client import replace_member

    run(replace_member(options.broker, options.run, options.member, options.heir, options.at))
    return 0


def command_fork(options: argparse.Namespace) -> int:
    from federation.broker.client import fork_run

    run(fork_run(options.broker, options.run, options.at, options.measure, options.horizon_h))
    return 0


def command_replay(options: argparse.Namespace) -> int:
    from federation.broker.client import replay_run

    run(replay_run(options.broker, options.run, _names(options.live), _names(options.recorded)))
    return 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _text_of(file: Path) -> str:
    if not file.is_file():
        raise ScenarioError(
            Reason.SCENARIO_NOT_FOUND, f"there is no file {file}", {"file": str(file)}
        )
    return file.read_text(encoding="utf-8")


def command_history(options: argparse.Namespace) -> int:
    from federation.broker.client import print_history

    run(
        print_history(
            options.broker,
            options.run,
            options.variable,
            options.start,
            options.end,
            options.points,
            options.entity,
        )
    )
    return 0


def _setting(text: str) -> tuple[str, str | int | float]:
    """Read KEY=VALUE; a value that looks like a number is one."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ScenarioError(Reason.SCENARIO_INVALID, f"--config wants KEY=VALUE, not {text!r}")
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value


# -- the command line ------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="multitwin",
        description="Federate digital twins: run coupled scenarios, compare what to do, see why.",
        epilog="Start with: multitwin demo  (an earthquake through power, water, roads, hospitals)",
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole story, from a shock to a report")
    study_options(demo, runs=12, workers=2, members="both", out="runs/demo")
    demo.add_argument(
        "--sensitivity-runs",
        type=int,
        default=2,
        metavar="N",
        help="runs per shifted assumption, 0 for none (2)",
    )
    demo.set_defaults(do=command_demo, sensitivity_measure="plan")

    add_run(commands)
    add_studies(commands)
    add_plan(commands)

    explain = commands.add_parser("explain", help="print why a run went as it did")
    explain.add_argument("run", help="the folder of a run, such as runs/demo")
    explain.add_argument("--measure", help="which measure's run 0 (the first)")
    explain.add_argument("--event", help="explain this event id")
    explain.add_argument(
        "--kind", default="patient_died", help="explain the most telling event of this kind"
    )
    explain.add_argument("--lines", type=int, default=40, help="how much of the tree to print (40)")
    explain.set_defaults(do=command_explain)

    report = commands.add_parser("report", help="write a run's report as one HTML file")
    report.add_argument("run", help="the folder of a run, such as runs/demo")
    report.set_defaults(do=command_report)

    server = commands.add_parser("serve", help="make a twin a service")
    server.add_argument("twin", help="module:Class of a subclass of federation.twin.Twin")
    server.add_argument("--name", help="its name in the federation (the class's, in lower case)")
    server.add_argument("--broker", metavar="ADDRESS", help="register with the broker there")
    server.add_argument(
        "--config", metavar="KEY=VALUE", action="append", default=[], help="for its constructor"
    )
    server.add_argument(
        "--max-sessions",
        type=positive,
        default=0,
        metavar="N",
        help="refuse more at a time; a study then does no more runs at a time (no limit)",
    )
    server.add_argument(
        "--keyring",
        type=Path,
        metavar="FILE",
        help="who may act on it, see: multitwin keys (nobody)",
    )
    server.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="where it keeps stops and confirmations, over restarts",
    )
    server.add_argument("--advertise", metavar="ADDRESS", help="what the broker calls (host:port)")
    _server_options(server)
    server.set_defaults(do=command_serve)

    broker = commands.add_parser("broker", help="run a broker")
    broker.add_argument(
        "--store",
        default="broker.sqlite",
        metavar="FILE|URL",
        help="its SQLite file or its PostgreSQL, postgresql://... (broker.sqlite)",
    )
    broker.add_argument(
        "--scenarios", type=Path, metavar="DIR", help="where the files of scenarios lie"
    )
    broker.add_argument(
        "--keep-runs", type=positive, metavar="N", help="drop all but the newest N ended runs"
    )
    broker.add_argument(
        "--roster", metavar="FILE", help="where it notes its twins (STORE.roster.json)"
    )
    broker.add_argument(
        "--city", default="", metavar="NAME", help="the city that it speaks for, to its peers"
    )
    broker.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="serve the city to its peers as this policy has it (nothing is served)",
    )
    broker.add_argument(
        "--scenario", type=Path, metavar="FILE", help="the scenario of the city that is served"
    )
    add_aid_options(broker)
    _server_options(broker, port=7700)
    broker.set_defaults(do=command_broker)

    why = commands.add_parser("why", help="what a run waits for, and what its time went to")
    why.add_argument("run", metavar="RUN", help="the run's name at its broker (runs/NAME)")
    broker_option(why)
    why.set_defaults(do=command_why)

    absent = commands.add_parser("outages", help="when a run went on without somebody")
    run_argument(absent)
    absent.set_defaults(do=command_outages)

    _member_commands(
        commands.add_parser("member", help="find members; let them join, leave and be replaced")
    )

    fork = commands.add_parser(
        "fork",
        help="a what-if: a run with the past of another, and another future",
        description="Start a run that has all that is of a run up to a cut for its past. The run, "
        "which may be going on, does not feel it. Without options it ends as the run does.",
    )
    run_argument(fork)
    fork.add_argument("--at", type=float, metavar="H", help="the cut (all that is settled)")
    fork.add_argument(
        "--measure", default="", metavar="M", help="send crews under this one from then on"
    )
    fork.add_argument("--horizon-h", type=float, metavar="H", help="when it ends (as the run)")
    broker_option(fork)
    fork.set_defaults(do=command_fork)

    replay = commands.add_parser(
        "replay",
        help="go through a run again, with recordings in the place of its members",
        description="Go through a run again and see that it is the same. What members answer is "
        "taken from the record, except for those that are to be live.",
    )
    run_argument(replay)
    which = replay.add_mutually_exclusive_group()
    which.add_argument("--live", default="", metavar="A,B", help="only these do their steps again")
    which.add_argument("--recorded", default="", metavar="A,B", help="all but these do")
    broker_option(replay)
    replay.set_defaults(do=command_replay)

    add_acting(commands)
    add_policy(commands)
    add_aid(commands)
    add_certs(commands)

    history = commands.add_parser("history", help="what a variable was over a run, as CSV")
    history.add_argument("run", metavar="RUN", help="the run's name at its broker (runs/NAME)")
    history.add_argument("variable", metavar="MEMBER.VARIABLE")
    history.add_argument("--from", dest="start", type=float, default=0.0, metavar="H", help="(0)")
    history.add_argument("--to", dest="end", type=float, metavar="H", help="(all that is settled)")
    history.add_argument(
        "--points", type=int, default=0, metavar="N", help="downsample to N buckets (every value)"
    )
    history.add_argument("--entity", type=int, metavar="I", help="only this index, with --points")
    broker_option(history)
    history.set_defaults(do=command_history)
    footing_options(main)
    return main


def _member_commands(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="change", required=True, metavar="CHANGE")
    found = commands.add_parser(
        "list",
        help="who is registered at a broker",
        description="Write who is registered and heard of: name, address, domain, model, "
        "fidelity, step. What is asked for has to hold, all of it.",
        epilog="Such as: member list --feature kind:hospital --area -90.4 34.9 -89.6 35.5",
    )
    found.add_argument("--domain", default="", metavar="D", help="only of this domain")
    found.add_argument(
        "--area", type=float, nargs=4, metavar=("W", "S", "E", "N"), help="only in these degrees"
    )
    found.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="KIND:NAME",
        help="only with this variable, actuator, kind or kpi (several: with all)",
    )
    found.add_argument(
        "--step-min", type=float, default=0.0, metavar="M", help="only with steps of at most M"
    )
    broker_option(found)
    found.set_defaults(do=command_member_list)
    add = commands.add_parser(
        "add",
        help="let members join a run",
        description="Let members join a run that is going on, with all that couples them to it.",
        epilog="The file has `members`, `couplings` and `parameters` as a scenario has them, such "
        "as: {members: {gauge: {address: 127.0.0.1:7711}}, couplings: [{from: dams.level, to: "
        "gauge.level}]}. Couplings to members that were there before need a delay_min.",
    )
    run_argument(add)
    add.add_argument("document", metavar="FILE", help="who joins, and how: a YAML file")
    add.set_defaults(do=command_member_add)
    remove = commands.add_parser(
        "remove",
        help="let a member leave a run",
        description="Let a member make no more steps; what it has published holds. Its process is "
        "needed until the run has passed the instant.",
    )
    run_argument(remove)
    remove.add_argument("member", metavar="MEMBER")
    remove.set_defaults(do=command_member_remove)
    replace = commands.add_parser(
        "replace",
        help="let another process go on for a member",
        description="Let another process go on for a member. The same model in the same version "
        "gets its state, and nothing else changes; any other begins afresh.",
        epilog="Serve it first under a name of its own: multitwin serve tower:Tower --name "
        "tower-2 --broker 127.0.0.1:7700",
    )
    run_argument(replace)
    replace.add_argument("member", metavar="MEMBER")
    replace.add_argument("heir", metavar="SERVICE", help="its registered name, or host:port")
    replace.set_defaults(do=command_member_replace)
    for change in (add, remove, replace):
        change.add_argument(
            "--at", type=float, metavar="H", help="when, in hours of the run (as soon as it can be)"
        )
        broker_option(change)


def _server_options(command: argparse.ArgumentParser, port: int = 0) -> None:
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    command.add_argument(
        "--port", type=int, default=port, help=f"port, 0 for any free one ({port})"
    )
    command.add_argument(
        "--max-message-mib", type=positive, default=64, metavar="N", help="largest message (64)"
    )
    command.add_argument(
        "--health-port",
        type=int,
        default=0,
        metavar="N",
        help="tell health in the clear here, for probes that show no certificate (nowhere)",
    )


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
        with footing_of(options):
            code: int = options.do(options)
        return code
    except FederationError as error:
        print(f"multitwin: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("multitwin: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        telemetry.flush()


if __name__ == "__main__":
    sys.exit(main())
