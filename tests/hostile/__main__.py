"""`python -m tests.hostile`: hostile plans by the thousand, coordinators killed by the hundred, and
one JSON line that says what got through and what was half applied."""

from __future__ import annotations

import argparse
import json
import sys

from federation.loop import run
from tests.hostile.suite import Suite
from tests.kills import kill


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--plans", type=int, default=10_000, metavar="N", help="hostile (10000)")
    parser.add_argument("--safe", type=int, default=1_000, metavar="N", help="safe (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="coordinators (200)")
    options = parser.parse_args()
    suite = Suite(options.seed)
    suite.play(options.plans, options.safe)
    for kind, count in sorted(suite.kinds.items()):
        print(f"{kind}: {count}", file=sys.stderr)
    print("now killing who brings bundles to four twins", file=sys.stderr, flush=True)
    tally = run(kill(options.kills, lanes=4))
    for line in (*suite.breaches[:20], *suite.safe_refused[:20], *tally.half):
        print(line, file=sys.stderr)
    figures = suite.figures() | {"kills": tally.kills, "half_applied": tally.half_applied}
    print(json.dumps(figures))
    wrong = suite.breaches or suite.safe_refused or tally.half_applied or tally.unended
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
