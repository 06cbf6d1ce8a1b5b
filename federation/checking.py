"""The command of `multitwin` that grades a twin or a city: check."""

from __future__ import annotations

import argparse

from federation.loop import run
from federation.terminal import say

# The command imports its own rooms: a twin that is served needs no checks.


def command_check(options: argparse.Namespace) -> int:
    """Grade what is served at an address; 3 when it fails a check."""
    from federation.conformance.caller import Asked
    from federation.conformance.grading import Grade, as_json, grade, table
    from federation.wire.link import Errand

    errand = Errand(options.purpose, (), options.live)
    asked = Asked(options.identity, errand, options.city)
    findings = run(grade(options.service, asked, options.only))
    print(as_json(options.service, findings) if options.json else table(findings))
    failed = [finding for finding in findings if finding.grade is Grade.FAIL]
    say(f"{options.service}: {len(failed)} of {len(findings)} checks failed")
    return 3 if failed else 0


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="grade a twin or a city by what the contract promises",
        description="Ask a twin or a city for everything that the contract promises, and for some "
        "of what it forbids, over the real wire. It opens and closes sessions of its own and acts "
        "on nobody else's.",
    )
    check.add_argument("service", metavar="ADDRESS", help="where it is served, host:port")
    check.add_argument(
        "--as",
        dest="identity",
        default="",
        metavar="PEER",
        help="as whom a city is asked that takes it without proof: spiffe://CITY/peer/NAME",
    )
    check.add_argument("--city", default="", metavar="NAME", help="over TLS: it is this city")
    check.add_argument("--purpose", default="", metavar="P", help="what a city is asked for")
    check.add_argument("--live", action="store_true", help="the city's run that goes on")
    check.add_argument("--only", action="append", default=[], metavar="CHECK", help="by its name")
    check.add_argument("--json", action="store_true", help="one JSON document")
    check.set_defaults(do=command_check)
