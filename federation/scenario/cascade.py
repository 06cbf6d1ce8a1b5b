"""What most often led to what, over all runs of a study: one graph of kinds of events."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import networkx as nx
import pyarrow.compute as pc

from federation.scenario.archive import Study

MOST_EDGES = 400


def graph(study: Study, measure: str) -> nx.DiGraph[str]:
    """Kinds of events as `domain/kind`; an edge counts how often one caused the other (`count`)
    and in how many runs (`runs`)."""
    found: nx.DiGraph[str] = nx.DiGraph()
    for (cause, effect), (runs, count) in _counted(study, measure, is_path=False).items():
        found.add_edge(cause, effect, runs=runs, count=count)
    return found


def frequent(study: Study, measure: str, most: int) -> dict[str, Any]:
    """The graph's edges and the paths through it, those in most runs first.

    A path are the kinds along the longest chain of causes to an event that caused no other; its
    `count` is how many such events there are.
    """
    edges = graph(study, measure)
    paths = _counted(study, measure, is_path=True)
    runs = len(study.good(measure))
    return {
        "measure": measure,
        "runs": runs,
        "nodes": sorted(edges),
        "edges": [
            {"cause": cause, "effect": effect, **figures}
            for cause, effect, figures in sorted(
                edges.edges(data=True), key=lambda e: (-e[2]["runs"], -e[2]["count"], e[0], e[1])
            )[:MOST_EDGES]
        ],
        "paths": [
            {"kinds": list(kinds), "runs": in_runs, "count": count}
            for kinds, (in_runs, count) in sorted(
                paths.items(), key=lambda p: (-p[1][0], -p[1][1], p[0])
            )[:most]
        ],
    }


def _counted(
    study: Study, measure: str, *, is_path: bool
) -> dict[tuple[str, ...], tuple[int, int]]:
    """Per sequence of kinds: in how many runs it is, and how often."""
    table = study.cascade
    chosen = table.filter(
        pc.and_(pc.equal(table["measure"], measure), pc.equal(table["is_path"], is_path))
    )
    found: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    kinds, counts = chosen["kinds"].to_pylist(), chosen["count"].to_pylist()
    for path, count in zip(kinds, counts, strict=True):
        figures = found[tuple(path)]
        figures[0] += 1
        figures[1] += count
    return {path: (runs, count) for path, (runs, count) in found.items()}
