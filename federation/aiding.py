"""The commands of `multitwin` about aid between cities: seek, list, show, settle, reconcile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import Reason, ScenarioError
from federation.loop import run
from federation.terminal import broker_option, say

# Each command imports its own rooms: a twin that is served needs neither solver nor plots.
if TYPE_CHECKING:
    from federation.peer.aid import AidOptions
    from federation.v1 import aid_pb2

BEGINNING = """\
version: 1
goods:
  power:                          # the word that both cities use
    unit: MW
    gives: {port: energy.export}  # a port of a member's block, of role supply
    takes: {port: energy.import}  # of role need
  crews:
    unit: "1"
    whole: true
    gives:                        # steps: up to 2 at 200 USD an hour each, 3 more at 1500
      - {most: 2, usd_per_h: 200}
      - {most: 3, usd_per_h: 1500}
"""


def aid_options(options: argparse.Namespace) -> AidOptions | None:
    """How the broker of a command line gives aid; None when it gives none."""
    if options.aid is None:
        return None
    missing = [name for name in ("aid_key", "aid_keyring") if getattr(options, name) is None]
    if missing or not options.city:
        needed = " and ".join(f"--{name.replace('_', '-')}" for name in missing) or "--city"
        raise ScenarioError(Reason.SCENARIO_INVALID, f"a broker that gives aid needs {needed}")
    from federation.control.pledge import PledgeGuard
    from federation.control.rules import load
    from federation.peer.aid import AidGuard, AidOptions, NoGuard
    from federation.peer.city import City
    from federation.wire.credentials import Identity, Keyring

    def guard(city: City) -> AidGuard:
        if options.aid_rules is None:
            say("no --aid-rules: the guard refuses every promise, given or taken")
            return NoGuard()
        return PledgeGuard(load(options.aid_rules), lambda: city.quarters.describe((city.name,)))

    return AidOptions(
        options.aid,
        Identity.load(options.city, options.aid_key),
        Keyring.load(options.aid_keyring),
        options.aid_trail or options.aid.with_name(f"{options.aid.name}.trail"),
        guard,
    )


def add_aid_options(broker: argparse.ArgumentParser) -> None:
    """What a broker is told about aid."""
    given = broker.add_argument_group("aid, given to other cities and taken from them")
    given.add_argument(
        "--aid", type=Path, metavar="FILE", help="the goods that may be exchanged (none)"
    )
    given.add_argument(
        "--aid-key", type=Path, metavar="FILE", help="the city's key, see: multitwin keys new CITY"
    )
    given.add_argument(
        "--aid-keyring", type=Path, metavar="FILE", help="other cities, with the role peer"
    )
    given.add_argument(
        "--aid-rules", type=Path, metavar="FILE", help="the guard's rules, with a part `aid`"
    )
    given.add_argument(
        "--aid-trail", type=Path, metavar="DIR", help="where promises are on record (FILE.trail)"
    )


def command_seek(options: argparse.Namespace) -> int:
    from federation.broker.client import asking
    from federation.twin import HOUR_NS, MINUTE_NS
    from federation.v1 import aid_pb2, aid_pb2_grpc, peer_pb2

    addresses = dict(options.city)
    request = aid_pb2.SeekRequest(
        addresses=addresses,
        start_ns=round(options.start_h * HOUR_NS),
        periods_ns=[round(options.period_min * MINUTE_NS)] * options.periods,
        purpose=options.purpose,
        tolerance=options.tolerance,
    )
    request.hold_duration.FromNanoseconds(round(options.hold_s * 1e9))
    ways = peer_pb2.BargainRequest
    for goods, way in ((options.take, ways.WAY_GIVE), (options.give, ways.WAY_TAKE)):
        for good in goods:
            for city in addresses:
                request.lines.add(city=city, good=good, way=way)

    async def work() -> aid_pb2.SeekResponse:
        async with asking(options.broker) as channel:
            stub: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(channel)
            return await stub.Seek(request, timeout=options.within_s)

    found = run(work())
    for each in found.commitments:
        print(line_of(each))
    say(
        f"it costs {found.cost_usd:,.0f} USD all in all and {found.alone_usd:,.0f} alone; within "
        f"{100 * found.gap:.3f} % of the best there is, after {found.rounds} rounds"
    )
    return 0


def command_list(options: argparse.Namespace) -> int:
    for each in _commitments(options.broker):
        print(line_of(each))
    return 0


def command_show(options: argparse.Namespace) -> int:
    for each in _commitments(options.broker):
        if each.id.startswith(options.commitment):
            print(table_of(each))
            return 0
    raise ScenarioError(
        Reason.UNKNOWN_ENTITY,
        f"no promise is called {options.commitment}",
        {"commitment": options.commitment},
    )


def command_settle(options: argparse.Namespace) -> int:
    """Put on record what was delivered; 3 when the other city means something else."""
    from federation.broker.client import asking
    from federation.v1 import aid_pb2, aid_pb2_grpc

    matching = [c for c in _commitments(options.broker) if c.id.startswith(options.commitment)]
    if len(matching) != 1:
        raise ScenarioError(
            Reason.UNKNOWN_ENTITY,
            f"{len(matching)} promises are called {options.commitment}",
            {"commitment": options.commitment},
        )

    async def work() -> aid_pb2.SettleResponse:
        async with asking(options.broker) as channel:
            stub: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(channel)
            request = aid_pb2.SettleRequest(
                commitment=matching[0].id,
                run=options.run,
                variable=options.variable,
                entity=options.entity,
                address=options.tell,
            )
            return await stub.Settle(request, timeout=60.0)

    found = run(work()).commitment
    print(table_of(found))
    return 3 if found.delivered_there and not found.is_settled else 0


def command_reconcile(options: argparse.Namespace) -> int:
    from federation.broker.client import asking
    from federation.v1 import aid_pb2, aid_pb2_grpc

    async def work(city: str, address: str) -> aid_pb2.ReconcileResponse:
        async with asking(options.broker) as channel:
            stub: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(channel)
            request = aid_pb2.ReconcileRequest(city=city, address=address)
            return await stub.Reconcile(request, timeout=60.0)

    for city, address in options.city:
        for each in run(work(city, address)).commitments:
            print(line_of(each))
    return 0


def line_of(each: aid_pb2.Commitment) -> str:
    """A promise in a line."""
    from federation.twin import HOUR_NS

    terms, hours = each.terms, sum(each.terms.periods_ns) / HOUR_NS
    low, high = min(terms.quantity), max(terms.quantity)
    much = f"{high:g}" if low == high else f"{low:g} to {high:g}"
    what = f"{terms.giver} gives {terms.taker} {much} {_unit(terms.unit)}{terms.good}"
    when = f"from hour {terms.start_ns / HOUR_NS:g} for {hours:g} h"
    return f"{each.id[:12]}  {state_of(each):<8}  {what} {when}" + (
        f"  ({each.why})" if each.why else ""
    )


def table_of(each: aid_pb2.Commitment) -> str:
    """A promise with what was delivered of it, period by period."""
    from federation.twin import HOUR_NS

    terms = each.terms
    lines = [line_of(each), f"{'hour':>8}{'promised':>12}{'USD/unit':>12}{'here':>12}{'there':>12}"]
    begin_ns = terms.start_ns
    for p, length_ns in enumerate(terms.periods_ns):
        told = [
            f"{d[p]:12.4g}" if d else f"{'-':>12}" for d in (each.delivered, each.delivered_there)
        ]
        lines.append(
            f"{begin_ns / HOUR_NS:8.2f}{terms.quantity[p]:12.4g}{terms.price_usd[p]:12.2f}"
            + "".join(told)
        )
        begin_ns += length_ns
    if each.delivered or each.delivered_there:
        lines.append(f"{terms.taker} pays {terms.giver}, USD of 2020:")
        lines.append(
            f"  as measured here  {each.due_usd:12,.2f}" if each.delivered else "  not said here"
        )
        if each.delivered_there:
            lines.append(f"  as measured there {each.due_there_usd:12,.2f}")
        else:
            lines.append("  not said there")
        if each.is_settled:
            lines.append("  both mean the same")
        elif each.delivered and each.delivered_there:
            lines.append(f"  THEY DIFFER BY    {abs(each.due_usd - each.due_there_usd):12,.2f}")
    return "\n".join(lines)


def state_of(each: aid_pb2.Commitment) -> str:
    from federation.v1 import aid_pb2

    return aid_pb2.Commitment.State.Name(each.state).removeprefix("STATE_").lower()


def _unit(unit: str) -> str:
    return "" if unit == "1" else f"{unit} of "


def _commitments(broker: str) -> list[aid_pb2.Commitment]:
    from federation.broker.client import ANSWER_S, asking
    from federation.v1 import aid_pb2, aid_pb2_grpc

    async def work() -> list[aid_pb2.Commitment]:
        async with asking(broker) as channel:
            stub: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(channel)
            answer = await stub.ListCommitments(aid_pb2.ListCommitmentsRequest(), timeout=ANSWER_S)
            return list(answer.commitments)

    return run(work())


def _place(text: str) -> tuple[str, str]:
    city, equals, address = text.partition("=")
    if not (city and equals and address):
        raise argparse.ArgumentTypeError(f"{text!r} is not CITY=ADDRESS, as birch=127.0.0.1:7700")
    return city, address


def add_aid(commands: Any) -> None:
    """The commands about aid."""
    aid = commands.add_parser(
        "aid",
        help="what cities promise each other: seek, list, show, settle, reconcile",
        description="Two brokers bargain over power, crews, generators, ambulances, beds: prices "
        "and quantities cross the border, and nothing else. What they agree on is signed by both "
        "and on record at both before it is said. Each gives only what its export policy lets the "
        "other have (`flexibility: [aid.power]`) and what its guard's rules allow (part `aid`). "
        "What was promised is brought into force by `multitwin control RUN --city CITY`.",
        epilog=f"A file of goods for `multitwin broker --aid FILE`:\n\n{BEGINNING}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = aid.add_subparsers(dest="what_to_do", required=True, metavar="COMMAND")
    seek = kinds.add_parser(
        "seek",
        help="bargain with other cities, and bind them",
        epilog="Example: multitwin aid seek --city birch=127.0.0.1:7701 --take power --take crews "
        "--start-h 2 --periods 6 --purpose mutual-aid",
    )
    seek.add_argument("--take", action="append", default=[], metavar="GOOD", help="to be given it")
    seek.add_argument("--give", action="append", default=[], metavar="GOOD", help="to give it")
    seek.add_argument("--start-h", type=float, default=0.0, metavar="H", help="of the run (0)")
    seek.add_argument("--periods", type=int, default=6, metavar="N", help="how many (6)")
    seek.add_argument("--period-min", type=float, default=60.0, metavar="MIN", help="each (60)")
    seek.add_argument("--purpose", default="", metavar="P", help="for the others' policies")
    seek.add_argument("--hold-s", type=float, default=60.0, metavar="S", help="offers hold (60)")
    seek.add_argument(
        "--tolerance", type=float, default=0.001, metavar="X", help="share of the cost (0.001)"
    )
    seek.add_argument("--within-s", type=float, default=300.0, metavar="S", help="(300)")
    seek.set_defaults(do=command_seek)
    list_ = kinds.add_parser("list", help="all that was promised, a line each")
    list_.set_defaults(do=command_list)
    show = kinds.add_parser("show", help="one promise, and what was delivered of it")
    show.set_defaults(do=command_show)
    settle = kinds.add_parser(
        "settle",
        help="put on record what was delivered, as the run has it",
        description="What was delivered is the mean of a variable of this city's run over each "
        "period; what is paid for is that, and no more than was promised. Ends with 3 when the "
        "other city has said something else.",
    )
    settle.add_argument("--run", required=True, metavar="RUN", help="of this city (runs/NAME)")
    settle.add_argument(
        "--variable", required=True, metavar="MEMBER.VARIABLE", help="in the promise's unit"
    )
    settle.add_argument("--entity", type=int, metavar="I", help="only this index (the sum of all)")
    settle.add_argument(
        "--tell", default="", metavar="ADDRESS", help="the other broker (told when they reconcile)"
    )
    settle.set_defaults(do=command_settle)
    for one in (show, settle):
        one.add_argument("commitment", metavar="ID", help="its id, or how that begins")
    reconcile = kinds.add_parser(
        "reconcile", help="hear from other cities what holds, and tell them"
    )
    reconcile.set_defaults(do=command_reconcile)
    for one in (seek, reconcile):
        one.add_argument(
            "--city",
            type=_place,
            action="append",
            required=True,
            metavar="CITY=ADDRESS",
            help="another city's broker; may be given several times",
        )
    for one in (seek, list_, show, settle, reconcile):
        broker_option(one)
