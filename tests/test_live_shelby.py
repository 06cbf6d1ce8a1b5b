"""The live loop over the reference region: it sends crews after an earthquake, and loses them.

Every twin, the broker and the loop are processes of their own, as on a command line.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
import yaml

from federation.control import audit
from federation.control.autonomy import Ladder, Standing
from federation.control.rules import load
from federation.twin import HOUR_NS, MINUTE_NS
from federation.v1 import broker_pb2, broker_pb2_grpc, scenario_pb2, scenario_pb2_grpc
from federation.wire import codec
from federation.wire.credentials import Identity, Keyring, Role
from federation.wire.orders import Hand

ROOT = Path(__file__).parent.parent
SHELBY = ROOT / "twins" / "regions" / "shelby"
TWINS = {
    "disaster": "twins.disaster.twin:DisasterTwin",
    "energy": "twins.energy.twin:EnergyTwin",
    "city": "twins.city.twin:CityTwin",
    "medical": "twins.medical.twin:MedicalTwin",
}
PACE = 240.0
"""An hour of the run in a quarter of a minute. The slowest twin does a step every 15 minutes, which
a cycle that acts waits for, to see what it has set in force: here up to 4 s."""

CYCLE_S = 10.0
"""What a cycle of the loop may take on two processors that do nothing else."""


class Service:
    """A process of the command line, and what it says on standard error."""

    def __init__(self, process: subprocess.Popen[bytes], told: Path) -> None:
        self.process = process
        self._told = told

    def lines(self) -> list[str]:
        return self._told.read_text().splitlines()

    def wait_for(self, pattern: str, within_s: float, count: int = 1) -> list[str]:
        """The groups of the first so many lines that match."""
        until_s = time.monotonic() + within_s
        while True:
            found = [m.group(1) for line in self.lines() if (m := re.search(pattern, line))]
            if len(found) >= count:
                return found[:count]
            assert self.process.poll() is None, self.lines()[-20:]
            assert time.monotonic() < until_s, self.lines()[-20:]
            time.sleep(0.1)


@contextmanager
def command(folder: Path, name: str, *arguments: str) -> Iterator[Service]:
    told = folder / f"{name}.log"
    with told.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "federation", *arguments], stderr=out, cwd=ROOT
        )
    try:
        yield Service(process, told)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def keyring(folder: Path) -> dict[str, Identity]:
    """Keys of a guard, an optimiser and a person, in files as the commands want them."""
    roles = {"guard": Role.GUARD, "optimiser": Role.OPTIMISER, "kim": Role.OPERATOR}
    identities = {name: Identity.generate(name) for name in roles}
    for name, identity in identities.items():
        identity.save(folder / f"{name}.pem")
    entries = [
        {
            "name": name,
            "public_key": identities[name].public_key,
            "roles": [role.value],
            "domains": ["*"],
        }
        for name, role in roles.items()
    ]
    (folder / "keyring.yaml").write_text(yaml.safe_dump({"identities": entries}))
    Keyring.load(folder / "keyring.yaml")
    return identities


async def registered(broker: str) -> None:
    async with grpc.aio.insecure_channel(broker) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        while True:
            answer = await stub.ListMembers(broker_pb2.ListMembersRequest(), timeout=10)
            if {member.name for member in answer.members} >= TWINS.keys():
                return
            await asyncio.sleep(0.2)


async def settled(broker: str, run: str, time_ns: int) -> None:
    async with grpc.aio.insecure_channel(broker) as channel:
        stub: scenario_pb2_grpc.ScenariosAsyncStub = scenario_pb2_grpc.ScenariosStub(channel)
        while True:
            answer = await stub.GetRun(scenario_pb2.GetRunRequest(name=run), timeout=10)
            assert not answer.run.HasField("error"), answer.run.error
            if answer.run.time_ns >= time_ns:
                return
            await asyncio.sleep(0.5)


async def crews_at_work(broker: str, run: str) -> list[tuple[int, float]]:
    """How many crews the grid had, at each change."""
    async with grpc.aio.insecure_channel(broker) as channel:
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
        request = broker_pb2.QueryHistoryRequest(run=run, member="energy", variable="crew_busy")
        answer = await stub.QueryHistory(request, timeout=10)
        return [
            (e.time_ns, float(codec.decode_vector(e.value.values.values, "crew_busy").sum()))
            for e in answer.entries
        ]


async def in_force(services: dict[str, str], run: str, guard: Identity) -> list[tuple[float, int]]:
    """Setpoints and the ends of their leases, of all twins with crews."""
    found = []
    for name in ("energy", "city"):
        async with Hand(services[name], guard) as hand:
            answer = await hand.look()
        for desk in answer.desks:
            if desk.run == run:
                assert all(each.HasField("until_ns") for each in desk.in_force)
                found += [(each.value, each.until_ns) for each in desk.in_force]
    return found


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_loop_sends_crews_by_itself_and_when_it_is_killed_they_stand_down(
    tmp_path: Path,
) -> None:
    is_quiet = os.getloadavg()[0] < 1.0
    identities = keyring(tmp_path)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        (SHELBY / "rules.yaml")
        .read_text()
        .replace("lease_min: 180\n    needs", "lease_min: 90\n    needs")
    )
    state = tmp_path / "state"
    state.mkdir()
    ladder = Ladder(load(rules))  # as if earlier runs had earned it
    ladder.standings = {key: Standing(5, 5) for key in ladder.standings}
    (state / "autonomy.json").write_text(json.dumps({"ladder": ladder.snapshot(), "requests": []}))
    with ExitStack() as stack:
        broker = stack.enter_context(
            command(
                tmp_path,
                "broker",
                *("broker", "--port", "0", "--store", str(tmp_path / "broker.sqlite")),
                *("--scenarios", str(SHELBY)),
            )
        )
        (address,) = broker.wait_for(r"broker at (\S+)", 120)
        twins = {
            name: stack.enter_context(
                command(
                    tmp_path,
                    name,
                    *("serve", twin, "--name", name, "--broker", address, "--port", "0"),
                    *("--config", "region=shelby", "--keyring", str(tmp_path / "keyring.yaml")),
                    *("--state", str(tmp_path / f"{name}.state")),
                )
            )
            for name, twin in TWINS.items()
        }
        asyncio.run(asyncio.wait_for(registered(address), 300))
        services = {name: twin.wait_for(r" at (\S+:\d+)", 10)[0] for name, twin in twins.items()}
        start = [sys.executable, "-m", "federation", "start", str(SHELBY / "level5.yaml")]
        started = subprocess.run(
            [*start, "--broker", address, "--pace", str(PACE)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        run = started.stdout.decode().strip()
        control = stack.enter_context(
            command(
                tmp_path,
                "control",
                *("control", run, "--broker", address, "--level", "5", "--port", "0"),
                *("--rules", str(rules), "--keyring", str(tmp_path / "keyring.yaml")),
                *("--key", str(tmp_path / "guard.pem"), "--operator", "duty"),
                *("--optimiser-key", str(tmp_path / "optimiser.pem"), "--state", str(state)),
                *("--ahead-h", "36", "--measure", "plan"),  # as the scenario's `rehearse_h`
                *("--within-s", "120", "--stage-within-s", "40"),
            )
        )
        control.wait_for(r"^(.*committed; .*)$", 720, 2)
        held = asyncio.run(in_force(services, run, identities["guard"]))
        assert 0 < sum(value for value, _ in held) <= 12
        control.process.kill()
        print(*control.lines(), sep="\n")
        until_ns = max(end_ns for _, end_ns in held) + 30 * MINUTE_NS
        assert until_ns < 24 * HOUR_NS
        asyncio.run(asyncio.wait_for(settled(address, run, until_ns), 360))
        assert not asyncio.run(in_force(services, run, identities["guard"]))
        crews = asyncio.run(crews_at_work(address, run))
    assert max(count for _, count in crews) > 0
    assert crews[-1][1] == 0
    records = audit.read(state / "trail")
    assert {r["body"]["mode"] for r in records if r["kind"] == "judged"} == {"loop"}
    turns = [
        r["body"]["detail"] for r in records if r["kind"] == "noted" and r["body"]["what"] == "turn"
    ]
    figures = {
        "outcomes": [turn["outcome"] or turn["why"] for turn in turns],
        "cycles_s": [round(turn["wall_s"], 2) for turn in turns],
        # until what was set has been seen in force: the twins' next step, at the pace of the run
        "watched_s": [round(turn["watched_s"], 2) for turn in turns],
        "median_s": statistics.median(turn["wall_s"] for turn in turns),
        "was_quiet": is_quiet,
        "load": os.getloadavg(),
    }
    print(json.dumps(figures))
    assert figures["outcomes"].count("committed") >= 2
    if is_quiet:
        assert figures["median_s"] <= CYCLE_S
