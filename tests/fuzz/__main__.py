"""`python -m tests.fuzz`: inputs by the million, RPCs by the hundred thousand, one JSON line.

First every decoder is fed by a fuzzer that sees what each input reaches (`decoders.py`), then a
live broker and a live twin get odd requests (`calls.py`). Code 1 when anything crashed, hung, or
failed without a reason.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from federation.loop import run
from tests.fuzz.calls import Tally, call
from tests.fuzz.decoders import DECODERS

_DONE = re.compile(r"Done (\d+) runs")
_AT = re.compile(r"^#(\d+)", re.MULTILINE)

HANG_CODES = (70,)
"""What libFuzzer ends with when an input took too long."""


def decode(name: str, runs: int, seed: int) -> tuple[int, bool, bool]:
    """Inputs that one decoder was fed, whether it crashed, and whether it hung."""
    command = [sys.executable, "-m", "tests.fuzz.decoders", name]
    command += ["--runs", str(runs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _DONE.search(done.stderr)
    fed = int(found[1]) if found else max(map(int, _AT.findall(done.stderr)), default=0)
    hung = done.returncode in HANG_CODES
    crashed = not hung and (done.returncode != 0 or found is None)
    if hung or crashed:
        print(f"{name}: {'hung' if hung else 'crashed'}", file=sys.stderr)
        print("\n".join(done.stdout.splitlines()[-40:]), file=sys.stderr)
        print("\n".join(done.stderr.splitlines()[-40:]), file=sys.stderr)
    return fed, crashed, hung


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_050_000, metavar="N", help="(1050000)")
    parser.add_argument("--rpcs", type=int, default=100_000, metavar="N", help="(100000)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    parser.add_argument("--only", action="append", choices=DECODERS, help="feed these decoders")
    options = parser.parse_args()
    names = options.only or list(DECODERS)
    each = -(-options.inputs // len(names))
    inputs = crashes = hangs = 0

    def feed(name: str) -> tuple[str, float, tuple[int, bool, bool]]:
        began_s = time.perf_counter()
        found = decode(name, each, options.seed)
        return name, time.perf_counter() - began_s, found

    with ThreadPoolExecutor(2) as pool:
        for name, seconds, (fed, crashed, hung) in pool.map(feed, names):
            inputs, crashes, hangs = inputs + fed, crashes + crashed, hangs + hung
            print(f"{name}: {fed} inputs in {seconds:.0f} s", file=sys.stderr, flush=True)

    def progress(tally: Tally) -> None:
        print(f"{tally.rpcs} RPCs: {dict(tally.codes)}", file=sys.stderr, flush=True)

    tally = run(call(options.rpcs, options.seed, progress))
    for line in tally.wrong[:40]:
        print(line, file=sys.stderr)
    figures = {
        "decoder_inputs": inputs,
        "rpcs": tally.rpcs,
        "crashes": crashes + tally.crashes,
        "hangs": hangs + tally.hangs,
        "internal": tally.internal,
    }
    print(json.dumps(figures))
    return int(any(figures[what] for what in ("crashes", "hangs", "internal")))


if __name__ == "__main__":
    sys.exit(main())
