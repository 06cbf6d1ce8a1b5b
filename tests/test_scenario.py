"""Scenarios as people write them: what is read, and what a wrong one is told."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.__main__ import main
from federation.errors import Reason, ScenarioError
from federation.scenario.run import Case, run_local
from federation.scenario.sampling import draws, quantile
from federation.scenario.spec import Distribution, parse
from federation.scenario.study import cases, interval

ROOT = Path(__file__).parent.parent

TOWN = """
name: town
region: nowhere
horizon_h: 6
members:
  tower: {class: "tests.town:Tower"}
  plant: {class: "tests.town:Plant"}
couplings:
  - {from: plant.power, to: tower.pump_power}
uncertainty:
  plant.outage_h: {uniform: [1, 3]}
kpis: [tower.dry_hours]
"""


def test_a_scenario_runs_and_says_what_it_found() -> None:
    scenario = parse(TOWN)
    outcome = run_local(scenario, Case(0, 1, "none", {"plant": {"outage_h": 2.0}}), None)
    assert outcome.kpis["dry_hours"] > 0
    kinds = {r.event.kind for r in outcome.events}
    assert kinds == {"outage", "tower_empty"}
    (empty,) = (r for r in outcome.events if r.event.kind == "tower_empty")
    assert dict(empty.via) == {empty.event.causes[0]: "plant.power -> tower.pump_power"}


def test_the_same_seed_gives_the_same_digest_twice() -> None:
    scenario = parse(TOWN)
    case = Case(0, 5, "none")
    assert run_local(scenario, case, None).digest == run_local(scenario, case, None).digest


LAUGHS = "6\na0: &a0 [ha, ha]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]" for i in range(1, 12)
)
"""A document of 600 characters that says ha 200,000,000,000 times."""


@pytest.mark.parametrize(
    ("old", "new", "reason", "said"),
    [
        ("horizon_h: 6", "horizonh: 6", Reason.UNKNOWN_KEY, "line 4: unknown key 'horizonh'; did"),
        ("from: plant", "form: plant", Reason.UNKNOWN_KEY, "line 9: unknown key 'form'; did you"),
        ("horizon_h: 6", "horizon_h: -6", Reason.SCENARIO_INVALID, "line 4: horizon_h"),
        ("plant.power,", "plan.power,", Reason.UNKNOWN_MEMBER, "line 9: 'plan.power' names no"),
        ("horizon_h: 6", "horizon_h: [", Reason.SCENARIO_INVALID, "line "),
        ("plant.power,", "plant.powr,", Reason.UNKNOWN_VARIABLE, "did you mean 'power'"),
        ("tests.town:Plant", "tests.town:Plantt", Reason.SCENARIO_INVALID, "Plantt"),
        ("tests.town:Plant", "tests.village:Plant", Reason.SCENARIO_INVALID, "tests.village"),
        ("plant.outage_h", "plant.outage", Reason.UNKNOWN_PARAMETER, "outage_h"),
        ("[tower.dry_hours]", "[tower.wet]", Reason.UNKNOWN_VARIABLE, "wet"),
        (
            "to: tower.pump_power",
            "to: tower.pump_power, map: {file: x.csv, source: a, target: b}",
            Reason.MISSING_FILE,
            "x.csv",
        ),
        (
            "to: tower.pump_power",
            "to: tower.pump_power, map: {file: ../../../etc/passwd, source: a, target: b}",
            Reason.MISSING_FILE,
            "does not lie in the scenario's folder",
        ),
        ("horizon_h: 6", "horizon_h: .inf", Reason.SCENARIO_INVALID, "finite"),
        ("horizon_h: 6", "horizon_h: 1e300", Reason.SCENARIO_INVALID, "146 years"),
        ("horizon_h: 6", "horizon_h: 6\npace: {factor: 1e300}", Reason.SCENARIO_INVALID, "pace"),
        ("horizon_h: 6", "horizon_h: \0", Reason.SCENARIO_INVALID, "special characters"),
        ("horizon_h: 6", "horizon_h: 2020-13-45", Reason.SCENARIO_INVALID, "month must be"),
        ("horizon_h: 6", "horizon_h: &a [*a]", Reason.SCENARIO_INVALID, "line 1: "),
        ("horizon_h: 6", f"horizon_h: {'[' * 2000}", Reason.SCENARIO_INVALID, "too deeply"),
        ("horizon_h: 6", f"horizon_h: {LAUGHS}", Reason.SCENARIO_INVALID, "over 1,000,000 long"),
    ],
)
def test_a_wrong_scenario_is_refused_with_the_line_and_the_remedy(
    old: str, new: str, reason: Reason, said: str
) -> None:
    with pytest.raises(ScenarioError) as caught:
        run_local(parse(TOWN.replace(old, new)), Case(0, 1, "none"), None)
    assert caught.value.reason is reason
    assert said in caught.value.message


def test_a_bad_request_ends_with_2_one_line_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    file.write_text(TOWN.replace("kpis", "kpi"), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["run", str(file), "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].startswith("multitwin: UNKNOWN_KEY")
    assert "Traceback" not in said
    assert not out.exists()
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert "SCENARIO_NOT_FOUND" in capsys.readouterr().err


@pytest.mark.parametrize("members", ["local", "grpc"])
def test_a_coupling_to_nothing_ends_with_2_wherever_the_members_run(
    members: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    file.write_text(TOWN.replace("plant.power,", "plant.powr,"), encoding="utf-8")
    command = ["run", str(file), "--members", members, "--runs", "3", "--out", str(tmp_path / "o")]
    assert main(command) == 2
    assert "did you mean 'power'" in capsys.readouterr().err


def test_a_request_without_an_acceptable_plan_ends_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    file.write_text(TOWN.replace("town:Plant", "town:HopelessPlant"), encoding="utf-8")
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 4
    assert "PLAN_INFEASIBLE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("twin", "said"),
    [
        ("BrokenPlant", "NOT_FINITE: plant.power[0] is nan"),
        ("InfinitePlant", "NOT_FINITE: plant.power[0] is inf"),
        ("TwofoldPlant", "WRONG_SHAPE: plant.power has 1 entities and 2 values were published"),
        ("FailingPlant", "TWIN_FAILED: plant failed: ZeroDivisionError: the turbine"),
    ],
)
def test_a_twin_that_breaks_its_contract_ends_the_run_with_3(
    twin: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    file.write_text(TOWN.replace("town:Plant", f"town:{twin}"), encoding="utf-8")
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_region_without_a_data_file_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    text = TOWN.replace(
        'plant: {class: "tests.town:Plant"}',
        'plant: {class: "twins.disaster.twin:DisasterTwin", config: {region: atlantis}}',
    )
    file.write_text(text, encoding="utf-8")
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "MISSING_FILE" in told
    assert "atlantis" in told
    assert "Traceback" not in told


def test_a_study_writes_its_summary_and_can_be_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    file.write_text(TOWN, encoding="utf-8")
    out = str(tmp_path / "out")
    assert main(["run", str(file), "--runs", "3", "--json", "--out", out]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "summary.json").read_text())
    low, high = printed["measures"]["none"]["dry_hours"]["ci95"]
    assert low <= printed["measures"]["none"]["dry_hours"]["mean"] <= high
    assert printed["runs"] == 3
    assert printed["failed_runs"] == []
    assert main(["explain", out, "--kind", "tower_empty"]) == 0
    told = capsys.readouterr().out
    assert "[plant.power -> tower.pump_power]" in told


def test_workers_do_not_change_the_digest(tmp_path: Path) -> None:
    """On Ray, in processes of its own, with one worker and with two."""
    file = tmp_path / "town.yaml"
    file.write_text(TOWN, encoding="utf-8")
    digests = []
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "federation", "run", str(file), "--json"]
        command += ["--runs", "4", "--workers", workers, "--out", str(tmp_path / workers)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        digests.append(json.loads(done.stdout)["digest"])
    assert digests[0] == digests[1]


def test_a_ray_cluster_that_is_not_there_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "town.yaml"
    file.write_text(TOWN, encoding="utf-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody can answer there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["run", str(file), "--runs", "4", "--workers", "2", "--ray", address]
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"multitwin: UNREACHABLE: there is no Ray cluster at {address}")


@given(st.integers(2, 50), st.integers(0, 2**32))
def test_a_latin_hypercube_puts_one_run_into_every_stratum(runs: int, seed: int) -> None:
    scenario = parse(TOWN)
    values = np.array([d["plant.outage_h"] for d in draws(scenario, runs, seed)])
    strata = np.floor((values - 1) / 2 * runs).astype(int)
    assert sorted(strata) == list(range(runs))


@pytest.mark.parametrize(
    ("spec", "median"),
    [
        ({"uniform": (2, 4)}, 3.0),
        ({"normal": (5, 2)}, 5.0),
        ({"lognormal": (7, 0.3)}, 7.0),
        ({"triangular": (0, 1, 2)}, 1.0),
        ({"choice": (1, 2, 3)}, 2.0),
    ],
)
def test_the_median_of_each_distribution_is_where_it_should_be(
    spec: dict[str, tuple[float, ...]], median: float
) -> None:
    found = quantile(Distribution.model_validate(spec), np.array([0.5]))
    assert found[0] == pytest.approx(median)


def test_measures_share_their_seeds_and_draws() -> None:
    text = TOWN + "measures: {none: {}, early: {parameters: {tower.start_m: 9}}}\n"
    a, b = cases(parse(text), ["none", "early"], 1, 3)
    assert a.member_seed("plant") == b.member_seed("plant")
    assert a.parameters["plant"] == b.parameters["plant"]
    assert b.parameters["tower"] == {"start_m": 9.0}


def test_an_interval_is_students() -> None:
    """For 1, 2, 3: mean 2, deviation 1, t = 4.302653 at two degrees of freedom."""
    low, high = interval(np.array([1.0, 2.0, 3.0]))["ci95"]
    assert (high - low) / 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)


def test_the_twin_of_the_readme_has_at_most_thirty_lines_and_serves(tmp_path: Path) -> None:
    """It runs in a process of its own, by `multitwin serve tower:Tower --broker ...`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "tower.py").write_text(code, encoding="utf-8")
    (tmp_path / "scenario.yaml").write_text(
        textwrap.dedent(
            """
            name: readme
            region: nowhere
            horizon_h: 48
            members: {tower: {class: "tower:Tower"}, plant: {class: "tests.town:Plant"}}
            couplings: [{from: plant.power, to: tower.pump_power}]
            parameters: {plant.outage_h: 40}
            """
        ),
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "federation", "run"),
            *(str(tmp_path / "scenario.yaml"), "--out", str(tmp_path / "out")),
            *("--members", "grpc"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    explained = subprocess.run(
        [sys.executable, "-m", "federation", "explain", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert "the tower is empty" in explained.stdout
