"""Lets an earthquake strike one of two cities and the other help it, over a line that may be cut.

`python -m benchmarks.cities` starts two brokers and eight twins, each a process, the two cities in
network namespaces of their own where the machine allows it. Four times the same day begins:
with and without aid, with and without a partition in mid-disaster. In each both cities' runs go on
by themselves. Where there is aid, the city that was hit asks for power ahead of time, both brokers
bind themselves, and in each city its own operator orders what its own book says, for an hour at a
time and no longer than it was agreed. What is told at the end comes from the stores and books of
the two brokers.

One JSON line on stdout: `delivered` (instants of the neighbour's values, its events, promises that
are on both books, and orders that took effect), `lost` and `doubled` among them,
`acted_after_expiry` (steps with power over the line that no promise covers), `reconverge_s` (from
healing to the first good value of the neighbour, the worst) and `kpis`. The table on stderr is for
readers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.cities_files import PURPOSE, CityPlan, Files, document, write
from benchmarks.cities_record import STEP_NS, CityRecord, covers, crossing, orders, promises
from benchmarks.cities_wire import Apart, Place, apart, stand_as_root
from federation.twin import HOUR_NS
from federation.v1 import (
    aid_pb2,
    aid_pb2_grpc,
    broker_pb2,
    broker_pb2_grpc,
    control_pb2,
    control_pb2_grpc,
    peer_pb2,
    scenario_pb2,
    scenario_pb2_grpc,
)
from twins.energy.ties import LEASE_NS

REGIONS = Path(__file__).parents[1] / "twins" / "regions"
TWINS = {
    "disaster": "twins.disaster.twin:DisasterTwin",
    "energy": "twins.energy.twin:EnergyTwin",
    "city": "twins.city.twin:CityTwin",
    "medical": "twins.medical.twin:MedicalTwin",
}
HIT = CityPlan("shelby", REGIONS / "shelby/earthquake.yaml", "nearest", "TIE1", {}, True)
GIVER = CityPlan("mojave", REGIONS / "mojave/plain.yaml", "none", "CA-1", {}, False)
NEIGHBOUR_VALUE = "energy_tie_spare"

READY_S = 300.0
"""How long twins may take to start; they compile code the first time."""
BLOCK_H, AHEAD_H, FIRST_H = 3, 0.75, 2
"""Aid is bargained for so many hours at a time, so long ahead; it begins after the shock."""
RENEW_NS = LEASE_NS // 3
LOOK_S = 0.1
ANSWER_S = 60.0


@dataclass
class City:
    """One city with its broker's process and its run."""

    plan: CityPlan
    files: Files
    place: Place
    store: Path = Path()
    broker: subprocess.Popen[bytes] | None = None
    channel: grpc.aio.Channel | None = None
    run: str = ""
    orders: list[str] = field(default_factory=list)
    """The events of exchanges that its operator ordered, as its broker answered."""

    @property
    def told(self) -> grpc.aio.Channel:
        assert self.channel is not None
        return self.channel

    async def settled_ns(self) -> int:
        stub: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(self.told)
        request = scenario_pb2.GetRunRequest(name=self.run)
        found = (await stub.GetRun(request, timeout=ANSWER_S)).run
        if found.state == scenario_pb2.Run.STATE_FAILED:
            raise RuntimeError(f"the run of {self.plan.name} failed: {found.error.message}")
        return found.time_ns

    async def promises(self) -> list[aid_pb2.Commitment]:
        stub: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(self.told)
        answer = await stub.ListCommitments(aid_pb2.ListCommitmentsRequest(), timeout=ANSWER_S)
        return list(answer.commitments)

    async def begin(self, text: str, seed: int) -> None:
        stub: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(self.told)
        request = scenario_pb2.CreateRunRequest(document=text, seed=seed)
        self.run = (await stub.CreateRun(request, timeout=ANSWER_S)).run.name

    async def order(self, actuator: str, value: float) -> None:
        """Let the city's operator set something of its tie line."""
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(self.told)
        request = control_pb2.SubmitActionRequest(run=self.run, operator="duty")
        request.action.member, request.action.actuator = "energy", actuator
        request.action.entity, request.action.value = self.plan.tie_line, value
        taken = await stub.SubmitAction(request, timeout=ANSWER_S)
        self.orders.append(taken.event)


@dataclass(frozen=True)
class Trial:
    """One of the runs that are compared."""

    has_aid: bool
    is_cut: bool

    @property
    def name(self) -> str:
        aid = "aid" if self.has_aid else "alone"
        return f"{aid}, {'cut' if self.is_cut else 'whole'}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- processes -----------------------------------------------------------------------------------


def start(place: Place, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [*place.prefix, sys.executable, "-m", "federation", *arguments]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_twins(city: City) -> list[subprocess.Popen[bytes]]:
    here = city.files.folder
    return [
        start(
            city.place, here / f"{name}.log", "serve", twin, "--name", name,
            "--config", f"region={city.plan.name}", "--broker", f"127.0.0.1:{city.place.port}",
        )
        for name, twin in TWINS.items()
    ]  # fmt: skip


@asynccontextmanager
async def broker(city: City, folder: Path) -> AsyncIterator[None]:
    """The city's broker with a fresh store and a fresh book, with all twins registered."""
    folder.mkdir(parents=True)
    city.store, files = folder / "broker.sqlite", city.files
    city.orders.clear()
    city.broker = start(
        city.place, folder / "broker.log", "broker", "--city", city.plan.name,
        "--port", str(city.place.port), "--store", str(city.store),
        "--scenarios", str(city.plan.scenario.parent),
        "--scenario", str(files.scenario), "--export", str(files.policy),
        "--aid", str(files.goods), "--aid-key", str(files.key),
        "--aid-keyring", str(files.keyring), "--aid-rules", str(files.rules),
        "--aid-trail", str(folder / "trail"),
    )  # fmt: skip
    try:
        async with grpc.aio.insecure_channel(city.place.driver) as channel:
            city.channel = channel
            await ready(city)
            yield
    finally:
        stop(city.broker)


async def ready(city: City) -> None:
    stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(city.told)
    end_s = time.monotonic() + READY_S
    while True:
        try:
            answer = await stub.ListMembers(broker_pb2.ListMembersRequest(), timeout=5)
            if {member.name for member in answer.members} >= TWINS.keys():
                return
        except grpc.aio.AioRpcError:
            pass
        if time.monotonic() > end_s:
            raise RuntimeError(f"the twins of {city.plan.name} did not come up: see {city.files}")
        await asyncio.sleep(0.2)


# -- one trial -----------------------------------------------------------------------------------


async def seek_aid(hit: City, giver: City, horizon_ns: int, failures: list[str]) -> None:
    """Let the city that was hit ask for power, block by block, until its run ends."""
    stub: aid_pb2_grpc.AidAsyncStub = aid_pb2_grpc.AidStub(hit.told)
    first_h = FIRST_H
    while (now_ns := await hit.settled_ns()) < horizon_ns:
        now_h = now_ns / HOUR_NS
        if now_h < first_h - AHEAD_H:
            await asyncio.sleep(LOOK_S)
            continue
        start_h = max(first_h, int(now_h) + 1)
        end_h = min(first_h + BLOCK_H, horizon_ns // HOUR_NS)
        hours = end_h - start_h
        if hours <= 0:
            first_h += BLOCK_H
            await asyncio.sleep(LOOK_S)
            continue
        request = aid_pb2.SeekRequest(
            addresses={giver.plan.name: hit.place.beyond},
            start_ns=start_h * HOUR_NS,
            periods_ns=[HOUR_NS] * hours,
            purpose=PURPOSE,
        )
        way = peer_pb2.BargainRequest.WAY_GIVE
        request.lines.add(city=giver.plan.name, good="power", way=way)
        request.hold_duration.seconds = 10
        try:
            answer = await stub.Seek(request, timeout=10)
        except grpc.aio.AioRpcError as error:
            failures.append(error.details() or str(error.code()))
            await asyncio.sleep(1.0)
            continue
        if answer.commitments:
            first_h += BLOCK_H
        else:
            failures.append("nothing is needed, or nothing to spare")
            await asyncio.sleep(1.0)


async def keep_promises(city: City, sign: float, horizon_ns: int) -> None:
    """Let the city's operator order what its own book says, until its run ends.

    The twin is told until when that holds, before it is told how much; an order that comes late
    outlasts no promise.
    """
    last_ns, told_ns = -RENEW_NS, 0
    while (now_ns := await city.settled_ns()) < horizon_ns:
        await asyncio.sleep(LOOK_S)
        if now_ns < last_ns + RENEW_NS:
            continue
        found = await city.promises()
        bound = [c.terms for c in found if c.state == aid_pb2.Commitment.STATE_BOUND]
        ahead = [terms for terms in bound if covers(terms, now_ns)]
        if not ahead:
            continue
        until_ns = now_ns // STEP_NS * STEP_NS
        while any(covers(terms, until_ns) for terms in bound):
            until_ns += STEP_NS
        try:
            if until_ns != told_ns:
                await city.order("tie_agreed_until", until_ns / HOUR_NS)
                told_ns = until_ns
            amount_mw = sum(quantity(terms, now_ns) for terms in ahead)
            await city.order("tie_exchange", sign * amount_mw)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.OUT_OF_RANGE:
                return  # the run has ended meanwhile
            raise
        last_ns = now_ns


def quantity(terms: peer_pb2.Terms, time_ns: int) -> float:
    """What is promised at an instant of the run."""
    start_ns = terms.start_ns
    for length_ns, amount in zip(terms.periods_ns, terms.quantity, strict=True):
        if start_ns <= time_ns < start_ns + length_ns:
            return float(amount)
        start_ns += length_ns
    return 0.0


async def partition(line: Apart, hit: City, from_h: float, until_h: float) -> tuple[int, int]:
    """Cut the line between two hours of the run; when it was cut and healed (Unix, ns)."""
    while await hit.settled_ns() < from_h * HOUR_NS:
        await asyncio.sleep(LOOK_S)
    line.cut()
    cut_ns = time.time_ns()
    while await hit.settled_ns() < until_h * HOUR_NS:
        await asyncio.sleep(LOOK_S)
    line.heal()
    return cut_ns, time.time_ns()


async def over(city: City, horizon_ns: int) -> None:
    while await city.settled_ns() < horizon_ns:
        await asyncio.sleep(LOOK_S)


async def play(
    trial: Trial, line: Apart, hit: City, giver: City, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Let both cities live through it, and say what their records have of it."""
    horizon_ns = round(options.horizon_h * HOUR_NS)
    pace = {
        "factor": options.factor,
        "when_late": "degrade",
        "late_after_s": options.late_after_s,
    }
    began_s = time.monotonic()
    failures: list[str] = []
    spell: tuple[int, int] | None = None
    async with broker(giver, folder / giver.plan.name), broker(hit, folder / hit.plan.name):
        common = {"horizon_h": options.horizon_h, "pace": pace}
        neighbour = (giver.plan.name, hit.place.beyond)
        await giver.begin(document(giver.plan, **common), options.seed)
        await hit.begin(document(hit.plan, **common, neighbour=neighbour), options.seed)
        async with asyncio.TaskGroup() as group:
            group.create_task(over(hit, horizon_ns))
            group.create_task(over(giver, horizon_ns))
            if trial.has_aid:
                group.create_task(seek_aid(hit, giver, horizon_ns, failures))
                group.create_task(keep_promises(hit, 1.0, horizon_ns))
                group.create_task(keep_promises(giver, -1.0, horizon_ns))
            cutting = None
            if trial.is_cut:
                hours = options.cut_h
                cutting = group.create_task(partition(line, hit, hours[0], hours[1]))
        spell = cutting.result() if cutting is not None else None
        books = await hit.promises(), await giver.promises()
    wall_s = time.monotonic() - began_s
    records = CityRecord(hit.store, hit.run), CityRecord(giver.store, giver.run)
    try:
        found = told(trial, hit, giver, records, books, spell)
    finally:
        for record in records:
            record.close()
    return {**found, "wall_s": round(wall_s, 1), "refusals": sorted(set(failures))}


def told(
    trial: Trial,
    hit: City,
    giver: City,
    records: tuple[CityRecord, CityRecord],
    books: tuple[list[aid_pb2.Commitment], list[aid_pb2.Commitment]],
    spell: tuple[int, int] | None,
) -> dict[str, Any]:
    """What the records and the books of both cities have of a trial."""
    values = crossing(*records, giver.plan.name, NEIGHBOUR_VALUE)
    parts = [values, promises(*books)]
    parts += [orders(r, c.orders) for r, c in zip(records, (hit, giver), strict=True)]
    state = aid_pb2.Commitment.STATE_BOUND
    late = 0
    for record, book in zip(records, books, strict=True):
        late += record.acted_after_expiry([c for c in book if c.state == state])
    reconverge_s = None
    if spell is not None:
        good_ns = records[0].neighbour_good(giver.plan.name, NEIGHBOUR_VALUE, spell[1])
        reconverge_s = None if good_ns is None else round((good_ns - spell[1]) / 1e9, 2)
    return {
        "trial": trial.name,
        "delivered": sum(part.delivered for part in parts),
        "lost": sum(part.lost for part in parts),
        "doubled": sum(part.doubled for part in parts),
        "acted_after_expiry": late,
        "reconverge_s": reconverge_s,
        "promises": parts[1].delivered,
        "late_marks": sum(record.late_marks(tuple(TWINS)) for record in records),
        hit.plan.name: records[0].kpis(),
        giver.plan.name: records[1].kpis(),
    }


# -- all of them ---------------------------------------------------------------------------------


def summary(found: Sequence[dict[str, Any]], line: str) -> dict[str, Any]:
    healed = [trial["reconverge_s"] for trial in found if "cut" in trial["trial"]]
    return {
        **{
            name: sum(trial[name] for trial in found)
            for name in ("delivered", "lost", "doubled", "acted_after_expiry")
        },
        "reconverge_s": None if not healed or None in healed else max(healed),
        "kpis": {
            trial["trial"]: {name: trial[name] for name in (HIT.name, GIVER.name)}
            for trial in found
        },
        "line": line,
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    names = (
        "unserved_mwh", "hospital_hours_without_supply", "deaths", "received_mwh", "sent_mwh",
    )  # fmt: skip
    lines = [f"{'':34}" + "".join(f"{trial['trial']:>14}" for trial in found)]
    for city in (HIT.name, GIVER.name):
        for name in names:
            cells = "".join(f"{trial[city][name]:14,.1f}" for trial in found)
            lines.append(f"{city + ' ' + name:34.34}{cells}")
    for name in (
        "promises", "delivered", "lost", "doubled", "acted_after_expiry", "reconverge_s",
        "late_marks", "wall_s",
    ):  # fmt: skip
        cells = "".join(f"{'-' if t[name] is None else t[name]:>14}" for t in found)
        lines.append(f"{name:34}{cells}")
    return "\n".join(lines)


async def main_(options: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="cities-"))
    twins: list[subprocess.Popen[bytes]] = []
    trials = [Trial(aid, cut) for aid in (False, True) for cut in (False, True)]
    if options.only:
        trials = [trial for trial in trials if trial.name.startswith(options.only)]
    try:
        files = write((HIT, GIVER), folder, options.most_mw)
        async with apart(folder, options.line) as line:
            hit, giver = (
                City(plan, its, place)
                for plan, its, place in zip((HIT, GIVER), files, line.places, strict=True)
            )
            say(f"two cities apart by {line.kind}; starting eight twins")
            try:
                twins = [process for city in (hit, giver) for process in start_twins(city)]
                found = []
                for number, trial in enumerate(trials):
                    made = await play(trial, line, hit, giver, folder / str(number), options)
                    found.append(made)
                    say(json.dumps(made))
            finally:
                for process in twins:
                    stop(process)
            kind = line.kind
        say(table(found))
        told_ = summary(found, kind)
        print(json.dumps(told_))
        is_well = told_["lost"] == told_["doubled"] == told_["acted_after_expiry"] == 0
        was_cut = any(trial.is_cut for trial in trials)
        return 0 if is_well and (not was_cut or told_["reconverge_s"] is not None) else 1
    finally:
        if options.keep:
            say(f"stores, books and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.cities", description=__doc__)
    found.add_argument("--seed", type=int, default=6, help="of all runs (6: it takes all infeeds)")
    found.add_argument("--horizon-h", type=float, default=24.0, metavar="H", help="(24)")
    found.add_argument(
        "--factor", type=float, default=800.0, help="seconds of the run per second of wall (800)"
    )
    found.add_argument(
        "--late-after-s", type=float, default=4.0, metavar="S", help="(4) then marked as stale"
    )
    found.add_argument(
        "--cut-h", type=float, nargs=2, default=(7.5, 13.0), metavar="H", help="(7.5 to 13)"
    )
    found.add_argument("--most-mw", type=float, default=500.0, metavar="MW", help="of aid (500)")
    found.add_argument("--line", choices=("netns", "proxy"), default="", help="(as can be had)")
    found.add_argument("--only", metavar="NAME", help="trials whose names begin so")
    found.add_argument("--keep", action="store_true", help="keep stores and logs, and say where")
    return found


def main() -> int:
    options = parser().parse_args()
    if options.line != "proxy":
        stand_as_root()
    return asyncio.run(main_(options))


if __name__ == "__main__":
    sys.exit(main())
