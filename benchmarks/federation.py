"""Measures the federation beside its peers, taking turns: `python -m benchmarks.federation`.

The parts `local` (all twins in one process) and `grpc` (a process for each twin) are the ring of
`benchmarks/__init__.py`, and answer on standard output with one JSON line per case:

    mode, n, m, t    `local` or `grpc`, twins, numbers in a vector, steps of our last run
    steps_per_s      coupled rounds a second, in which every twin has stepped once
    values_per_s     numbers that twins passed on to each other a second
    cpu_s            processor seconds of all our processes together during the t steps
    rss_mib          sum of the resident sets of our processes, shared pages counted in each
    ratios           our rounds a second over the contender's: the median of those of single
                     turns, in which both ran right after each other

The other parts, whose lines have a `case`, are described in `benchmarks/parts.py`. Standard error
hears how it goes on, and at the end gets a table of all rings. Peers are configured as fast as
their documentation allows (see `ring_helics.py`, `ring_mosaik.py`). Every contender runs in
processes of its own, for about a second of steps after a warm-up; a peer that is not installed or
fails is left out and said so, and when ours fails all ends with code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

from benchmarks.parts import PARTS
from benchmarks.turns import (
    CONTENDERS,
    OWN,
    ContenderError,
    Row,
    Runner,
    ratios,
    rounded,
    say,
    take_turns,
)

UNUSUAL = ("helics-ipc-vector",)
"""Contenders that only run when they are asked for, to save time."""

Speeds = dict[str, float]

CASES = ((4, 10), (16, 10), (64, 10), (4, 1_000), (16, 1_000), (4, 100_000))


def ring(mode: str, n: int, m: int, names: Sequence[str], repeat: int) -> tuple[Row, Speeds]:
    """One case of the ring: its JSON line, and everyone's rounds a second."""
    where = f"ring {mode} {n}x{m:,}"
    runners = {}
    for name, contender in CONTENDERS[mode].items():
        if name not in names or not contender.is_here:
            continue
        if m > contender.most_values:
            say(f"{where}: {name} is left out: more than {contender.most_values:,} publications")
            continue
        runners[name] = Runner(contender, n, m)
    take_turns(runners, repeat, where)
    own = runners[OWN]
    speed = median(own.rounds_per_s)
    cpu_s = median(cost.cpu_s for cost in own.costs) * own.t
    rss_mib = median(cost.rss_mib for cost in own.costs)
    row = {
        "mode": mode,
        "n": n,
        "m": m,
        "t": own.t,
        "steps_per_s": rounded(speed),
        "values_per_s": rounded(speed * n * m),
        "cpu_s": None if math.isnan(cpu_s) else rounded(cpu_s),
        "rss_mib": None if math.isnan(rss_mib) else round(rss_mib),
        "ratios": ratios(runners),
    }
    return row, {name: median(runner.rounds_per_s) for name, runner in runners.items()}


def table(mode: str, rows: Sequence[tuple[Row, Speeds]]) -> str:
    """The rings of a mode: coupled rounds a second and, below, ours over the contender's."""
    names = [name for name in CONTENDERS[mode] if any(name in speeds for _, speeds in rows)]
    widths = [max(9, len(name)) + 2 for name in names]
    title = f"{mode}, rounds/s"
    lines = [f"{title:<18}" + "".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))]
    for row, speeds in rows:
        size = f"{row['n']}x{row['m']:,}"
        cells = [f"{speeds[name]:,.0f}" if name in speeds else "-" for name in names]
        shares = [f"{row['ratios'][n]:.3g}x" if n in row["ratios"] else "" for n in names]
        for head, line in ((size, cells), ("", shares)):
            lines.append(
                f"{head:<18}" + "".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True))
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.federation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = (*CONTENDERS, *PARTS)
    contenders = [name for mode in CONTENDERS.values() for name in mode if name not in UNUSUAL]
    parser.add_argument(
        "--only", action="append", choices=every, help="this part; may be repeated (all)"
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument(
        "--cases",
        type=_cases,
        default=CASES,
        metavar="NxM,...",
        help=f"sizes of the ring ({','.join(f'{n}x{m}' for n, m in CASES)})",
    )
    parser.add_argument(
        "--contenders",
        type=_contenders,
        default=contenders,
        metavar="NAME,...",
        help=f"who runs the ring beside {OWN} ({','.join(dict.fromkeys(contenders))})",
    )
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _measure(options, options.only or every)
    except ContenderError as failure:
        say(f"{OWN} failed: {failure}")
        raise SystemExit(1) from None


def _measure(options: argparse.Namespace, parts: Sequence[str]) -> None:
    tables = []
    peers = (name for name in ("helics", "mosaik") if find_spec(name))
    say(", ".join(f"{name} {version(name)}" for name in peers))
    for mode in (mode for mode in CONTENDERS if mode in parts):
        for name, contender in CONTENDERS[mode].items():
            if name in options.contenders and not contender.is_here:
                say(f"{name} is not here and left out; multitwin[bench] brings HELICS and mosaik")
        rings = []
        for n, m in options.cases:
            rings.append(ring(mode, n, m, options.contenders, options.repeat))
            print(json.dumps(rings[-1][0]), flush=True)
        tables.append(table(mode, rings))
    for name in (name for name in PARTS if name in parts):
        say(name)
        for row in PARTS[name](options.repeat):
            print(json.dumps({"case": name, **row}), flush=True)
    say("\n" + "\n\n".join(tables))


def _cases(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(map(int, case.split("x"))) for case in text.split(",")]
        return [(n, m) for n, m in pairs if n > 1 and m > 0]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 4x10,16x1000") from None


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    known = {name for mode in CONTENDERS.values() for name in mode}
    if unknown := set(names) - known:
        raise argparse.ArgumentTypeError(f"nobody is called {', '.join(sorted(unknown))}")
    return [OWN, *names]


if __name__ == "__main__":
    main()
