"""A city with power to spare at a price: plants with a store, the homes that they feed, a tie line
by which others may be helped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from federation.twin import (
    HOUR_NS,
    SYSTEM,
    Causality,
    Description,
    Entity,
    LinearBlock,
    Port,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from tests.blocks import block

INF = np.inf
LINES = (Entity("north", "line", "", -90.0, 35.3), Entity("south", "line", "", -90.0, 35.0))
HOMES_MW = 9.0


def plants_block(
    periods: int,
    cheap_usd: float = 20.0,
    dear_usd: float = 80.0,
    store_mwh: float = 0.0,
    start_usd: float = 0.0,
) -> LinearBlock:
    """Per hour: a cheap and a dear plant of 10 MW each, homes, and two lines of up to 5 MW. What
    is in the store at the end is the city's loss. A plant that has to be started is on or off."""
    columns: dict[str, tuple[float, float, float]] = {}
    rows: dict[str, tuple[float, Mapping[str, float], float]] = {}
    for t in range(periods):
        columns |= {
            f"cheap{t}": (0, 10, cheap_usd),
            f"dear{t}": (0, 10, dear_usd),
            f"power{t}": (0, 12, 0),
            f"north{t}": (0, 5, 0),
            f"south{t}": (0, 5, 0),
            f"kept{t}": (0, store_mwh, 0),
        }
        before = {} if t == 0 else {f"kept{t - 1}": -1.0}
        flows = {f"power{t}": 1.0, f"north{t}": 1.0, f"south{t}": 1.0, f"kept{t}": 1.0}
        made = {f"cheap{t}": -1.0, f"dear{t}": -1.0}
        rows[f"plants meet hour {t}"] = (-INF, flows | made | before, 0.0)
        if start_usd:
            columns[f"on{t}"] = (0, 1, start_usd)
            rows[f"dear plant is on in hour {t}"] = (-INF, {f"dear{t}": 1.0, f"on{t}": -10.0}, 0.0)
    names = list(columns)

    def at(name: str) -> list[int]:
        return [names.index(f"{name}{t}") for t in range(periods)]

    return block(
        columns,
        rows,
        whole=[name for name in names if name.startswith("on")],
        ports=[
            Port("power", "supply", SYSTEM, "MW", (SYSTEM,), np.array([at("power")])),
            Port(
                "tie",
                "supply",
                "line",
                "MW",
                ("north", "south"),
                np.array([at("north"), at("south")]),
            ),
        ],
    )


def homes_block(periods: int) -> LinearBlock:
    """They want 9 MW and lose 1,000 dollars per megawatt-hour that is not there."""
    columns: dict[str, tuple[float, float, float]] = {}
    rows: dict[str, tuple[float, Mapping[str, float], float]] = {}
    for t in range(periods):
        columns |= {f"come{t}": (0.0, HOMES_MW, 0.0), f"dark{t}": (0.0, HOMES_MW, 1000.0)}
        rows[f"homes in hour {t}"] = (HOMES_MW, {f"come{t}": 1.0, f"dark{t}": 1.0}, INF)
    come = np.array([[list(columns).index(f"come{t}") for t in range(periods)]])
    return block(columns, rows, ports=[Port("come", "need", SYSTEM, "MW", (SYSTEM,), come)])


class _Quiet(Twin):
    """Does nothing, and could do something."""

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        pass

    def advance(self, step: Step) -> None:
        pass


class Plants(_Quiet):
    def __init__(self, store_mwh: float = 0.0) -> None:
        self.store_mwh = store_mwh

    def describe(self) -> Description:
        return Description(
            model="plants",
            version="1",
            domain="energy",
            entities=LINES,
            variables=(
                Variable("power", SYSTEM, "MW", Causality.OUTPUT),
                Variable("tie", "line", "MW", Causality.OUTPUT),
            ),
            time=TimePolicy(period_ns=HOUR_NS),
        )

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        return plants_block(len(periods_ns), store_mwh=self.store_mwh)


class Homes(_Quiet):
    def describe(self) -> Description:
        return Description(
            model="homes",
            version="1",
            domain="city",
            entities=(),
            variables=(Variable("come", SYSTEM, "MW", Causality.INPUT),),
            time=TimePolicy(period_ns=HOUR_NS),
        )

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        return homes_block(len(periods_ns))


ELM = """
name: elm-day
region: elm
horizon_h: 4
members:
  plants: {{class: "tests.works:Plants", config: {{store_mwh: {store_mwh}}}}}
  homes: {{class: "tests.works:Homes"}}
couplings:
  - {{from: plants.power, to: homes.come}}
"""


def write_elm(folder: Path, rules: str, store_mwh: float = 0.0) -> tuple[Path, Path]:
    """The files of elm: its scenario, and an export policy with these rules besides sessions."""
    scenario, policy = folder / "elm.yaml", folder / "policy.yaml"
    scenario.write_text(ELM.format(store_mwh=store_mwh), encoding="utf-8")
    policy.write_text(
        "version: 1\nstep_min: 60\nrules:\n"
        "  - {name: what-ifs, who: [ash], what: {sessions: [what-if]}}\n" + rules,
        encoding="utf-8",
    )
    return scenario, policy
