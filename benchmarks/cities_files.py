"""Writes what the two cities are run from: scenarios, policies, goods, rules and keys."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from federation.wire.credentials import Identity

PURPOSE = "mutual-aid"


@dataclass(frozen=True)
class CityPlan:
    """One of the two cities: its region, what happens there, and its end of the line."""

    name: str
    scenario: Path
    measure: str
    tie_line: str
    parameters: Mapping[str, float]
    hit: bool
    """It asks for aid; else it gives."""


@dataclass(frozen=True)
class Files:
    """Where the files of a city are."""

    folder: Path
    scenario: Path
    policy: Path
    goods: Path
    key: Path
    keyring: Path
    rules: Path


RULES = """
version: 1
owners: {{energy: utility}}
cut_min: 10
life_min: 10
bundles: {{at_most: 5, within_min: 60}}
setpoints_at_most: 5
members_at_most: 4
recovery: {{name: safe, lease_min: 60, returns_after: 1}}
aid:
  power:
    cities: [{other}]
    gives_at_most: {gives}
    takes_at_most: {takes}
    for_at_most_h: 12
    usd_at_most: 50000000
"""

GOODS = """
version: 1
goods:
  power:
    unit: MW
    gives: [{{most_of: energy.tie_spare, entity: 0, most: {most}, usd_per_h: {give_usd}}}]
    takes: [{{most_of: energy.tie_need, entity: 0, most: {most}, usd_per_h: {take_usd}}}]
"""

POLICY = """
version: 1
step_min: 5
rules:
  - name: mutual-aid
    who: [{other}]
    what: {{flexibility: [aid.power]}}
    purpose: [mutual-aid]
"""


def write(plans: tuple[CityPlan, CityPlan], folder: Path, most_mw: float) -> tuple[Files, Files]:
    """The files of both cities; each believes the other's key and nobody's else."""
    files: list[Files] = []
    keys = {plan.name: Identity.generate(plan.name) for plan in plans}
    for plan, other in zip(plans, reversed(plans), strict=True):
        here = folder / plan.name
        here.mkdir(parents=True, exist_ok=True)
        made = Files(
            here,
            here / "city.yaml",
            here / "policy.yaml",
            here / "goods.yaml",
            here / f"{plan.name}.pem",
            here / "others.yaml",
            here / "rules.yaml",
        )
        made.scenario.write_text(document(plan), encoding="utf-8")
        signals = "signals.csv"
        shutil.copyfile(plan.scenario.with_name(signals), here / signals)
        own_policy = plan.scenario.with_name("export.yaml")
        text = POLICY.format(other=other.name)
        if not plan.hit:
            text = own_policy.read_text(encoding="utf-8")
        made.policy.write_text(text, encoding="utf-8")
        prices = {"give_usd": 60, "take_usd": 3300}
        made.goods.write_text(GOODS.format(most=most_mw, **prices), encoding="utf-8")
        limits = {"gives": 0 if plan.hit else most_mw, "takes": most_mw if plan.hit else 0}
        made.rules.write_text(RULES.format(other=other.name, **limits), encoding="utf-8")
        keys[plan.name].save(made.key)
        believed = {"name": other.name, "public_key": keys[other.name].public_key}
        entry = {**believed, "roles": ["peer"], "domains": []}
        known = yaml.safe_dump({"identities": [entry]}, sort_keys=False)
        made.keyring.write_text(known, encoding="utf-8")
        files.append(made)
    return files[0], files[1]


def document(
    plan: CityPlan,
    *,
    horizon_h: float | None = None,
    pace: Mapping[str, Any] | None = None,
    neighbour: tuple[str, str] | None = None,
) -> str:
    """The city's scenario with its tie line in use, under one measure.

    `neighbour` is the name and the address of a city whose run it looks at.
    """
    found = yaml.safe_load(plan.scenario.read_text(encoding="utf-8"))
    found["measures"] = {plan.measure: found["measures"][plan.measure]}
    for part in ("uncertainty", "sensitivity"):
        found.pop(part, None)
    parameters = {**found.get("parameters", {}), **plan.parameters, "energy.tie_lines_on": 1}
    found["parameters"] = parameters
    if horizon_h is not None:
        found["horizon_h"] = horizon_h
    if pace is not None:
        found["pace"] = dict(pace)
    if neighbour is not None:
        name, address = neighbour
        peer = {"purpose": PURPOSE, "session": "live"}
        found["members"][name] = {"address": address, "peer": peer, "on_failure": "recover"}
    return yaml.safe_dump(found, sort_keys=False)
