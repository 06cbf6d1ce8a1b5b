"""Finds the data of a region, which all domain twins share, and reads what they have in common."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from federation.errors import Reason, ScenarioError
from federation.twin import Parameter

REGIONS = Path(__file__).parent


def region_file(region: str, name: str) -> Path:
    """The path of one data file of a region; raises `MISSING_FILE` if there is none."""
    path = REGIONS / region / name
    if not path.is_file():
        raise ScenarioError(
            Reason.MISSING_FILE,
            f"region {region!r} has no file {name!r}",
            {"region": region, "file": name},
        )
    return path


@lru_cache(maxsize=64)
def region_rows(region: str, name: str) -> tuple[dict[str, str], ...]:
    """The rows of one CSV file of a region as text, in file order; do not change them."""
    with region_file(region, name).open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(lines))


def optional_rows(region: str, name: str) -> tuple[dict[str, str], ...]:
    """The rows of a file that a region may do without; none if it does."""
    return region_rows(region, name) if (REGIONS / region / name).is_file() else ()


@lru_cache(maxsize=8)
def assumptions(region: str) -> dict[str, Parameter]:
    """Every declared assumption of a region by name, as a parameter with its plausible range."""
    return declared(region_rows(region, "assumptions.csv"))


def declared(rows: Iterable[Mapping[str, str]]) -> dict[str, Parameter]:
    """The parameters that the rows of an `assumptions.csv` declare, by name, in their order."""
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
        for row in rows
    }


@lru_cache(maxsize=8)
def scene_routes(region: str) -> tuple[tuple[str, str], ...]:
    """Ways from every base of ambulances (post or hospital) to every zone, as road nodes."""
    bases = _road_nodes(region, "ambulance_posts.csv", "hospitals.csv")
    scenes = _road_nodes(region, "zones.csv")
    return tuple((base, scene) for base in bases for scene in scenes)


@lru_cache(maxsize=8)
def hospital_routes(region: str) -> tuple[tuple[str, str], ...]:
    """Ways from every scene, and from every hospital for transfers, to every hospital."""
    origins = _road_nodes(region, "zones.csv", "hospitals.csv")
    hospitals = _road_nodes(region, "hospitals.csv")
    return tuple((origin, hospital) for origin in origins for hospital in hospitals)


@lru_cache(maxsize=8)
def data_hash(region: str) -> str:
    """SHA-256 over the names and contents of all data files of a region, in name order."""
    digest = hashlib.sha256()
    for path in sorted((REGIONS / region).iterdir()):
        if path.suffix in {".csv", ".inp", ".json"}:
            digest.update(path.name.encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _road_nodes(region: str, *names: str) -> tuple[str, ...]:
    nodes = (row["road_node"] for name in names for row in region_rows(region, name))
    return tuple(dict.fromkeys(nodes))
