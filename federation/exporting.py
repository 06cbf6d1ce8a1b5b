"""The commands of `multitwin` about a city's export policy: check, explain, declare."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import Reason, ScenarioError
from federation.terminal import say

# Each command imports its own rooms: a twin that is served needs neither solver nor plots.
if TYPE_CHECKING:
    from federation.peer.export import Interior


def command_check(options: argparse.Namespace) -> int:
    """Check a policy and say what it adds up to; with a scenario also what it names in vain."""
    from federation.peer.explain import unused
    from federation.peer.standing import load_declarations, load_policy

    policy = load_policy(options.policy)
    load_declarations(options.policy)
    denials = sum(rule.denies for rule in policy.rules)
    print(
        f"{options.policy}: version {policy.version}, {len(policy.rules)} rules, {denials} of them "
        f"denials; a step of the city is {policy.step_min:g} min"
    )
    if not policy.rules:
        print("without rules nothing is shared; for a beginning:\n\n" + BEGINNING)
    interior = _interior(options.scenario)
    if interior is not None:
        for line in unused(policy, interior):
            print(f"in vain: {line}")
    say(f"next: multitwin policy explain {options.policy} --as PEER")
    return 0


def command_explain(options: argparse.Namespace) -> int:
    """Print what a peer would see, why, and by which rule."""
    from federation.peer.explain import advice, explain, table
    from federation.peer.policy import Question
    from federation.peer.reader import Reader
    from federation.peer.standing import load_declarations, load_policy

    policy = load_policy(options.policy)
    reader = Reader(options.reader)
    declared = load_declarations(options.policy)
    asked = Question(reader, options.purpose, options.at or datetime.now(UTC), declared)
    lines = explain(policy, asked, _interior(options.scenario), options.what)
    when = asked.instant.isoformat(timespec="minutes")
    what_for = f"for {asked.purpose}" if asked.purpose else "for no purpose that it names"
    print(f"{reader} at {when}, {what_for}, by version {policy.version} of {options.policy}:\n")
    print(table(lines))
    for line in advice(policy, lines, asked):
        print(f"\nnote: {line}")
    return 0


def command_declare(options: argparse.Namespace) -> int:
    """Declare an emergency, or end it; running brokers take it up within a second."""
    from federation.peer.standing import declarations_of, declare

    hours = 0.0 if options.end else options.for_h
    if hours is None:
        raise ScenarioError(Reason.SCENARIO_INVALID, "say for how long: --for-h HOURS, or --end")
    made = declare(
        options.policy, options.emergency, options.by, options.why, hours, datetime.now(UTC)
    )
    what = "is over" if options.end else f"holds until {made.end.isoformat(timespec='minutes')}"
    print(f"{made.emergency} {what}; on record in {declarations_of(options.policy)}")
    return 0


BEGINNING = """\
version: 1
rules:
  - name: what-ifs                 # the name that a refused reader is told
    who: [nashville]               # any broker of that city; or spiffe://nashville/peer/broker
    what: {sessions: [what-if]}    # and live, to look at the run that goes on
  - name: load-by-the-hour
    who: [nashville]
    what: {variables: [energy.load]}
    purpose: [mutual-aid]
    resolution: {space: sum, window_min: 60, round_to: 5}
  - name: no-hospitals             # a denial counts before any permission
    effect: deny
    who: ['*']
    what: {variables: ['*'], kinds: [hospital]}
    why: hospitals are nobody's business
"""


def _interior(scenario: Path | None) -> Interior | None:
    """What the city of a scenario has, when its members can be built here."""
    if scenario is None:
        return None
    from federation.peer.city import City, LocalQuarters
    from federation.scenario.spec import load

    inside = load(scenario)
    return City(inside.region, inside, LocalQuarters(inside)).interior(())


def _instant(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time, such as 2026-03-01T03:00 or 2026-03-01T03:00-06:00"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def add_policy(commands: Any) -> None:
    """The commands about an export policy."""
    policy = commands.add_parser(
        "policy",
        help="what a city lets its peers have: check, explain, declare",
        description="What no rule of the policy lets a peer have, it does not get. A broker serves "
        "its city with: multitwin broker --city NAME --export FILE --scenario FILE",
        epilog=f"A policy to begin with:\n\n{BEGINNING}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = policy.add_subparsers(dest="what_to_do", required=True, metavar="COMMAND")
    check = kinds.add_parser(
        "check",
        help="say whether a policy is in order, to the line",
        description="Read a policy as a broker would. What is wrong is told with its line; the "
        "broker that has the file open keeps the policy that was in force.",
    )
    check.set_defaults(do=command_check)
    explain = kinds.add_parser(
        "explain",
        help="what a peer would see, why, and by which rule",
        description="A dry run: who asks, when and for what, against the policy. Denials count "
        "first, then the first rule that allows; rules of an emergency come before all others "
        "while it is declared. Nothing is sent to anybody.",
        epilog="Without --scenario only the names in the rules are known. Examples:\n"
        "  multitwin policy explain p.yaml --as nashville --at 2026-03-01T03:00-06:00\n"
        "  multitwin policy explain p.yaml --as nashville --what 'energy.*' --scenario city.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument(
        "--as", dest="reader", required=True, metavar="PEER", help="a city or spiffe://..."
    )
    explain.add_argument("--purpose", default="", metavar="P", help="what for (nothing said)")
    explain.add_argument("--at", type=_instant, metavar="TIME", help="ISO 8601, else UTC (now)")
    explain.add_argument("--what", default="*", metavar="PATTERN", help="member.name (everything)")
    explain.set_defaults(do=command_explain)
    declare = kinds.add_parser(
        "declare",
        help="declare an emergency, by name and for a time",
        description="Put rules in force that the policy has for an emergency. It is on record who "
        "declared it and why, every use is logged, and it ends by itself.",
    )
    for one in (check, explain, declare):
        one.add_argument("policy", type=Path, metavar="FILE", help="the policy, a YAML file")
    declare.add_argument("emergency", metavar="EMERGENCY", help="one that the policy names")
    declare.add_argument("--by", required=True, metavar="NAME", help="who declares it")
    declare.add_argument("--why", required=True, metavar="TEXT", help="for the record")
    declare.add_argument("--for-h", type=float, metavar="H", help="how long it holds")
    declare.add_argument("--end", action="store_true", help="it is over")
    declare.set_defaults(do=command_declare)
    for one in (check, explain):
        one.add_argument(
            "--scenario", type=Path, metavar="FILE", help="the city's, to know what there is"
        )
