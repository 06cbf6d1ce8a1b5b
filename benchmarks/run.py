"""Runs every benchmark, alternating between contenders: `python -m benchmarks.run`.

One JSON line per case goes to standard output, a table to standard error. `steps_per_s` counts
the steps of all twins, `values_per_s` the numbers that they passed on; both are medians. A
ratio is that of speeds, ours over the peer's: the median of those of single rounds, in which
both ran right after each other. Ours is the time of a whole run with its ledger and digest
(and, over sockets, its store); a peer's is that of its time loop alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from federation.__main__ import planner
from federation.scenario.run import Outcome, run_local
from federation.scenario.spec import load
from federation.scenario.study import cases

SHELBY = Path(__file__).parent.parent / "twins/regions/shelby/earthquake.yaml"
MEASURES = ("none", "nearest", "plan")

OWN = "multitwin"
CONTENDERS = {
    OWN: "benchmarks.ring",
    "mosaik": "benchmarks.ring_mosaik",
    "helics": "benchmarks.ring_helics",
}

TIMEOUT_S = 120.0
"""How long one run of a ring may take, the start of its processes included."""


@dataclass(frozen=True, slots=True)
class Ring:
    """A size of the ring, and who runs it."""

    mode: str
    n: int
    m: int
    t: int
    contenders: tuple[str, ...]


RINGS = (
    *(Ring("local", n, 10, 16_000 // n, tuple(CONTENDERS)) for n in (4, 16, 64)),
    Ring("grpc", 4, 10, 1_000, (OWN, "helics")),
)


class ContenderError(Exception):
    """A contender did not finish; says how."""


def seconds(contender: str, ring: Ring) -> float:
    """One run in a process of its own, which is ended with all that it started."""
    command = [sys.executable, "-m", CONTENDERS[contender], ring.mode]
    size = map(str, (ring.n, ring.m, ring.t))
    with subprocess.Popen(
        [*command, *size], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException as failure:
            _kill(process.pid)
            if isinstance(failure, subprocess.TimeoutExpired):
                raise ContenderError(f"no end within {TIMEOUT_S:g} s") from None
            raise
    if process.returncode:
        raise ContenderError((errors.strip().splitlines() or [f"code {process.returncode}"])[-1])
    return float(out.split()[-1])


def _kill(pid: int) -> None:
    root = psutil.Process(pid)
    for process in (*root.children(recursive=True), root):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def run_ring(ring: Ring, repeat: int) -> dict[str, Any]:
    """All rounds of one case. A peer that fails is left out, and said so; ours ends it all."""
    found: dict[str, list[float]] = {c: [] for c in ring.contenders if _is_installed(c)}
    for turn in range(repeat):
        names = list(found)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                found[name].append(seconds(name, ring))
            except ContenderError as failure:
                say(f"{name}, ring {ring.mode} n={ring.n}: {failure}; left out")
                if name == OWN:
                    raise SystemExit(1) from None
                del found[name]
    steps = ring.n * ring.t
    speeds = {name: steps / median(spent) for name, spent in found.items()}
    peers = {
        name: {"version": version(name), "steps_per_s": round(speeds[name])}
        for name in found
        if name != OWN
    }
    ratios = {
        name: round(median(p / o for p, o in zip(found[name], found[OWN], strict=True)), 3)
        for name in peers
    }
    return {
        "case": "ring",
        "mode": ring.mode,
        "n": ring.n,
        "m": ring.m,
        "t": ring.t,
        "repeat": repeat,
        "steps_per_s": round(speeds[OWN]),
        "values_per_s": round(speeds[OWN] * ring.m),
        "peers": peers,
        "ratios": ratios,
    }


def _is_installed(contender: str) -> bool:
    return contender == OWN or importlib.util.find_spec(contender) is not None


def run_shelby(repeat: int) -> list[dict[str, Any]]:
    """The earthquake under each measure, in this process, after one run that is not counted.

    `rest` is what no member's step took: coupling, ledger, opening, and preparing plans.
    """
    scenario = load(SHELBY)
    todo = cases(scenario, MEASURES, 1, scenario.seed)
    outcomes: dict[str, list[Outcome]] = {measure: [] for measure in MEASURES}
    for turn in range(repeat + 1):
        for case in todo:
            outcome = run_local(scenario, case, planner)
            if turn:
                outcomes[case.measure].append(outcome)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        {
            "case": "shelby",
            "measure": measure,
            "horizon_h": scenario.horizon_h,
            "repeat": repeat,
            "wall_s": round(median(o.wall_s for o in found), 3),
            "cpu_s": round(median(o.cpu_s for o in found), 3),
            "cpu_s_by_member": {
                **{
                    name: round(median(o.costs[name].cpu_s for o in found), 3)
                    for name in found[0].costs
                },
                "rest": round(median(map(_rest_s, found)), 3),
            },
            "peak_rss_mib": round(peak_mib),
        }
        for measure, found in outcomes.items()
    ]


def _rest_s(outcome: Outcome) -> float:
    return outcome.cpu_s - sum(cost.cpu_s for cost in outcome.costs.values())


def ring_table(rows: list[dict[str, Any]]) -> str:
    peers = [name for name in CONTENDERS if name != OWN]
    lines = [
        f"{'ring':<22}{OWN + '/s':>12}" + "".join(f"{p + '/s':>12}{'ratio':>8}" for p in peers)
    ]
    for row in rows:
        line = f"{row['mode']:<10}n={row['n']:<3} m={row['m']:<4}{row['steps_per_s']:>12,}"
        for peer in peers:
            if peer in row["peers"]:
                line += f"{row['peers'][peer]['steps_per_s']:>12,}{row['ratios'][peer]:>8.2f}"
            else:
                line += f"{'-':>12}{'-':>8}"
        lines.append(line)
    return "\n".join(lines)


def shelby_table(rows: list[dict[str, Any]]) -> str:
    members: Mapping[str, float] = rows[0]["cpu_s_by_member"]
    head = f"{'shelby 72 h, CPU s':<22}" + "".join(f"{name:>10}" for name in members)
    lines = [f"{head}{'all':>10}{'wall s':>10}"]
    for row in rows:
        spent = "".join(f"{s:>10.3f}" for s in row["cpu_s_by_member"].values())
        lines.append(f"{row['measure']:<22}{spent}{row['cpu_s']:>10.3f}{row['wall_s']:>10.3f}")
    lines.append(f"peak resident memory {rows[0]['peak_rss_mib']} MiB")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (5)")
    parser.add_argument("--only", choices=("local", "grpc", "shelby"), help="this part alone (all)")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    tables = []
    rings = [ring for ring in RINGS if options.only in (None, ring.mode)]
    if rings:
        for peer in (c for c in CONTENDERS if not _is_installed(c)):
            say(f"{peer} is not installed and left out; multitwin[bench] brings it")
        rows = []
        for ring in rings:
            say(f"ring {ring.mode} n={ring.n} m={ring.m} t={ring.t}")
            rows.append(run_ring(ring, options.repeat))
            print(json.dumps(rows[-1]), flush=True)
        tables.append(ring_table(rows))
    if options.only in (None, "shelby"):
        say("shelby")
        rows = run_shelby(options.repeat)
        for row in rows:
            print(json.dumps(row), flush=True)
        tables.append(shelby_table(rows))
    say("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
