"""The commands of `multitwin` that make certificates for development, and take them back."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation.terminal import say

TEACHING = """\
Who is who, over mutual TLS. An authority signs certificates; each names one process by the city,
the part that it plays and its name: spiffe://CITY/PART/NAME. The part decides what its owner may
call (README, "Who may call what"):

  broker    the broker; it alone opens sessions at twins
  twin      a twin; it registers under its own name and no other
  guard     the loop that acts (multitwin control); it alone selects and operates
  operator  a person on duty: submits actions, changes who takes part, answers proposals, stops
  planner   whoever asks what would be best: starts runs and forks, and changes nothing; a keyring
            calls it the optimiser
  observer  looks, and nothing else

A city and its first processes:

  multitwin certs init certs --city shelby
  multitwin certs issue certs broker main
  multitwin certs issue certs twin tower
  multitwin certs issue certs operator kim

  multitwin broker --host 0.0.0.0 --tls certs/broker/main
  multitwin serve tower:Tower --name tower --tls certs/twin/tower --broker broker.example:7700
  multitwin why runs/NAME-1 --broker broker.example:7700 --tls certs/operator/kim

A folder for --tls has tls.crt, tls.key, ca.crt and, when something was revoked, ca.crl: the names
that Kubernetes and cert-manager use, so another authority's files do as well if the certificate has
the URI and, for clients of gRPC, the DNS names NAME.PART.CITY and PART.CITY. MULTITWIN_TLS=DIR says
the same as --tls DIR. Files may be replaced at any time: new connections take what is there.

The broker of another city is believed once the certificate of its authority lies in peers/CITY.crt
of our broker's folder, and what it has revoked in peers/CITY.crl; it then is a peer.

The authority that this makes keeps its key in a file, ca.key. That is good for trying things out;
where it matters, let an authority that guards its key issue the certificates.
"""


def command_init(options: argparse.Namespace) -> int:
    from federation.wire.authority import Authority

    authority = Authority.create(options.dir, options.city)
    say(f"{options.dir} is the authority of {authority.city}; keep {options.dir / 'ca.key'} there")
    return 0


def command_issue(options: argparse.Namespace) -> int:
    """Issue a certificate; the folder for `--tls` goes to standard output."""
    from federation.wire.authority import Authority

    authority = Authority.load(options.dir)
    home = authority.issue(options.part, options.name, options.days)
    say(f"spiffe://{authority.city}/{options.part}/{options.name}, for {options.days:g} days:")
    print(home)
    return 0


def command_revoke(options: argparse.Namespace) -> int:
    from federation.wire.authority import Authority

    serial = None if options.serial is None else int(options.serial, 16)
    for issued in Authority.load(options.dir).revoke(options.part, options.name, serial):
        print(f"revoked: {issued.party} {issued.serial:x}")
    say(
        f"all in {options.dir} know; give {options.dir / 'ca.crl'} to those who run elsewhere, "
        "as their ca.crl"
    )
    return 0


def command_show(options: argparse.Namespace) -> int:
    from federation.wire.authority import Authority
    from federation.wire.trust import instant

    now = datetime.now(UTC)
    for issued in Authority.load(options.dir).issued():
        until = instant(issued.until.timestamp())
        print(f"{issued.state(now):8} until {until}  {issued.party}  {issued.serial:x}")
    return 0


def add_certs(commands: Any) -> None:
    """The commands about certificates."""
    certs = commands.add_parser(
        "certs",
        help="make certificates for mutual TLS, and take them back",
        description=TEACHING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    changes = certs.add_subparsers(dest="change", required=True, metavar="CHANGE")
    init = changes.add_parser("init", help="make the authority of a city")
    init.add_argument("--city", required=True, metavar="CITY", help="such as shelby")
    init.set_defaults(do=command_init)
    issue = changes.add_parser(
        "issue",
        help="give somebody a certificate, or a new one",
        description="Give somebody a certificate with a fresh key. A process that reads the folder "
        "takes the new one without a restart; the one before counts until it expires.",
    )
    issue.add_argument(
        "--days", type=float, default=30.0, metavar="N", help="how long it counts (30)"
    )
    issue.set_defaults(do=command_issue)
    revoke = changes.add_parser(
        "revoke",
        help="let certificates count no more",
        description="Let certificates of somebody count no more. Servers refuse their calls, and "
        "end streams that are open, a few seconds after they have the list.",
    )
    revoke.add_argument("--serial", metavar="HEX", help="only this one (all that they have)")
    revoke.set_defaults(do=command_revoke)
    show = changes.add_parser("show", help="what was issued, until when, and what was revoked")
    show.set_defaults(do=command_show)
    for command in (init, issue, revoke, show):
        command.add_argument("dir", type=Path, metavar="DIR", help="the authority's folder")
    for command in (issue, revoke):
        command.add_argument(
            "part", metavar="PART", help="broker, twin, guard, operator, planner or observer"
        )
        command.add_argument("name", metavar="NAME", help="a twin's is that of its registration")
