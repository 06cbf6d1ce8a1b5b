"""`python -m tests.chaos`: every fault, one JSON line, and an exit code that says if it holds."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from tests.chaos.faults import Plan
from tests.chaos.plans import named, plans, storm
from tests.chaos.stage import Stage, Verdict, stages

SEED = 5


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    found.add_argument("--only", metavar="NAME", help="the plan, or the plans that begin so")
    found.add_argument("--seed", type=int, default=SEED, help=f"of the runs ({SEED})")
    found.add_argument("--list", action="store_true", help="print the names of all plans")
    found.add_argument(
        "--faults", type=int, default=500, metavar="N", help="add storms until so many (500)"
    )
    found.add_argument("--stages", type=int, default=2, metavar="N", help="runs at a time (2)")
    found.add_argument("--keep", action="store_true", help="keep stores and logs, and say where")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def chaos(
    todo: list[Plan], seed: int, *, faults: int = 0, at_once: int = 2, keep: bool = False
) -> list[Verdict]:
    """Play all plans, then storms until `faults` have fired; how each run ended."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    waiting = deque((plan, seed) for plan in todo)
    storms = itertools.count(1)
    verdicts: list[Verdict] = []

    async def perform(stage: Stage) -> None:
        while True:
            if waiting:
                plan, its_seed = waiting.popleft()
            elif sum(verdict.faults for verdict in verdicts) < faults:
                its_seed = next(storms)
                plan = storm(its_seed)
            else:
                return
            verdict = await stage.play(plan, its_seed)
            verdicts.append(verdict)
            report(verdict, len(verdicts), len(verdicts) + len(waiting))

    try:
        async with stages(folder, min(at_once, len(todo))) as found, asyncio.TaskGroup() as group:
            for stage in found:
                group.create_task(perform(stage))
    finally:
        if keep:
            say(f"stores and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return verdicts


def report(verdict: Verdict, done: int, total: int) -> None:
    missed = f", {verdict.unfired} did not fire" if verdict.unfired > 0 else ""
    say(
        f"  {done}/{total}  {verdict.plan}: {verdict.kind}, {verdict.faults} faults{missed}, "
        f"{verdict.wall_s:.1f} s"
    )
    if verdict.kind == "bad":
        say(f"    again with: python -m tests.chaos --only {verdict.plan} --seed {verdict.seed}")
        for problem in verdict.problems[:12]:
            say(f"    {problem}")


def summary(verdicts: list[Verdict]) -> dict[str, int]:
    kinds = [verdict.kind for verdict in verdicts]
    return {
        "faults": sum(verdict.faults for verdict in verdicts),
        "runs": len(verdicts),
        "as_undisturbed": kinds.count("undisturbed"),
        "as_declared": kinds.count("declared"),
        "lost": sum(verdict.lost for verdict in verdicts),
        "hangs": sum(verdict.is_hung for verdict in verdicts),
    }


def is_good(found: dict[str, int], faults: int) -> bool:
    return (
        found["lost"] == found["hangs"] == 0
        and found["as_undisturbed"] + found["as_declared"] == found["runs"]
        and found["faults"] >= faults
    )


def main() -> int:
    options = parser().parse_args()
    todo = plans(options.seed)
    faults = options.faults
    if options.only:
        storms = [storm(options.seed)] if options.only.startswith("storm") else []
        todo, faults = storms or named(todo, options.only), 0
    if options.list or not todo:
        print("\n".join(plan.name for plan in todo))
        return 0 if todo else 2
    began_s = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        verdicts = asyncio.run(
            chaos(todo, options.seed, faults=faults, at_once=options.stages, keep=options.keep)
        )
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    found = summary(verdicts)
    say(f"{time.monotonic() - began_s:.0f} s")
    print(json.dumps(found))
    return 0 if is_good(found, faults) else 1


if __name__ == "__main__":
    sys.exit(main())
