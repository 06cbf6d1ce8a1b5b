"""The commands of `multitwin` about acting: on twins, by loops and persons, and on record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation import telemetry
from federation.errors import Reason, ScenarioError
from federation.loop import run
from federation.terminal import broker_option, natural, positive, run_argument, say

# Each command imports its own rooms: a twin that is served needs neither solver nor plots.
if TYPE_CHECKING:
    from federation.control.stop import Verdict
    from federation.wire.credentials import Identity
    from federation.wire.roster import Post


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


def command_start(options: argparse.Namespace) -> int:
    """Begin a run at a broker, and leave it there."""
    from federation.broker.client import start_run

    if not options.scenario.is_file():
        raise ScenarioError(
            Reason.SCENARIO_NOT_FOUND,
            f"there is no file {options.scenario}",
            {"file": str(options.scenario)},
        )
    document = options.scenario.read_text(encoding="utf-8")
    run(start_run(options.broker, document, options.seed, options.pace))
    return 0


def command_level(options: argparse.Namespace) -> int:
    """Set how far a loop may go by itself; 3 when it does not go so far."""
    from federation.control.autonomy import Key
    from federation.control.people import set_level
    from federation.wire.credentials import Identity

    person = Identity.load(options.identity, options.key)
    key = Key(options.twin, options.action, options.operator)
    told = run(set_level(options.control, key, options.level, person, options.request))
    what = f"{options.twin} {options.action} for {options.operator}"
    say(f"{what}: level {told.level}: {told.sentence}")
    return 0 if told.level == options.level else 3


def command_control(options: argparse.Namespace) -> int:
    """Run the loop over a live run until that ends; what it may do stands in the rules."""
    from federation.control.live import LiveLoop
    from federation.control.mandate import Keys, Terms
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
        window_ns=round(options.window_min * MINUTE_NS),
        stage_within_s=options.stage_within_s,
        city=options.city,
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


def command_audit_reproduce(options: argparse.Namespace) -> int:
    """Make a decision again from its record; 3 when another bundle comes of it."""
    from federation.control import audit
    from federation.control.again import again

    records = audit.read(options.directory, _head_key(options.key))
    record = next(
        (
            r["body"]
            for r in records
            if r["kind"] == "decided" and r["body"]["decision"] == options.decision
        ),
        None,
    )
    if record is None:
        raise ScenarioError(
            Reason.UNKNOWN_BUNDLE, f"{options.directory} has no decision {options.decision}"
        )
    found = run(again(options.broker, record, options.rules))
    for rating in found.ratings:
        print(f"{rating.name}: {rating.mean:,.0f} in {len(rating.weighted)} futures")
    digest = "no bundle" if found.bundle is None else found.bundle.digest()
    say(f"{options.decision}: {'the same' if found.is_same else 'ANOTHER'}: {digest}")
    return 0 if found.is_same else 3


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


# -- the command line ------------------------------------------------------------------


def add_acting(commands: Any) -> None:
    """The commands that stop, release, control, propose, confirm and look at the record."""
    _acting_commands(commands)
    _control_commands(commands)
    _audit_commands(commands.add_parser("audit", help="the trail of the loop's decisions"))


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
        choices=("guard", "operator", "optimiser", "observer", "peer"),
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
    run_argument(loop)
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
    loop.add_argument("--futures", type=positive, default=2, metavar="N", help="(2)")
    loop.add_argument("--within-s", type=float, default=60.0, metavar="S", help="to decide (60)")
    loop.add_argument(
        "--window-min",
        type=float,
        default=30.0,
        metavar="M",
        help="of the run, until a bundle that is not confirmed is undone (30)",
    )
    loop.add_argument(
        "--stage-within-s",
        type=float,
        default=10.0,
        metavar="S",
        help="for each stage of a bundle; at least a step of the slowest twin, as paced (10)",
    )
    loop.add_argument(
        "--measure", action="append", default=[], metavar="NAME", help="to try (all that fit)"
    )
    loop.add_argument(
        "--city",
        default="",
        metavar="CITY",
        help="bring into force what this city has promised to others, and they to it, by the part "
        "`aid` of the rules; at every level (nothing)",
    )
    loop.add_argument("--host", default="127.0.0.1", help="for people (127.0.0.1)")
    loop.add_argument("--port", type=int, default=7800, help="for people (7800)")
    broker_option(loop)
    loop.set_defaults(do=command_control)
    begin = commands.add_parser(
        "start",
        help="begin a live run at a broker",
        description="Begin a run of a scenario with the twins that a broker has, under its first "
        "measure, and say its name. It goes on at the broker.",
    )
    begin.add_argument("scenario", type=Path, metavar="SCENARIO", help="its YAML document")
    begin.add_argument("--seed", type=natural, metavar="N", help="(the scenario's)")
    begin.add_argument(
        "--pace", type=float, metavar="F", help="seconds of the run per second (as it says)"
    )
    broker_option(begin)
    begin.set_defaults(do=command_start)
    level = commands.add_parser(
        "level",
        help="set how far a loop may go by itself",
        description="Set the level of one twin's class of actions: 3 advises, 4 proposes, 5 acts. "
        "Down at once, up only as far as the evidence goes.",
    )
    level.add_argument("twin", metavar="TWIN")
    level.add_argument("action", metavar="ACTION", help="an actuator, or a class of the rules")
    level.add_argument("level", type=int, choices=(3, 4, 5), metavar="LEVEL", help="3, 4 or 5")
    level.add_argument("--operator", required=True, metavar="NAME", help="who is on duty")
    level.add_argument("--as", dest="identity", required=True, metavar="NAME", help="who asks")
    level.add_argument(
        "--key", type=Path, required=True, metavar="FILE", help="that one's private key"
    )
    level.add_argument(
        "--request", default="", metavar="ID", help="do it once for this id (a new one)"
    )
    _control_option(level)
    level.set_defaults(do=command_level)
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
    again = commands.add_parser(
        "reproduce",
        help="make a decision again from its record",
        description="Try the measures of a decision again in the same futures of the same cut, and "
        "see whether the same bundle comes of it. Exits with 3 when it is another one.",
    )
    again.add_argument("--rules", type=Path, required=True, metavar="FILE", help="those of then")
    broker_option(again)
    again.set_defaults(do=command_audit_reproduce)
    repair = commands.add_parser("repair", help="cut off the torn last line that a crash left")
    repair.set_defaults(do=command_audit_repair)
    for one in (verify, query, repair, again):
        one.add_argument("directory", metavar="DIR", help="the trail's folder")
    again.add_argument("decision", metavar="DECISION", help="its id, see: multitwin audit query")
    for one in (verify, query, repair):
        one.add_argument("--json", action="store_true", help="one JSON document")
    for one in (verify, query, again):
        one.add_argument("--key", metavar="FILE", help="public key (PEM) of who signs the heads")


def _instant(text: str) -> float:
    """Unix seconds of an ISO 8601 instant, in UTC unless it says otherwise."""
    found = datetime.fromisoformat(text)
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
