"""`python -m tests.hostile`: hostile plans by the thousand, and one JSON line that says what got
through."""

from __future__ import annotations

import argparse
import json
import sys

from tests.hostile.suite import Suite


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--plans", type=int, default=10_000, metavar="N", help="hostile (10000)")
    parser.add_argument("--safe", type=int, default=1_000, metavar="N", help="safe (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    options = parser.parse_args()
    suite = Suite(options.seed)
    suite.play(options.plans, options.safe)
    for line in (*suite.breaches[:20], *suite.safe_refused[:20]):
        print(line, file=sys.stderr)
    for kind, count in sorted(suite.kinds.items()):
        print(f"{kind}: {count}", file=sys.stderr)
    print(json.dumps(suite.figures()))
    return 1 if suite.breaches or suite.safe_refused else 0


if __name__ == "__main__":
    sys.exit(main())
