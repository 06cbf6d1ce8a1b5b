"""Measures studies: `python -m benchmarks.studies`, a JSON line per case on standard output.

    startup   `ready_s` from the command to the first run that is done, on workers of its own, and
              `ray_s` of it for Ray to start (a trivial scenario, so the rest is imports)
    engine    `run_ms` of processor time per run of a whole study in one process, tables on disk
              included; `engine_ms` of it for everything but the twins' steps, `study_ms` for
              everything but the runs
    workers   `speedup` of two workers of Ray over one, and `over_process` over this process
              alone: the median of turns, workers warm
    memory    `growth_mib` of all processes together over the last nine tenths of 10,000 short
              runs on two workers, `first_mib` what they held before, `runs_per_s`
    mosaik    `ratio`: our runs a second on two workers over mosaik's in a process pool of two,
              the median of turns, in which both did the same ring
    shelby    `speedup`, `engine_ms` and `study_ms` as above for coupled runs of the region

Standard error hears how it goes on. The ring is that of `benchmarks/__init__.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.ring import ring
from benchmarks.turns import Row, rounded, say
from federation.scenario.course import Course
from federation.scenario.design import design
from federation.scenario.engine import Engine
from federation.scenario.results import read_table
from federation.scenario.spec import Scenario, load
from federation.scenario.study import cases
from federation.studies import PLANNER_FACTORY

RINGS = ((4, 10, 100), (16, 10, 100))
"""Twins, numbers in a vector, steps: as many as make short runs."""

SHELBY = Path("twins/regions/shelby/earthquake.yaml")


def startup(repeat: int) -> Iterator[Row]:
    ready, rays = [], []
    with _folder() as folder:
        path = folder / "one.yaml"
        members = {"m": {"class": "benchmarks.ring_twin:RingTwin", "config": {"size": 1}}}
        loop = [{"from": "m.after", "to": "m.before", "delay_min": 1}]
        document = {"name": "one", "region": "nowhere", "horizon_h": 0.1}
        document |= {"members": members, "couplings": loop}
        path.write_text(json.dumps(document), encoding="utf-8")
        for _ in range(repeat):
            command = [sys.executable, "-m", "federation", "run", str(path), "--runs", "4"]
            command += ["--workers", "2", "--out", str(folder / "out")]
            began_s = time.perf_counter()
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr is not None
                for line in process.stderr:
                    if line.strip().startswith("1/"):
                        ready.append(time.perf_counter() - began_s)
                        break
                process.communicate()
            began_s = time.perf_counter()
            with Engine(Scenario.model_validate(document), PLANNER_FACTORY, 2).up():
                rays.append(time.perf_counter() - began_s)
    yield {"ready_s": rounded(median(ready)), "ray_s": rounded(median(rays))}


def engine(repeat: int) -> Iterator[Row]:
    for n, m, t in RINGS:
        yield {"n": n, "m": m, "t": t, **_engine(ring(n, m, t), 500, repeat, "none")}


def _engine(scenario: Scenario, runs: int, repeat: int, measure: str) -> Row:
    """What a study of so many runs costs per run, in this process, tables included."""
    found: list[tuple[float, float, float]] = []
    for turn in range(repeat + 1):  # the first fills caches
        with _folder() as folder:
            began_s = time.process_time()
            course = Course(design(scenario, measures=[measure], runs=runs), folder)
            for finding in Engine(scenario, PLANNER_FACTORY).findings(
                course.todo(), keep=lambda case: case.run == 0
            ):
                course.take(finding)
            rows = course.gather()
            cpu_s = time.process_time() - began_s
        inside = sum(row["cpu_s"] for row in rows)
        twins = sum(
            v for r in rows for k, v in r.items() if k[:5] == "cost." and k[-6:] == ".cpu_s"
        )
        if turn:
            found.append((cpu_s / runs, (cpu_s - twins) / runs, (cpu_s - inside) / runs))
    figures = (1e3 * median(column) for column in zip(*found, strict=True))
    return dict(zip(("run_ms", "engine_ms", "study_ms"), map(rounded, figures), strict=True))


def workers(repeat: int) -> Iterator[Row]:
    yield {"n": 16, "m": 10, "t": 1000, **_workers(ring(16, 10, 1000), 60, repeat, "none")}


def _workers(scenario: Scenario, runs: int, repeat: int, measure: str) -> Row:
    """Speeds of two workers, one, and none, in turns; Ray starts anew for each number."""
    todo = cases(scenario, [measure], runs, 1)
    alone = Engine(scenario, PLANNER_FACTORY)
    speedups, over = [], []
    for turn in range(repeat):
        seconds = {}
        for count in (1, 2) if turn % 2 else (2, 1):
            spread = Engine(scenario, PLANNER_FACTORY, count, "local")
            with spread.up():
                list(spread.findings(todo[: 4 * count]))  # workers start, twins compile
                seconds[count] = _seconds(spread, todo)
        seconds[0] = _seconds(alone, todo)
        speedups.append(seconds[1] / seconds[2])
        over.append(seconds[0] / seconds[2])
        say(f"workers, turn {turn + 1} of {repeat}: {speedups[-1]:.2f}")
    return {"speedup": rounded(median(speedups)), "over_process": rounded(median(over))}


def _seconds(engine: Engine, todo: Sequence[Any]) -> float:
    began_s = time.perf_counter()
    for finding in engine.findings(todo):
        if finding.failure is not None:
            raise finding.failure
    return time.perf_counter() - began_s


def memory(repeat: int) -> Iterator[Row]:
    runs = 10_000
    scenario = ring(4, 10, 20)
    with _folder() as folder:
        course = Course(design(scenario, runs=runs), folder)
        spread = Engine(scenario, PLANNER_FACTORY, 2)
        first_mib = last_mib = 0.0
        began_s = time.perf_counter()
        with spread.up():
            for finding in spread.findings(course.todo(), keep=lambda case: case.run == 0):
                course.take(finding)
                if course.done == runs // 10:
                    first_mib = _held_mib()
            seconds = time.perf_counter() - began_s
            last_mib = _held_mib()
        assert len(course.gather()) == runs == read_table(folder, "runs").num_rows
    yield {
        "runs": runs,
        "first_mib": round(first_mib),
        "growth_mib": rounded(last_mib - first_mib),
        "runs_per_s": rounded(runs / seconds),
    }


def _held_mib() -> float:
    """What this process and Ray's workers hold for themselves; pages of a store are shared."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            if process == me or "ray::" in process.name() or "ray::" in "".join(process.cmdline()):
                total += process.memory_full_info().uss / (1 << 20)
        except psutil.NoSuchProcess:
            continue
    return total


def mosaik(repeat: int) -> Iterator[Row]:
    if not find_spec("mosaik"):
        say("mosaik is not here and left out; multitwin[bench] brings it")
        return
    for n, m, t in RINGS:
        ours, theirs, ratios = [], [], []
        scenario = ring(n, m, t)
        spread = Engine(scenario, PLANNER_FACTORY, 2)
        with spread.up(), ProcessPoolExecutor(2) as pool:
            size = 200
            list(spread.findings(cases(scenario, ["none"], 1000, 1)))
            list(pool.map(_mosaik_ring, [(n, m, t)] * 20, chunksize=5))
            for turn in range(repeat):
                todo = cases(scenario, ["none"], 20 * size, turn)
                ours.append(len(todo) / _seconds(spread, todo))
                began_s = time.perf_counter()
                list(pool.map(_mosaik_ring, [(n, m, t)] * size, chunksize=10))
                theirs.append(size / (time.perf_counter() - began_s))
                ratios.append(ours[-1] / theirs[-1])
                say(f"ring {n}x{m}, {t} steps, runs/s: {ours[-1]:,.0f}, mosaik {theirs[-1]:,.0f}")
        yield {
            "n": n,
            "m": m,
            "t": t,
            "runs_per_s": rounded(median(ours)),
            "mosaik_runs_per_s": rounded(median(theirs)),
            "ratio": rounded(median(ratios)),
        }


def _mosaik_ring(size: tuple[int, int, int]) -> None:
    """A run of the ring in mosaik as a study needs it: its world is built, runs and ends."""
    import numpy as np

    from benchmarks import ring_mosaik

    n, m, t = size
    config: Any = {"Ring": {"python": "benchmarks.ring_mosaik:RingSimulator"}}
    ring_mosaik._run(config, ["Ring"] * n, np.zeros(m), t)


def shelby(repeat: int) -> Iterator[Row]:
    scenario = load(SHELBY)
    row = _engine(scenario, 4, min(repeat, 1), "none")
    yield {**row, **_workers(scenario, 8, min(repeat, 2), "none")}


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "startup": startup,
    "engine": engine,
    "workers": workers,
    "memory": memory,
    "mosaik": mosaik,
    "shelby": shelby,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="this case; may be repeated (all)"
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="turns of each (3)")
    options = parser.parse_args()
    if options.repeat < 1:
        parser.error("--repeat must be 1 or more")
    for name in options.only or PARTS:
        say(name)
        for row in PARTS[name](options.repeat):
            print(json.dumps({"case": name, **row}), flush=True)


if __name__ == "__main__":
    main()
