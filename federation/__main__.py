"""The `multitwin` command: where the rooms of the federation meet."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from federation import telemetry
from federation.errors import FederationError, Reason, ScenarioError
from federation.loop import run
from federation.studies import add_run, add_studies, execute, say, sensitivity, study_options

# Each command imports its own rooms: a twin that is served needs neither solver nor plots.
if TYPE_CHECKING:
    from federation.control.stop import Verdict
    from federation.scenario.spec import DispatchPolicy, Policy, Scenario
    from federation.twin import Actuator, Description, Planner
    from federation.wire.credentials import Identity
    from federation.wire.roster import Post

DEMO = "regions/shelby/earthquake.yaml"


def planner(
    scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy | DispatchPolicy
) -> Planner:
    """The planner of a scenario; here, because scenario and plan are strangers."""
    from federation.plan.belief import Assessment
    from federation.plan.crews import CrewPlanner, Family
    from federation.twin import HOUR_NS, MINUTE_NS

    if scenario.dispatch is not None:
        return _dispatch_planner(scenario, descriptions, policy)
    repairs = scenario.repairs
    if repairs is None:
        raise ScenarioError(Reason.SCENARIO_INVALID, "the scenario has no repairs to plan")
    if policy == "rule":
        raise ScenarioError(Reason.SCENARIO_INVALID, f"crews are not sent by {policy!r}")
    families = []
    for work in repairs.work:
        member, name, actuator = _actuator(descriptions, work.actuator)
        components = descriptions[member].ids(actuator.kind)
        families.append(Family(member, name, components, actuator.high))
    given = repairs.assessment
    assessment = Assessment(given.sigma, *given.inspected_after_h) if given else None
    offset_ns = round(repairs.decide_from_min * MINUTE_NS)
    period_ns = round(repairs.decide_every_min * MINUTE_NS)
    horizon_ns = round(repairs.horizon_h * HOUR_NS)
    couplings = scenario.couplings_resolved()
    if policy == "level5":
        from federation.control.foresight import Foreseeing, ForesightPlanner, Sources

        if not scenario.weighted:
            raise ScenarioError(
                Reason.SCENARIO_INVALID, "level5 needs `weighted`: what it is to make small"
            )
        return ForesightPlanner(
            families,
            [Sources(work.remaining, work.busy, work.travel) for work in repairs.work],
            repairs.crews,
            period_ns,
            horizon_ns,
            couplings,
            assessment,
            offset_ns,
            Foreseeing(round(repairs.rehearse_h * HOUR_NS), repairs.futures),
        )
    return CrewPlanner(
        policy,
        families,
        repairs.crews,
        period_ns,
        horizon_ns,
        couplings,
        assessment,
        offset_ns,
    )


def _dispatch_planner(
    scenario: Scenario, descriptions: Mapping[str, Description], policy: Policy | DispatchPolicy
) -> Planner:
    from federation.plan.dispatch import Control, DispatchPlanner, Rule
    from federation.twin import HOUR_NS, MINUTE_NS, SYSTEM

    dispatch = scenario.dispatch
    assert dispatch is not None
    if policy not in ("none", "rule", "once"):
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
    for rule in dispatch.rules if policy == "rule" else ():
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
    return DispatchPlanner(
        policy,
        controls,
        rules,
        round(dispatch.decide_every_min * MINUTE_NS),
        round(dispatch.delay_min * MINUTE_NS),
        round(dispatch.horizon_h * HOUR_NS),
        scenario.couplings_resolved(),
        dispatch.members or None,
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


# -- commands --------------------------------------------------------------------------


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
                max_message_bytes=options.max_message_mib << 20,
            )
        )
    )
    return 0


def _roster_of(options: argparse.Namespace) -> Path | None:
    """Where a broker notes its twins: beside its store, if that is a file, unless told."""
    if options.roster is not None:
        return Path(options.roster)
    return None if "://" in options.store else Path(f"{options.store}.roster.json")


def command_stop(options: argparse.Namespace) -> int:
    from federation.control import stop

    return _at_twins(options, lambda posts, who: stop.stop(posts, who, options.reason), "stopped")


def command_release(options: argparse.Namespace) -> int:
    from federation.control import stop

    if options.bundle:
        run_name, bundle = options.bundle
        return _at_twins(
            options, lambda posts, who: stop.release(posts, who, run_name, bundle), "released"
        )
    return _at_twins(options, lambda posts, who: stop.lift(posts, who, options.stop), "lifted")


def _at_twins(
    options: argparse.Namespace,
    ask: Callable[[Sequence[Post], Identity], Awaitable[Sequence[Verdict]]],
    done: str,
) -> int:
    """Ask the twins that are meant, and say what each said; 3 when one of them did not do it."""
    from federation.control import stop
    from federation.wire.credentials import Identity

    if not (options.twin or options.domain or options.all):
        raise ScenarioError(Reason.SCENARIO_INVALID, "say which: --twin ADDRESS, --domain D, --all")
    identity = Identity.load(options.identity, options.key)

    async def work() -> Sequence[Verdict]:
        posts = await stop.find_posts(options.twin, options.broker, options.roster)
        # a twin that is named is meant, whatever its domain
        return await ask(
            stop.of_domain(posts, options.domain if not options.twin else None), identity
        )

    verdicts = run(work())
    for verdict in verdicts:
        what = f"{verdict.post.name} at {verdict.post.address}"
        if verdict.error is not None:
            say(f"NOT {done}: {what}: {verdict.error}")
        else:
            print(f"{done}: {what}: {', '.join(verdict.done) or 'nothing'}")
    return 3 if any(verdict.error is not None for verdict in verdicts) else 0


def command_control(options: argparse.Namespace) -> int:
    """Run the loop over a live run until that ends; what it may do stands in the rules."""
    from federation.control.live import Keys, LiveLoop, Terms
    from federation.control.people import control
    from federation.twin import HOUR_NS, MINUTE_NS
    from federation.wire.credentials import Identity, Keyring

    terms = Terms(
        level=options.level,
        rules=options.rules,
        state=options.state,
        operator=options.operator,
        every_ns=round(options.every_min * MINUTE_NS),
        ahead_ns=round(options.ahead_h * HOUR_NS),
        futures=options.futures,
        within_s=options.within_s,
        measures=tuple(options.measure),
    )
    keys = Keys(
        Identity.load(options.key.stem, options.key),
        Identity.load(options.optimiser_key.stem, options.optimiser_key),
        Keyring.load(options.keyring),
    )

    async def work() -> None:
        loop = LiveLoop(options.broker, options.run, terms, keys)
        await control(loop, options.host, options.port)

    telemetry.configure("control")
    run(work())
    return 0


def command_proposals(options: argparse.Namespace) -> int:
    from federation.control.people import print_proposals

    run(print_proposals(options.control))
    return 0


def command_answer(options: argparse.Namespace) -> int:
    """Say a person's yes or no; 3 when it does not count."""
    from federation.control.people import answer
    from federation.wire.credentials import Identity

    person = Identity.load(options.identity, options.key)
    told = run(
        answer(options.control, options.proposal, person, is_yes=options.is_yes, why=options.why)
    )
    say(f"{options.proposal}: {told.state}: {told.sentence}")
    return 0 if told.counts else 3


def command_keys_new(options: argparse.Namespace) -> int:
    """Make a key pair, and say how the keyring has it."""
    from federation.wire.credentials import Identity

    identity = Identity.generate(options.identity)
    options.dir.mkdir(parents=True, exist_ok=True)
    file = options.dir / f"{options.identity}.pem"
    identity.save(file)
    say(f"the private key is in {file}; keep it there. The keyring of a twin has:")
    print(
        f"- name: {options.identity}\n  public_key: {identity.public_key}\n"
        f"  roles: [{', '.join(options.role)}]\n  domains: {json.dumps(options.domain)}"
    )
    return 0


def command_why(options: argparse.Namespace) -> int:
    from federation.broker.client import print_why

    run(print_why(options.broker, options.run))
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


def command_audit_verify(options: argparse.Namespace) -> int:
    from federation.control import audit

    expected = None
    if options.head:
        count, _, hash_ = options.head.partition(":")
        if not count.isdigit() or len(hash_) != 64:
            raise ScenarioError(Reason.INVALID_KEY, f"{options.head!r} is no head: give COUNT:HASH")
        expected = (int(count), hash_)
    findings = audit.verify(options.directory, _head_key(options.key), expected)
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            where = f"{finding.file}, line {finding.line}" if finding.line else finding.file
            print(f"{where}: {finding.what}: {finding.sentence}")
    if findings:
        say(f"{options.directory}: the trail is broken in {len(findings)} places")
        return 3
    count, hash_ = audit.heads(options.directory)
    say(f"{options.directory}: whole; its head is {count}:{hash_}")
    return 0


def command_audit_query(options: argparse.Namespace) -> int:
    from federation.control import audit

    try:
        found = audit.query(
            options.directory, options.limit, options.since, options.until, _head_key(options.key)
        )
    except ScenarioError as error:
        if error.reason is not Reason.TRAIL_BROKEN:
            raise
        say(f"multitwin: {error}; see multitwin audit verify {options.directory}")
        return 3
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for decision in found:
        when = datetime.fromtimestamp(decision["time_unix_s"], UTC).isoformat(timespec="seconds")
        print(f"{decision['decision']}  {when}  level {decision['level']}")
        print(f"  limits: {', '.join(decision['limits']) or 'none'}")
        for alternative in decision["alternatives"]:
            print(f"  alternative: {json.dumps(alternative)}")
        for verdict in decision["verdicts"]:
            refusals = "; ".join(f"{rule}: {text}" for rule, text in verdict["refusals"])
            print(f"  guard: {'passed' if verdict['passed'] else refusals or verdict['mode']}")
        for person in decision["approvals"]:
            print(f"  approved by {person['person']} for {', '.join(person['domains'])}")
        for no in decision["rejections"]:
            print(f"  rejected by {no['person'] or 'silence'}: {no['why']}")
        for act in decision["acts"]:
            print(f"  {act['state']} {act['detail']}".rstrip())
        for outcome in decision["outcomes"]:
            for name, observed in outcome["observed"].items():
                predicted = outcome["predicted"].get(name)
                print(f"  {name}: {observed} (predicted {predicted})")
    return 0


def command_audit_repair(options: argparse.Namespace) -> int:
    from federation.control import audit

    cut = audit.repair(options.directory)
    if options.json:
        print(json.dumps({"cut": cut}))
    say(f"cut off {cut!r}" if cut else "there is nothing to repair")
    return 0


def _head_key(path: str | None) -> Callable[[bytes, bytes], bool] | None:
    """Whether the owner of a public key signed a message with a signature."""
    if path is None:
        return None
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except FileNotFoundError:
        raise ScenarioError(Reason.MISSING_FILE, f"there is no key at {path}") from None
    except ValueError:
        raise ScenarioError(Reason.INVALID_KEY, f"{path} is no public key in PEM form") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ScenarioError(Reason.INVALID_KEY, f"{path} is no Ed25519 key")

    def verify(message: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return verify


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
        type=_positive,
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
        "--keep-runs", type=_positive, metavar="N", help="drop all but the newest N ended runs"
    )
    broker.add_argument(
        "--roster", metavar="FILE", help="where it notes its twins (STORE.roster.json)"
    )
    _server_options(broker, port=7700)
    broker.set_defaults(do=command_broker)

    why = commands.add_parser("why", help="what a run waits for, and what its time went to")
    why.add_argument("run", metavar="RUN", help="the run's name at its broker (runs/NAME)")
    _broker_option(why)
    why.set_defaults(do=command_why)

    _member_commands(commands.add_parser("member", help="let members join, leave and be replaced"))

    fork = commands.add_parser(
        "fork",
        help="a what-if: a run with the past of another, and another future",
        description="Start a run that has all that is of a run up to a cut for its past. The run, "
        "which may be going on, does not feel it. Without options it ends as the run does.",
    )
    _run_argument(fork)
    fork.add_argument("--at", type=float, metavar="H", help="the cut (all that is settled)")
    fork.add_argument(
        "--measure", default="", metavar="M", help="send crews under this one from then on"
    )
    fork.add_argument("--horizon-h", type=float, metavar="H", help="when it ends (as the run)")
    _broker_option(fork)
    fork.set_defaults(do=command_fork)

    replay = commands.add_parser(
        "replay",
        help="go through a run again, with recordings in the place of its members",
        description="Go through a run again and see that it is the same. What members answer is "
        "taken from the record, except for those that are to be live.",
    )
    _run_argument(replay)
    which = replay.add_mutually_exclusive_group()
    which.add_argument("--live", default="", metavar="A,B", help="only these do their steps again")
    which.add_argument("--recorded", default="", metavar="A,B", help="all but these do")
    _broker_option(replay)
    replay.set_defaults(do=command_replay)

    _acting_commands(commands)
    _control_commands(commands)
    _audit_commands(commands.add_parser("audit", help="the trail of the loop's decisions"))

    history = commands.add_parser("history", help="what a variable was over a run, as CSV")
    history.add_argument("run", metavar="RUN", help="the run's name at its broker (runs/NAME)")
    history.add_argument("variable", metavar="MEMBER.VARIABLE")
    history.add_argument("--from", dest="start", type=float, default=0.0, metavar="H", help="(0)")
    history.add_argument("--to", dest="end", type=float, metavar="H", help="(all that is settled)")
    history.add_argument(
        "--points", type=int, default=0, metavar="N", help="downsample to N buckets (every value)"
    )
    history.add_argument("--entity", type=int, metavar="I", help="only this index, with --points")
    _broker_option(history)
    history.set_defaults(do=command_history)
    return main


def _audit_commands(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="what", required=True, metavar="WHAT")
    verify = commands.add_parser(
        "verify",
        help="find altered, missing, moved and inserted records",
        description="Look at every record of a trail. Exits with 0 when it is whole, 3 when not.",
        epilog="Keep the head that it prints somewhere else: with --head it finds a trail that was "
        "put back to an older state together with its own head.",
    )
    verify.add_argument("--head", metavar="COUNT:HASH", help="of a head that was kept elsewhere")
    verify.set_defaults(do=command_audit_verify)
    query = commands.add_parser(
        "query",
        help="decisions in which a limit was active: alternatives, who approved, what came of it",
    )
    query.add_argument("--limit", default="", metavar="NAME", help="such as sum:fuel, or fuel")
    query.add_argument("--since", type=_instant, default=float("-inf"), metavar="TIME", help="ISO")
    query.add_argument("--until", type=_instant, default=float("inf"), metavar="TIME", help="ISO")
    query.set_defaults(do=command_audit_query)
    repair = commands.add_parser("repair", help="cut off the torn last line that a crash left")
    repair.set_defaults(do=command_audit_repair)
    for one in (verify, query, repair):
        one.add_argument("directory", metavar="DIR", help="the trail's folder")
        one.add_argument("--json", action="store_true", help="one JSON document")
    for one in (verify, query):
        one.add_argument("--key", metavar="FILE", help="public key (PEM) of who signs the heads")


def _instant(text: str) -> float:
    """Unix seconds of an ISO 8601 instant, in UTC unless it says otherwise."""
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _member_commands(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="change", required=True, metavar="CHANGE")
    add = commands.add_parser(
        "add",
        help="let members join a run",
        description="Let members join a run that is going on, with all that couples them to it.",
        epilog="The file has `members`, `couplings` and `parameters` as a scenario has them, such "
        "as: {members: {gauge: {address: 127.0.0.1:7711}}, couplings: [{from: dams.level, to: "
        "gauge.level}]}. Couplings to members that were there before need a delay_min.",
    )
    _run_argument(add)
    add.add_argument("document", metavar="FILE", help="who joins, and how: a YAML file")
    add.set_defaults(do=command_member_add)
    remove = commands.add_parser(
        "remove",
        help="let a member leave a run",
        description="Let a member make no more steps; what it has published holds. Its process is "
        "needed until the run has passed the instant.",
    )
    _run_argument(remove)
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
    _run_argument(replace)
    replace.add_argument("member", metavar="MEMBER")
    replace.add_argument("heir", metavar="SERVICE", help="its registered name, or host:port")
    replace.set_defaults(do=command_member_replace)
    for change in (add, remove, replace):
        change.add_argument(
            "--at", type=float, metavar="H", help="when, in hours of the run (as soon as it can be)"
        )
        _broker_option(change)


def _acting_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    stop = commands.add_parser(
        "stop",
        help="stop what is autonomous, now",
        description="Stop all that is autonomous at twins: what loops have set falls back to what "
        "a person has set, or to the safe default, and nothing new is taken until a person "
        "releases it. The twins are asked directly; their broker may be dead.",
    )
    stop.add_argument("--reason", required=True, metavar="TEXT", help="why, for the record")
    stop.set_defaults(do=command_stop)
    release = commands.add_parser(
        "release",
        help="lift stops, or undo a bundle",
        description="Lift what was stopped at twins. What had fallen away stays away until "
        "somebody sets it anew.",
    )
    which = release.add_mutually_exclusive_group()
    which.add_argument(
        "--stop", action="append", default=[], metavar="ID", help="only this stop (all)"
    )
    which.add_argument("--bundle", nargs=2, metavar=("RUN", "ID"), help="undo this bundle instead")
    release.set_defaults(do=command_release)
    for command in (stop, release):
        command.add_argument(
            "--twin", action="append", default=[], metavar="ADDRESS", help="this twin"
        )
        command.add_argument("--broker", metavar="ADDRESS", help="the twins that it has")
        command.add_argument(
            "--roster",
            type=Path,
            default=Path("broker.sqlite.roster.json"),
            metavar="FILE",
            help="and those that are here (broker.sqlite.roster.json)",
        )
        who = command.add_mutually_exclusive_group()
        who.add_argument("--domain", metavar="D", help="those of this domain")
        who.add_argument("--all", action="store_true", help="all of them")
        command.add_argument(
            "--as", dest="identity", required=True, metavar="NAME", help="who asks"
        )
        command.add_argument(
            "--key", type=Path, required=True, metavar="FILE", help="that one's private key"
        )
    keys = commands.add_parser("keys", help="make keys for those who act")
    new = keys.add_subparsers(dest="change", required=True, metavar="CHANGE").add_parser(
        "new", help="make a key pair"
    )
    new.add_argument("identity", metavar="NAME")
    new.add_argument("--dir", type=Path, default=Path("keys"), metavar="D", help="(keys)")
    new.add_argument(
        "--role",
        action="append",
        required=True,
        choices=("guard", "operator", "optimiser", "observer"),
        help="what it may do",
    )
    new.add_argument(
        "--domain", action="append", default=[], metavar="D", help="where, * for everywhere"
    )
    new.set_defaults(do=command_keys_new)


def _control_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    loop = commands.add_parser(
        "control",
        help="decide over a live run, within what the rules allow",
        description="Look at a live run again and again, try the measures of its scenario in "
        "futures forked from it, and advise (3), propose to persons (4) or act (5), never further "
        "than the autonomy that the rules grant and that was earned.",
    )
    _run_argument(loop)
    loop.add_argument("--level", type=int, required=True, choices=(3, 4, 5), help="no further")
    loop.add_argument("--rules", type=Path, required=True, metavar="FILE", help="the owners' rules")
    loop.add_argument("--keyring", type=Path, required=True, metavar="FILE", help="who may what")
    loop.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="the guard's key, NAME.pem"
    )
    loop.add_argument(
        "--optimiser-key", type=Path, required=True, metavar="FILE", help="and the optimiser's"
    )
    loop.add_argument(
        "--state", type=Path, required=True, metavar="DIR", help="what it knows, and its trail"
    )
    loop.add_argument("--operator", required=True, metavar="NAME", help="who is on duty")
    loop.add_argument("--every-min", type=float, default=60.0, metavar="M", help="of the run (60)")
    loop.add_argument("--ahead-h", type=float, default=24.0, metavar="H", help="of the run (24)")
    loop.add_argument("--futures", type=_positive, default=2, metavar="N", help="(2)")
    loop.add_argument("--within-s", type=float, default=60.0, metavar="S", help="to decide (60)")
    loop.add_argument(
        "--measure", action="append", default=[], metavar="NAME", help="to try (all that fit)"
    )
    loop.add_argument("--host", default="127.0.0.1", help="for people (127.0.0.1)")
    loop.add_argument("--port", type=int, default=7800, help="for people (7800)")
    _broker_option(loop)
    loop.set_defaults(do=command_control)
    seen = commands.add_parser("proposals", help="what a loop proposes, and how far it may go")
    _control_option(seen)
    seen.set_defaults(do=command_proposals)
    for word, what in (("approve", "confirm"), ("reject", "refuse")):
        said = commands.add_parser(word, help=f"{what} what a loop proposes")
        said.add_argument("proposal", metavar="PROPOSAL")
        said.add_argument("--as", dest="identity", required=True, metavar="NAME", help="who asks")
        said.add_argument(
            "--key", type=Path, required=True, metavar="FILE", help="that one's private key"
        )
        said.add_argument("--why", default="", metavar="TEXT", help="for the record")
        _control_option(said)
        said.set_defaults(do=command_answer, is_yes=word == "approve")


def _control_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--control", default="127.0.0.1:7800", metavar="ADDRESS", help="(127.0.0.1:7800)"
    )


def _run_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="the run's name at its broker (runs/NAME)")


def _broker_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--broker", default="127.0.0.1:7700", metavar="ADDRESS", help="(127.0.0.1:7700)"
    )


def _server_options(command: argparse.ArgumentParser, port: int = 0) -> None:
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    command.add_argument(
        "--port", type=int, default=port, help=f"port, 0 for any free one ({port})"
    )
    command.add_argument(
        "--max-message-mib", type=_positive, default=64, metavar="N", help="largest message (64)"
    )


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
    except BrokenPipeError:  # who reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        telemetry.flush()


if __name__ == "__main__":
    sys.exit(main())
