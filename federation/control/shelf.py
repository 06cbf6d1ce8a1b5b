"""Keeps the decisions whose end is open, so that another life of the loop takes them up again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from federation.control.loop import Rating
from federation.control.situation import Mode, Reading, Refusal, Verdict
from federation.control.trials import Trial
from federation.control.turn import Candidate, Known, Made
from federation.control.view import Desks, Observation, Variable, variable_of
from federation.core.bundle import Setpoint, bundle_of, plain_of
from federation.core.ledger import Quality
from federation.twin import Action


class Shelf:
    """One file for each decision, in a folder of their own; whole or not at all.

    Of what was seen at the cut, and came of the trials, it keeps the outputs `wanted`.
    """

    def __init__(self, folder: Path) -> None:
        self.wanted: tuple[Variable, ...] = ()
        self._folder = folder
        self._written: dict[str, str] = {}

    def keep(self, made: Iterable[tuple[Made, bool]]) -> None:
        """Keep these and no others, each with its trials if they are still needed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = {each.id: json.dumps(self._plain(each, trials)) for each, trials in made}
        for id_, text in found.items():
            if self._written.get(id_) != text:
                new = self._folder / f"{id_}.new"
                new.write_text(text, encoding="utf-8")
                new.replace(self._folder / f"{id_}.json")
        for file in self._folder.glob("*.json"):
            if file.stem not in found:
                file.unlink()
        self._written = found

    def all(self) -> list[Made]:
        """What an earlier life has kept, in the order of the cuts."""
        found = [_made(json.loads(file.read_text())) for file in self._folder.glob("*.json")]
        return sorted(found, key=lambda made: made.known.cut.time_ns)

    def _plain(self, made: Made, has_trials: bool) -> dict[str, Any]:
        cut, verdict = made.known.cut, made.verdict
        readings = {
            ".".join(v): [cut.readings[v].values.tolist(), *_told(cut.readings[v])]
            for v in self.wanted
            if v in cut.readings
        }
        return {
            "id": made.id,
            "cut_ns": cut.time_ns,
            "readings": readings,
            "until_ns": made.known.until_ns,
            "bundle": None if made.bundle is None else plain_of(made.bundle),
            "verdict": None
            if verdict is None
            else [
                verdict.mode.value,
                verdict.good,
                verdict.passed,
                verdict.refusals,
                verdict.is_overtaken,
            ],
            "outcome": made.outcome,
            "chosen": made.chosen,
            "is_shadow": made.is_shadow,
            "ratings": [asdict(rating) for rating in made.ratings],
            "candidates": [
                {
                    "name": candidate.name,
                    "setpoints": [asdict(s) for s in candidate.setpoints],
                    "trials": [_plain_trial(trial) for trial in candidate.trials],
                }
                for candidate in made.candidates.values()
                if has_trials
            ],
        }


def _told(reading: Reading) -> tuple[int, int, float]:
    return reading.time_ns, int(reading.quality), reading.clock_error_s


def _plain_trial(trial: Trial) -> dict[str, Any]:
    return {
        "measure": trial.measure,
        "cut_ns": trial.cut_ns,
        "outputs": {
            ".".join(variable): [[time_ns, value.tolist()] for time_ns, value in points]
            for variable, points in trial.outputs.items()
        },
        "actions": [[time_ns, asdict(action)] for time_ns, action in trial.actions],
    }


def _made(plain: Mapping[str, Any]) -> Made:
    readings = {
        variable_of(name): Reading(np.array(values), time_ns, Quality(quality), clock_error_s)
        for name, (values, time_ns, quality, clock_error_s) in plain["readings"].items()
    }
    verdict = None
    if plain["verdict"] is not None:
        mode, good, passed, refusals, *more = plain["verdict"]
        verdict = Verdict(
            Mode(mode),
            good,
            passed,
            tuple(Refusal(*r) for r in refusals),
            is_overtaken=bool(more and more[0]),  # earlier versions did not say
        )
    return Made(
        plain["id"],
        Known(Observation(plain["cut_ns"], readings), Desks(), plain["until_ns"]),
        None if plain["bundle"] is None else bundle_of(plain["bundle"]),
        verdict,
        plain["outcome"],
        plain["chosen"],
        {each["name"]: _candidate(each) for each in plain["candidates"]},
        tuple(_rating(each) for each in plain["ratings"]),
        plain["is_shadow"],
    )


def _candidate(plain: Mapping[str, Any]) -> Candidate:
    return Candidate(
        plain["name"],
        tuple(_trial(each) for each in plain["trials"]),
        tuple(Setpoint(**each) for each in plain["setpoints"]),
    )


def _trial(plain: Mapping[str, Any]) -> Trial:
    outputs: dict[Variable, Sequence[Any]] = {
        variable_of(name): [(time_ns, np.array(value)) for time_ns, value in points]
        for name, points in plain["outputs"].items()
    }
    actions = tuple((time_ns, Action(**action)) for time_ns, action in plain["actions"])
    return Trial(plain["measure"], plain["cut_ns"], outputs, actions)


def _rating(plain: Mapping[str, Any]) -> Rating:
    return Rating(plain["name"], tuple(plain["weighted"]), plain["figures"], tuple(plain["tails"]))
