"""Packs what a reference run did at every place, hour by hour, small enough for a page."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from federation.twin import HOUR_NS

MOST_PLACES = 3_000
"""A kind with more places than this is not drawn."""

MOST_ENDS = 600
"""Ends of lines are looked for among kinds of at most so many places."""

MIDDLE_TOLERANCE_DEG = 2e-6
"""Twice the rounding of places to six decimals: about 0.2 m."""

SHORTEST_LINE_DEG = 5e-4
"""About 50 m: a shorter thing is drawn as a point."""

Places = NDArray[np.float64]
"""Longitude and latitude in degrees, a row per place."""

Points = list[tuple[int, NDArray[np.float64]]]
"""`(hour from which it holds, value)` of one variable in one run."""


@dataclass
class Layer:
    """All places of one kind and every output over them that some member publishes."""

    kind: str
    domain: str
    ids: list[str]
    names: list[str]
    places: Places
    lines: list[list[float] | None] = field(default_factory=list)
    variables: list[dict[str, Any]] = field(default_factory=list)

    def packed(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "domain": self.domain,
            "ids": self.ids,
            "names": self.names,
            "places": [[round(x, 6), round(y, 6)] for x, y in self.places.tolist()],
            "lines": self.lines if any(self.lines) else [],
            "variables": self.variables,
        }


def layers(
    descriptions: Mapping[str, Mapping[str, Any]], folder: Path, measures: Sequence[str], hours: int
) -> list[dict[str, Any]]:
    """Every layer that a map can show, with values at hours 0 to `hours` of each measure."""
    found = _places(descriptions)
    wanted = {
        (member, variable["name"]): (layer, variable)
        for layer in found.values()
        for member, description in descriptions.items()
        for variable in description["variables"]
        if variable["kind"] == layer.kind and variable["causality"] == "output"
    }
    names = sorted({name for _, name in wanted})
    frames = {
        m: _frames(folder / "reference" / m / "ledger.parquet", names, hours) for m in measures
    }
    for (member, name), (layer, variable) in wanted.items():
        own = [e["id"] for e in descriptions[member]["entities"] if e["kind"] == layer.kind]
        at = {id_: index for index, id_ in enumerate(own)}
        order = np.array([at.get(id_, -1) for id_ in layer.ids])
        start = np.full(len(own), float(variable["initial"] or 0.0))
        series = {m: _ordered(f.get((member, name), []), start, order) for m, f in frames.items()}
        layer.variables.append(
            {
                "key": f"{member}.{name}",
                "name": name,
                "unit": variable["unit"],
                "doc": variable["doc"],
                "domain": descriptions[member]["domain"],
                "bounds": [variable["low"], variable["high"]],
                **pack(series, hours),
            }
        )
    drawn = [layer for layer in found.values() if layer.variables]
    ends = [e.places for e in found.values() if len(e.places) <= MOST_ENDS]
    if not ends:
        return [layer.packed() for layer in drawn]
    halfway = Halfway(np.concatenate(ends))
    for layer in drawn:
        layer.lines = halfway.lines(layer.places)
    return [layer.packed() for layer in drawn]


def _places(descriptions: Mapping[str, Mapping[str, Any]]) -> dict[str, Layer]:
    """The places of every kind; a kind that several members share is one layer."""
    found: dict[str, dict[str, tuple[str, float, float]]] = {}
    domains: dict[str, str] = {}
    for description in descriptions.values():
        for e in description["entities"]:
            if e["lon_deg"] is None or e["lat_deg"] is None or ">" in e["id"]:
                continue  # an id with ">" is a way between two places, not a place
            domains.setdefault(e["kind"], description["domain"])
            mine = found.setdefault(e["kind"], {})
            if e["id"] not in mine or not mine[e["id"]][0]:
                mine[e["id"]] = (e["name"], e["lon_deg"], e["lat_deg"])
    return {
        kind: Layer(
            kind,
            domains[kind],
            list(mine),
            [name for name, _, _ in mine.values()],
            np.array([[lon, lat] for _, lon, lat in mine.values()]),
        )
        for kind, mine in found.items()
        if len(mine) <= MOST_PLACES
    }


class Halfway:
    """The points halfway between any two places, to find the ends of what is drawn as a line.

    Members give every entity as one point; a road, main or power line has its middle as
    its place, so that its ends are the one pair of places with that middle.
    """

    def __init__(self, places: Places) -> None:
        self._ends = np.unique(places, axis=0)
        first, second = np.triu_indices(len(self._ends), 1)
        self._length = np.hypot(*(self._ends[first] - self._ends[second]).T)
        far = self._length >= SHORTEST_LINE_DEG
        self._first, self._second, self._length = first[far], second[far], self._length[far]
        self._tree = cKDTree((self._ends[self._first] + self._ends[self._second]) / 2)

    def lines(self, places: Places) -> list[list[float] | None]:
        """The two ends for each place, or None for what has none and stays a point.

        Of several pairs the nearest counts. One or two matches are taken for chance.
        """
        found: list[list[float] | None] = []
        for place in places:
            near = self._tree.query_ball_point(place, MIDDLE_TOLERANCE_DEG, p=np.inf)
            if not near:
                found.append(None)
                continue
            best = min(near, key=lambda pair: float(self._length[pair]))
            line = [*self._ends[self._first[best]], *self._ends[self._second[best]]]
            found.append([round(float(v), 6) for v in line])
        return found if sum(line is not None for line in found) >= 3 else [None] * len(places)


def _frames(path: Path, names: Sequence[str], hours: int) -> dict[tuple[str, str], Points]:
    """The last value of each hour for each `(owner, variable)`."""
    table = pq.read_table(
        path,
        columns=["time_ns", "owner", "variable", "value"],
        filters=[("variable", "in", names)] if names else None,
    )
    times = table["time_ns"].to_numpy()
    found: dict[tuple[str, str], Points] = {}
    keys = list(zip(table["owner"].to_pylist(), table["variable"].to_pylist(), strict=True))
    rows: dict[tuple[str, str], dict[int, int]] = {}
    for row, (key, time_ns) in enumerate(zip(keys, times.tolist(), strict=True)):
        hour = -(-time_ns // HOUR_NS)
        if hour <= hours:
            rows.setdefault(key, {})[hour] = row  # the ledger is in order: the last one counts
    column = table["value"].combine_chunks()
    for key, last in rows.items():
        size = len(column[next(iter(last.values()))])
        if size <= MOST_PLACES:
            found[key] = [(h, column[r].values.to_numpy()) for h, r in sorted(last.items())]
    return found


def _ordered(
    points: Iterable[tuple[int, NDArray[np.float64]]],
    start: NDArray[np.float64],
    order: NDArray[np.int64],
) -> Points:
    """Values in the order of the layer, NaN where the member does not know an entity."""
    held = dict(points)
    if 0 not in held:
        held[0] = start
    return [(h, np.where(order < 0, np.nan, v[order])) for h, v in sorted(held.items())]


def pack(
    series: Mapping[str, Sequence[tuple[int, NDArray[np.float64]]]], hours: int
) -> dict[str, Any]:
    """Quantise the frames of one variable, keeping each different frame once.

    `rows` is base64 of little-endian unsigned integers of `bits`; the value is
    `low + step * integer`, the highest integer means that there is none. `frames[measure]`
    names the row of each hour.
    """
    values = np.array([v for points in series.values() for _, v in points])
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    whole = bool((known == np.round(known)).all()) and high - low < 255
    bits, most = (8, 254) if whole else (16, 65_534)
    step = 1.0 if whole else (high - low) / most or 1.0
    steps = np.round((values - low) / step)
    codes = np.where(np.isfinite(values), steps, most + 1).astype("<u1" if whole else "<u2")
    index: dict[bytes, int] = {}
    position = 0
    frames: dict[str, list[int]] = {}
    for measure, points in series.items():
        held = {}
        for hour, _ in points:
            held[hour] = index.setdefault(codes[position].tobytes(), len(index))
            position += 1
        row = 0
        frames[measure] = [row := held.get(hour, row) for hour in range(hours + 1)]
    return {
        "bits": bits,
        "low": low,
        "step": step,
        "range": [low, high],
        "frames": frames,
        "rows": base64.b64encode(b"".join(index)).decode(),
    }
