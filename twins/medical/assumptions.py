"""Reads the declared assumptions of medicine that hold wherever a region says nothing else."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

from federation.twin import Parameter
from twins.regions import declared


@lru_cache(maxsize=1)
def own_assumptions() -> dict[str, Parameter]:
    """Every assumption by name, in file order, as a parameter with its plausible range."""
    path = Path(__file__).with_name("assumptions.csv")
    with path.open(encoding="utf-8", newline="") as lines:
        return declared(csv.DictReader(lines))
