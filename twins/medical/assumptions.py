"""Reads the declared assumptions of medicine that hold wherever a region says nothing else."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

from federation.twin import Parameter


@lru_cache(maxsize=1)
def own_assumptions() -> dict[str, Parameter]:
    """Every assumption by name, in file order, as a parameter with its plausible range."""
    path = Path(__file__).with_name("assumptions.csv")
    with path.open(encoding="utf-8", newline="") as lines:
        return {
            row["name"]: Parameter(
                name=row["name"],
                unit=row["unit"],
                default=float(row["value"]),
                low=float(row["low"]),
                high=float(row["high"]),
                doc=row["reason"],
                source=row["source"],
            )
            for row in csv.DictReader(lines)
        }
