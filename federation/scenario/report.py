"""Tells a planner, on one page that needs nothing else, what a study found."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from federation.core.ledger import EventRecord
from federation.errors import Reason, ScenarioError
from federation.scenario import atlas
from federation.scenario.archive import Study as Archive
from federation.scenario.cascade import frequent
from federation.scenario.explain import Causes
from federation.scenario.results import (
    read_events,
    read_json,
    read_summary,
    read_table,
    write_text,
)
from federation.scenario.study import BASELINE, interval
from federation.twin import HOUR_NS, MINUTE_NS, SYSTEM

PAGE = "report.html"

MOST_EVENTS = 6_000
"""Of a longer run the page keeps the first so many events."""

MOST_PATHS = 12
"""The page shows so many of the paths that a study has taken."""

NO_BREAK = "\N{NO-BREAK SPACE}"

SMALL_SHARE = 0.02
"""A change below this share of the figure without repairs is called small."""

UNITS = {"1": "", "persons": "people", "person": "people", "1/h": "per hour", "MW*h": "MWh"}

FIGURES = {
    "deaths": ("Deaths", ""),
    "untreated_after_6h": ("Badly hurt and still untreated after 6 hours", ""),
    "unserved_energy_mwh": ("Electricity not delivered", ""),
    "hours_to_90pct_power": ("Time until 90 % of power is back, or the end", ""),
    "unserved_water_m3": ("Water not delivered", ""),
    "vehicle_hours_delay": ("Time lost on the roads", "vehicle-hours"),
    "ambulance_response_min": ("Ambulance response, mean", ""),
    "people_without_power": ("People without power", "people"),
    "people_without_water": ("People without water", "people"),
    "served": ("Power delivered", ""),
    "shed": ("Power that could not be delivered", ""),
    "ambulances_busy": ("Ambulances on a call", "vehicles"),
    "patients_in_system": ("Patients on the scene, under way or in hospital", ""),
    "treated": ("Patients whose treatment has begun", ""),
    "signals_out": ("Junctions with dark traffic signals", "junctions"),
    "vehicles_stranded": ("Trips that no open road allows", "trips"),
    "tasks_open": ("Repairs still to do", "components"),
    "crews_engaged": ("Crews on the way or at work", "crews"),
}
"""Plain words for figures that a planner meets often, and a unit where the declared one is
a bare number. Any other figure goes by its variable's name."""

CHARTS = (
    "people_without_power", "people_without_water", "deaths", "untreated_after_6h",
    "served", "vehicle_hours_delay", "ambulance_response_min", "patients_in_system",
)  # fmt: skip
"""What is charted first, as far as the study has it."""

MORE_IS_BETTER = re.compile(r"served$|treated$|supplied|delivered|restored|functional|discharged")
LESS_IS_BETTER = re.compile(r"^un|^not_|without")

UNIT_SUFFIX = re.compile(r"_(h|min|m|m3|km|kmh|kw|mw|mwh|usd)$")

MEASURES = {"none": "No repairs", "nearest": "Nearest first", "plan": "Joint plan"}


def write_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a finished study and return its path.

    The page is whole in itself: styles, scripts and data are inside, and its own policy
    forbids it any request. Raises RUN_NOT_FOUND for a folder without a study.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ScenarioError(
            Reason.MISSING_EXTRA, "a report needs Plotly and Jinja: install multitwin[report]"
        ) from None
    study = Study(folder)
    part = resources.files("federation.scenario")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, signed=signed, percent=percent, widest=widest)
    page = environment.from_string((part / PAGE).read_text(encoding="utf-8")).render(
        **study.page(),
        style=Markup((part / "report.css").read_text(encoding="utf-8")),
        script=Markup((part / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        data=Markup(_script_json(study.data())),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _script_json(data: object) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# -- words and numbers -----------------------------------------------------------------


def number(value: float, like: float | None = None) -> str:
    """A figure with thousands apart and as many decimals as suit the size of `like`."""
    size = abs(value if like is None else like)
    decimals = 0 if size >= 100 or size == 0 else 1 if size >= 1 else 2 if size >= 0.1 else 3
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, like: float | None = None) -> str:
    text = number(value, like)
    return text if value <= 0 or not float(text.replace(",", "")) else "+" + text


def percent(share: float) -> str:
    text = f"{100 * share:+.1f} %" if abs(share) >= 0.0005 else "less than 0.1 %"
    return text.replace("-", "\N{MINUS SIGN}")


def widest(figure: Mapping[str, Any]) -> float:
    """The largest of a mean and its interval's ends, to choose decimals for all three."""
    return float(max(abs(figure["mean"]), *(abs(end) for end in figure["ci95"])))


def words(name: str) -> str:
    """A variable's name as words."""
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def unit_words(unit: str) -> str:
    """A pint expression as a reader knows it: m^3/h becomes m³/h."""
    text = UNITS.get(unit, unit).replace("**", "^").replace("*", " ")
    return text.replace("^2", "²").replace("^3", "³")


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def more_is_better(name: str) -> bool:
    """Which way a figure should go, by its name: a loss unless it counts what is served."""
    return bool(MORE_IS_BETTER.search(name)) and not LESS_IS_BETTER.search(name)


# -- the study -------------------------------------------------------------------------


class Study:
    """The folder of a study, read once, and what the page says about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary = read_summary(folder)
        self.measures: list[str] = list(self.summary["measures"])
        text = (folder / "reference" / "descriptions.json").read_text(encoding="utf-8")
        self.descriptions: dict[str, dict[str, Any]] = json.loads(text)
        self.domains = {name: d["domain"] for name, d in self.descriptions.items()}
        self.runs = read_table(folder, "runs")
        self.kept = [
            m for m in self.measures if (folder / "reference" / m / "events.parquet").is_file()
        ]
        self.events = {m: read_events(folder, m) for m in self.kept}
        self.causes = {m: Causes(events, self.domains) for m, events in self.events.items()}
        series = folder / "series.parquet"
        self.series = pq.read_table(series) if series.is_file() else None
        last = self.series and pc.max(self.series["time_h"]).as_py()
        self.hours = int(last or 0)
        self.focus = self._focus()

    def _focus(self) -> str:
        """The measure that the page speaks for."""
        others = [m for m in self.measures if m != BASELINE]
        return "plan" if "plan" in others else others[-1] if others else self.measures[0]

    @property
    def is_single(self) -> bool:
        return int(self.summary["runs"]) < 2

    def measure_name(self, measure: str) -> str:
        return MEASURES.get(measure, words(measure))

    def figure(self, name: str) -> tuple[str, str]:
        """The words for a scalar variable and its unit."""
        units = [
            v["unit"]
            for d in self.descriptions.values()
            for v in d["variables"]
            if v["name"] == name and v["kind"] == SYSTEM and v["causality"] == "output"
        ]
        label, unit = FIGURES.get(name, (words(name), ""))
        return label, unit or unit_words(units[0] if units else "")

    # -- what stands on the page

    def page(self) -> dict[str, Any]:
        """Everything that is text or table."""
        summary = self.summary
        return {
            "title": words(summary["scenario"].replace("-", "_")),
            "region": words(summary["region"]),
            "summary": summary,
            "hours": self.hours,
            "single": self.is_single,
            "measures": [
                {"name": m, "label": self.measure_name(m), "kept": m in self.kept}
                for m in self.measures
            ],
            "baseline": BASELINE if BASELINE in self.measures else "",
            "focus": self.focus,
            "focus_label": self.measure_name(self.focus),
            "answer": self.answer(),
            "rows": self.rows(),
            "below_zero": any(
                f["mean"] > 0 > f["ci95"][0] for r in self.rows() for f in r["measures"].values()
            ),
            "crossings": {m: self.crossings(m) for m in self.kept},
            "tallies": {m: self.tally(m) for m in self.kept},
            "drawn": self.drawn(),
            "parameters": self.parameters(),
            "members": self.members(),
            "scenario_text": self.scenario_text(),
            "sensitivity": self.sensitivity(),
            "paths": self.paths(),
            "indices": self.indices(),
            "explained": self.explained(),
            "version": _version(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row per KPI with the figures of every measure and the paired differences."""
        found = []
        paired = self.summary["paired"]
        base = self.summary["measures"].get(BASELINE, {})
        kpis = self.summary["measures"][self.measures[0]]
        known = list(FIGURES)
        for kpi in sorted(kpis, key=lambda k: known.index(k) if k in known else len(known)):
            label, unit = self.figure(kpi)
            per_measure = {m: self.summary["measures"][m][kpi] for m in self.measures}
            biggest = max(abs(f["mean"]) for f in per_measure.values())
            differences = {
                m: {**paired[m][kpi], "mark": self.mark(kpi, paired[m][kpi])}
                for m in self.measures
                if m in paired
            }
            rival = self.rival(kpi)
            found.append(
                {
                    "kpi": kpi,
                    "label": label,
                    "unit": unit,
                    "like": biggest,
                    "measures": per_measure,
                    "paired": differences,
                    "rival": rival and {**rival, "mark": self.mark(kpi, rival)},
                    "share": _share(differences.get(self.focus), base.get(kpi)),
                }
            )
        return found

    def rival(self, kpi: str) -> dict[str, Any] | None:
        """The plan against the nearest-first rule over common runs, if both were run."""
        if not {"plan", "nearest"} <= set(self.measures):
            return None
        table = self.runs.select(["run", "measure", "error", f"kpi.{kpi}"]).to_pylist()
        value = {(r["run"], r["measure"]): r[f"kpi.{kpi}"] for r in table if not r["error"]}
        pairs = [
            value[run, "plan"] - value[run, "nearest"]
            for run, measure in value
            if measure == "plan" and (run, "nearest") in value
        ]
        return interval(np.array(pairs)) if pairs else None

    def mark(self, kpi: str, difference: Mapping[str, Any]) -> str:
        """Better or worse when the interval excludes 0, else that nothing is clear."""
        low, high = difference["ci95"]
        if low == high == 0:
            return "no difference"
        if self.is_single:
            return "one run only"
        if low <= 0 <= high:
            return "no clear difference"
        return "better" if (low > 0) == more_is_better(kpi) else "worse"

    def answer(self) -> dict[str, Any]:
        """What happened, what the measure in focus changes and how sure that is, in sentences."""
        rows = self.rows()
        first = self.kept[0] if self.kept else None
        lead = ""
        if first and (root := self.root(first)):
            cascade = self.causes[first].cascade()
            count = len(cascade.domains)
            hours = root.time_ns / HOUR_NS
            calm = f"After {hours:g} {'hour' if hours == 1 else 'hours'} of normal service: "
            lead = (
                f"{calm if hours else ''}{words(root.event.kind).lower()}, {root.event.text}. "
                f"In the run shown below it set off a cascade of {cascade.events:,} linked "
                f"events in {count} {'domain' if count == 1 else 'domains'} "
                f"({listed(cascade.domains)})."
            )
        base = BASELINE if BASELINE in self.measures else self.measures[0]
        told = [f"{_lower(r['label'])}, {self._range(r, r['measures'][base])}" for r in rows[:4]]
        what = "Without any repair" if base == BASELINE else f"Under “{self.measure_name(base)}”"
        said = [f"{what}, the {self.hours} hours end with these figures: {'; '.join(told)}."]
        if self.focus != base and self.focus in self.summary["paired"]:
            said += self._change(rows)
        if self.is_single:
            said.append(
                "This is a single run: it has no intervals, and a difference may be chance. "
                "Run the study with more runs before deciding."
            )
        return {
            "lead": _sentence(lead),
            "sentences": [s.replace(" %", NO_BREAK + "%") for s in said],
        }

    def _change(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the measure in focus changes against no repairs, and against the simple rule."""
        label = self.measure_name(self.focus).lower()
        groups: dict[str, list[str]] = {}
        for row in rows:
            difference = row["paired"][self.focus]
            text = self._moved(row, difference)
            share = row["share"]
            if share is not None and abs(share) < SMALL_SHARE:
                text += " (a small change)"
            groups.setdefault(difference["mark"], []).append(text)
        compared = f"compared run by run with no repairs, the measure “{label}”"
        if self.is_single:
            changed = groups.get("one run only", [])
            what = f"makes these changes: {'; '.join(changed)}" if changed else "changes nothing"
            return [f"In this one run, {compared} {what}."]
        better, worse = groups.get("better", []), groups.get("worse", [])
        unclear = len(groups.get("no clear difference", []))
        same = len(groups.get("no difference", []))
        said = []
        if better:
            said.append(
                f"{_sentence(compared)} clearly improves {len(better)} of {len(rows)} figures: "
                f"{'; '.join(better)}."
            )
        else:
            said.append(f"{_sentence(compared)} clearly improves none of {len(rows)} figures.")
        if worse:
            said.append(f"It makes worse: {'; '.join(worse)}.")
        if unclear:
            said.append(
                f"In {unclear} {'figure' if unclear == 1 else 'figures'} the interval includes 0: "
                f"{self.summary['runs']} runs do not show whether there is an effect."
            )
        if same:
            said.append(
                f"In {same} {'figure' if same == 1 else 'figures'} nothing changes in any run."
            )
        if rivals := [r for r in rows if r["rival"] is not None]:
            up = [_lower(r["label"]) for r in rivals if r["rival"]["mark"] == "better"]
            down = [_lower(r["label"]) for r in rivals if r["rival"]["mark"] == "worse"]
            against = "Against the simple rule of sending crews to the nearest damage, the plan is "
            parts = [f"clearly better in {listed(up)}"] if up else []
            parts += [f"clearly worse in {listed(down)}"] if down else []
            rest = len(rivals) - len(up) - len(down)
            tail = f"; in the other {rest} no difference is clear" if rest and parts else ""
            verdict = " and ".join(parts) or "not clearly better or worse in any of these figures"
            said.append(f"{against}{verdict}{tail}.")
        return said

    def _range(self, row: Mapping[str, Any], f: Mapping[str, Any]) -> str:
        """A figure with its unit and interval, as in "812 people (95 %: 700 to 930)"."""
        like = row["like"]
        text = f"{number(f['mean'], like)} {row['unit']}".strip()
        low, high = f["ci95"]
        if self.is_single or low == high:
            return text
        return f"{text} (95 %: {number(low, like)} to {number(high, like)})"

    def _moved(self, row: Mapping[str, Any], f: Mapping[str, Any]) -> str:
        """A difference in words, as in "deaths down by 28 people or 1.4 % (95 %: 12 to 44)"."""
        like = widest(f)
        verb = "down" if f["mean"] < 0 else "up"
        text = f"{_lower(row['label'])} {verb} by {number(abs(f['mean']), like)} {row['unit']}"
        text = text.strip()
        if row["share"] is not None:
            text += f" or {percent(abs(row['share'])).lstrip('+')}"
        if self.is_single:
            return text
        low, high = f["ci95"] if f["mean"] > 0 else (-f["ci95"][1], -f["ci95"][0])
        return f"{text} (95 %: {number(low, like)} to {number(high, like)})"

    # -- cascade

    def root(self, measure: str) -> EventRecord | None:
        """The event with which the longest chain begins."""
        chain = self.causes[measure].cascade().longest_chain
        return self.causes[measure].events[chain[0]] if chain else None

    def crossings(self, measure: str) -> list[dict[str, Any]]:
        """How often a cause of one domain had a consequence in another, and by what coupling."""
        causes = self.causes[measure]
        counts: Counter[tuple[str, str, str]] = Counter()
        for id_, record in causes.events.items():
            for cause, channel in record.via:
                if cause in causes.events:
                    counts[causes.domain(cause), causes.domain(id_), channel] += 1
        return [
            {"from": a, "to": b, "via": channel, "count": count}
            for (a, b, channel), count in counts.most_common()
        ]

    def tally(self, measure: str) -> dict[str, Any]:
        cascade = self.causes[measure].cascade()
        return {
            "events": cascade.events,
            "depth": cascade.depth,
            "domains": list(cascade.domains),
            "all": len(self.events[measure]),
        }

    def _cascade(self, measure: str) -> dict[str, Any]:
        """Events for the tree: each hangs under the cause that ends its longest chain."""
        causes = self.causes[measure]
        kept = list(causes.events)[:MOST_EVENTS]
        index = {id_: i for i, id_ in enumerate(kept)}
        kinds: dict[str, int] = {}
        channels: dict[str, int] = {}
        owners: dict[str, int] = {}
        rows = []
        for id_ in kept:
            record = causes.events[id_]
            event = record.event
            parent = causes.chain(id_)[-2] if event.causes and len(causes.chain(id_)) > 1 else ""
            others = [index[c] for c in event.causes if c in index and c != parent]
            channel = causes.via(parent, id_) if parent else ""
            rows.append(
                [
                    round(record.time_ns / MINUTE_NS),
                    owners.setdefault(causes.domain(id_), len(owners)),
                    kinds.setdefault(event.kind, len(kinds)),
                    event.entity,
                    event.text,
                    index.get(parent, -1),
                    channels.setdefault(channel, len(channels)) if channel else -1,
                    others[:6],
                ]
            )
        chains = {"longest": list(causes.cascade().longest_chain)}
        if causes.events:
            chains["telling"] = list(causes.chain(causes.pick()))
        return {
            "domains": list(owners),
            "kinds": list(kinds),
            "channels": list(channels),
            "events": rows,
            "left_off": len(causes.events) - len(kept),
            "chains": {
                name: [index[id_] for id_ in chain if id_ in index]
                for name, chain in chains.items()
            },
        }

    # -- charts

    def data(self) -> dict[str, Any]:
        """Everything that the scripts draw."""
        root = self.root(self.kept[0]) if self.kept else None
        return {
            "hours": self.hours,
            "shock_h": root.time_ns / HOUR_NS if root else None,
            "measures": [
                {"name": m, "label": self.measure_name(m), "kept": m in self.kept}
                for m in self.measures
            ],
            "focus": self.focus if self.focus in self.kept else (self.kept or [""])[0],
            "runs": self.summary["runs"],
            "layers": self.layers(),
            "cascade": {m: self._cascade(m) for m in self.kept},
            "bands": self.bands(),
            "first_charts": list(CHARTS),
            "gantt": {m: self.assignments(m) for m in self.kept},
            "sensitivity": self.sensitivity(),
        }

    def layers(self) -> list[dict[str, Any]]:
        found = atlas.layers(self.descriptions, self.folder, self.kept, self.hours)
        for layer in found:
            for variable in layer["variables"]:
                variable["unit"] = unit_words(variable["unit"])
        return found

    def bands(self) -> list[dict[str, Any]]:
        """Median and 5th to 95th percentile of every scalar that moves, per measure and hour."""
        if self.series is None:
            return []
        found = []
        for name in pc.unique(self.series["variable"]).to_pylist():
            mine = self.series.filter(pc.field("variable") == name)
            values = mine["value"].to_numpy()
            if values.min() == values.max():
                continue
            hour = mine["time_h"].to_numpy().astype(int)
            measure = np.array(mine["measure"].to_pylist())
            label, unit = self.figure(name.partition(".")[2])
            per_measure = {}
            for m in self.measures:
                chosen = measure == m
                if not chosen.any():
                    continue
                order = np.argsort(hour[chosen], kind="stable")
                grid = values[chosen][order].reshape(self.hours + 1, -1)
                quantiles = np.percentile(grid, [5, 50, 95], axis=1)
                per_measure[m] = [[float(f"{x:.5g}") for x in line] for line in quantiles]
            found.append({"name": name, "label": label, "unit": unit, "measures": per_measure})
        return found

    def assignments(self, measure: str) -> list[dict[str, Any]]:
        """Each crew at each component, from the order to leave until it is free again."""
        path = self.folder / "reference" / measure / "actions.parquet"
        if not path.is_file():
            return []
        end_ns = self.hours * HOUR_NS
        done: dict[tuple[str, str], list[int]] = {}
        for record in self.events[measure]:
            if record.event.kind.endswith("_repaired"):
                done.setdefault((record.owner, record.event.entity), []).append(record.time_ns)
        open_: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        found: list[dict[str, Any]] = []
        for row in pq.read_table(path).to_pylist():
            if row["refusal"] or not _sends_crews(row["actuator"]):
                continue
            key = (row["member"], row["actuator"], row["entity"])
            mine = open_.setdefault(key, [])
            for bar in [b for b in mine if self._end(b, done, end_ns) <= row["time_ns"]]:
                mine.remove(bar)
            while len(mine) > round(row["value"]):
                mine.pop()["recalled_ns"] = row["time_ns"]
            while len(mine) < round(row["value"]):
                mine.append({"key": key, "start_ns": row["time_ns"]})
                found.append(mine[-1])
        bars = []
        for bar in found:
            member, actuator, entity = bar["key"]
            end = self._end(bar, done, end_ns)
            state = "recalled" if "recalled_ns" in bar else "done" if end < end_ns else "open"
            bars.append(
                {
                    "family": _family(self.domains.get(member, member), actuator),
                    "component": entity,
                    "start": round(bar["start_ns"] / HOUR_NS, 3),
                    "end": round(end / HOUR_NS, 3),
                    "state": state,
                }
            )
        return _rows_of_crews(bars)

    @staticmethod
    def _end(
        bar: Mapping[str, Any], done: Mapping[tuple[str, str], Sequence[int]], end_ns: int
    ) -> int:
        if "recalled_ns" in bar:
            return int(bar["recalled_ns"])
        member, _, entity = bar["key"]
        later = [t for t in done.get((member, entity), ()) if t > bar["start_ns"]]
        return min([*later, end_ns])

    def sensitivity(self) -> dict[str, Any] | None:
        """`sensitivity.json` with words, its assumptions ordered by effect for each KPI."""
        path = self.folder / "sensitivity.json"
        if not path.is_file():
            return None
        raw = json.loads(path.read_text(encoding="utf-8"))
        units = {
            f"{member}.{p['name']}": unit_words(p["unit"])
            for member, d in self.descriptions.items()
            for p in d["parameters"]
        }
        kpis = dict.fromkeys(k for a in raw["assumptions"].values() for k in a["kpis"])
        charts = []
        for kpi in kpis:
            label, unit = self.figure(kpi)
            bars = [
                {
                    "name": name,
                    "label": words(UNIT_SUFFIX.sub("", name.partition(".")[2])),
                    "unit": units.get(name, ""),
                    "low_value": a["low"],
                    "high_value": a["high"],
                    **a["kpis"][kpi],
                }
                for name, a in raw["assumptions"].items()
                if kpi in a["kpis"]
            ]
            bars.sort(key=lambda b: -max(abs(b["low"] - b["base"]), abs(b["high"] - b["base"])))
            charts.append({"kpi": kpi, "label": label, "unit": unit, "bars": bars})
        return {
            "measure": self.measure_name(raw["measure"]),
            "runs": raw["runs"],
            "charts": charts,
        }

    # -- over all runs

    def paths(self) -> dict[str, list[dict[str, Any]]]:
        """Per measure the paths of causes that most runs have, as words with their domains."""
        if self.is_single or not (self.folder / "cascade.parquet").is_file():
            return {}
        study = Archive(self.folder)
        found = {}
        for measure in self.measures:
            told = frequent(study, measure, MOST_PATHS)
            found[measure] = [
                {
                    "steps": [dict(zip(("domain", "kind"), _kind(k), strict=True)) for k in kinds],
                    "runs": path["runs"],
                    "share": path["runs"] / max(told["runs"], 1),
                    "count": path["count"],
                }
                for path in told["paths"]
                if (kinds := path["kinds"])
            ]
        return {measure: paths for measure, paths in found.items() if paths}

    def indices(self) -> list[dict[str, Any]]:
        """`indices.json` as tables: a row per KPI, a cell per uncertain input, largest first."""
        path = self.folder / "indices.json"
        if not path.is_file():
            return []
        found = []
        for method, measures in read_json(path).items():
            for measure, told in measures.items():
                key = {"pawn": "median", "sobol": "ST"}[method]
                names = list(dict.fromkeys(n for kpi in told["kpis"].values() for n in kpi))
                names.sort(key=lambda n: n.startswith("("))  # chance comes last
                rows = [
                    {
                        "label": self.figure(kpi)[0],
                        "cells": [inputs[name][key] for name in names],
                        "floor": inputs.get(names[-1], {}).get(key, 0.0)
                        if names[-1].startswith("(")
                        else _floor(inputs),
                    }
                    for kpi, inputs in told["kpis"].items()
                ]
                found.append(
                    {
                        "method": method,
                        "measure": self.measure_name(measure),
                        "runs": told["runs"],
                        "names": [self._input(name) for name in names],
                        "rows": rows,
                    }
                )
        return found

    def explained(self) -> list[dict[str, Any]]:
        """`quantiles.json`: runs at quantiles of a KPI, each with its tree of causes as text."""
        path = self.folder / "quantiles.json"
        if not path.is_file():
            return []
        return [
            {**told, "label": self.figure(told["kpi"])[0], "measure": self.measure_name(measure)}
            for measure, kpis in read_json(path).items()
            for runs in kpis.values()
            for told in runs
        ]

    def _input(self, name: str) -> str:
        member, dot, parameter = name.partition(".")
        if not dot:
            return "Chance alone"
        return f"{words(UNIT_SUFFIX.sub('', parameter))} ({self.domains.get(member, member)})"

    # -- provenance

    def drawn(self) -> list[dict[str, Any]]:
        """The parameters that differ from run to run, with the range that was drawn."""
        found = []
        for column in self.runs.column_names:
            if not column.startswith("parameter."):
                continue
            values = [v for v in self.runs[column].to_pylist() if v is not None]
            if values and min(values) < max(values):
                name = column.removeprefix("parameter.")
                found.append({"name": name, "low": min(values), "high": max(values)})
        return found

    def parameters(self) -> list[dict[str, Any]]:
        """Every parameter of every member with its source, assumptions first."""
        found = [
            {**p, "member": member, "assumed": p["source"].lower().startswith("assum")}
            for member, d in self.descriptions.items()
            for p in d["parameters"]
        ]
        return sorted(found, key=lambda p: not p["assumed"])

    def members(self) -> list[dict[str, Any]]:
        """Members as the summary lists them, with what they are and the hash of their data."""
        return [
            {**m, **{k: self.descriptions.get(m["name"], {}).get(k, "")
                     for k in ("model", "domain", "data_hash")}}
            for m in self.summary["members"]
        ]  # fmt: skip

    def scenario_text(self) -> str:
        """The scenario document, when the study kept a copy."""
        path = self.folder / "scenario.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""


def _floor(inputs: Mapping[str, Mapping[str, float]]) -> float:
    """Below what a Sobol index may be 0: the widest of the bootstrap's half intervals."""
    return max(figures["ST_conf"] for figures in inputs.values())


def _kind(text: str) -> tuple[str, str]:
    """A kind of event, `domain/kind`, as words."""
    domain, _, kind = text.partition("/")
    return domain, words(kind).lower()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(label: str) -> str:
    return label[:1].lower() + label[1:]


def _share(difference: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> float | None:
    if not difference or not base or not base["mean"]:
        return None
    share = float(difference["mean"] / abs(base["mean"]))
    return share if math.isfinite(share) else None


def _sends_crews(actuator: str) -> bool:
    return "crew" in actuator


def _family(domain: str, actuator: str) -> str:
    """What crews of an actuator mend: "Road", or the domain if the name says no more."""
    what = re.sub(r"assign|send|crews?", "", actuator).strip("_")
    return words(what or {"energy": "power"}.get(domain, domain))


def _rows_of_crews(bars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lay the assignments into as few rows as there are crews out at once.

    Members count crews but do not name them: the first row that is free takes the next.
    """
    free: list[float] = []
    for bar in sorted(bars, key=lambda b: (b["start"], b["end"])):
        row = next((i for i, until in enumerate(free) if until <= bar["start"]), len(free))
        if row == len(free):
            free.append(0.0)
        free[row] = bar["end"]
        bar["row"] = row
    return bars


def _version() -> str:
    try:
        return importlib.metadata.version("multitwin")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
