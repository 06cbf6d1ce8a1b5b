"""What the runs of a study say together: differences, dependence, rarity, cascades, SQL."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from federation.__main__ import main
from federation.errors import Reason, ScenarioError
from federation.scenario.archive import Study
from federation.scenario.cascade import frequent, graph
from federation.scenario.compare import compare, sides
from federation.scenario.engine import Engine
from federation.scenario.rare import rarity, subset_simulation
from federation.scenario.report import write_report
from federation.scenario.sensitivity import DUMMY, pawn, sobol
from federation.studies import PLANNER_FACTORY
from tests.test_study import sums, written

ANGLES = {f"sum.{name}": {"uniform": [-math.pi, math.pi]} for name in "abc"}

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
  tower.start_m: {uniform: [0, 2]}
measures: {none: {}, early: {parameters: {plant.outage_h: 1.2}}}
"""


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("town")
    (folder / "town.yaml").write_text(TOWN, encoding="utf-8")
    out = folder / "out"
    assert main(["run", str(folder / "town.yaml"), "--runs", "60", "--out", str(out)]) == 0
    return out


def told(capsys: pytest.CaptureFixture[str], *command: object) -> str:
    assert main([*map(str, command)]) == 0
    return capsys.readouterr().out


# -- dependence ----------------------------------------------------------------------------


def test_sobol_indices_of_the_ishigami_function_are_the_published_ones() -> None:
    """S1 = 0.3139, 0.4424, 0 and ST = 0.5576, 0.4424, 0.2437 for a = 7, b = 0.1 (Ishigami and
    Homma 1990; Saltelli et al. 2008, section 4.6)."""
    scenario = sums("Ishigami", uncertainty=ANGLES)
    found = sobol(Engine(scenario, PLANNER_FACTORY), "none", 1024, 1)
    assert found["runs"] == 1024 * 5
    for name, first, total in (("a", 0.3139, 0.5576), ("b", 0.4424, 0.4424), ("c", 0.0, 0.2437)):
        indices = found["kpis"]["y"][f"sum.{name}"]
        assert indices["S1"] == pytest.approx(first, abs=0.03)
        assert indices["ST"] == pytest.approx(total, abs=0.03)
        assert abs(indices["S1"] - first) < 2 * indices["S1_conf"] + 0.01


def test_what_members_draw_themselves_is_no_input_of_the_indices() -> None:
    scenario = sums("Noisy")  # x uniform, plus a standard normal variable
    found = sobol(Engine(scenario, PLANNER_FACTORY), "none", 512, 1)
    share = (1 / 12) / (1 + 1 / 12)
    assert found["kpis"]["y"]["sum.x"]["ST"] == pytest.approx(share, abs=0.03)


def test_sobol_indices_of_correlated_inputs_are_refused() -> None:
    pair = [{"of": ["sum.a", "sum.b"], "rho": 0.5}]
    scenario = sums("Ishigami", uncertainty=ANGLES, correlation=pair)
    with pytest.raises(ScenarioError, match="independent inputs"):
        sobol(Engine(scenario, PLANNER_FACTORY), "none", 16, 1)


def test_pawn_ranks_inputs_above_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For Ishigami: b before a before c in the median, as Pianosi and Wagener (2015) show; and an
    input that does nothing is no more than chance."""
    path = written(tmp_path, "Ishigami", uncertainty=ANGLES)
    assert main(["run", str(path), "--runs", "2000", "--out", str(tmp_path / "out")]) == 0
    found = pawn(Study(tmp_path / "out"), "none")["kpis"]["y"]
    assert found["sum.b"]["median"] > found["sum.a"]["median"] > 3 * found[DUMMY]["median"]
    assert found["sum.c"]["maximum"] > 2 * found[DUMMY]["maximum"]
    said = told(capsys, "sensitivity", tmp_path / "out")
    assert said.index("sum.b") < said.index("sum.a") < said.index(DUMMY)
    kept = json.loads((tmp_path / "out" / "indices.json").read_text(encoding="utf-8"))
    assert kept["pawn"]["none"]["kpis"]["y"] == found


def test_too_few_runs_for_dependence_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "Noisy")
    assert main(["run", str(path), "--runs", "10", "--out", str(tmp_path / "out")]) == 0
    assert main(["sensitivity", str(tmp_path / "out")]) == 2
    assert "TOO_FEW_RUNS: 10 good runs" in capsys.readouterr().err


# -- rarity --------------------------------------------------------------------------------

PLANE = {"sum.a": {"normal": [0, 1]}, "sum.b": {"normal": [0, 1]}}


def test_a_rare_outcome_has_the_probability_that_is_known() -> None:
    """A linear limit state at distance 3.5: Phi(-3.5) = 2.326e-4, in some 3,700 runs."""
    engine = Engine(sums("Plane", uncertainty=PLANE), PLANNER_FACTORY)
    found = rarity(engine, "sum.y", 3.5, measure="none", samples=1000, seed=1)
    exact = float(stats.norm.cdf(-3.5))
    assert found["runs"] < 5000
    assert 0.15 < found["cov"] < 0.4
    assert abs(found["probability"] - exact) < 2 * found["cov"] * exact
    again = rarity(engine, "sum.y", 3.5, measure="none", samples=1000, seed=1)
    assert again == found


@pytest.mark.parametrize("size", [1, 2, 10])
def test_the_estimate_is_unbiased_and_knows_how_unsure_it_is(size: int) -> None:
    """Over 60 seeds at beta = 3.5, in one variable and in many."""

    def distance(z: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        total: np.ndarray = z.sum(axis=1) / math.sqrt(size)
        return total

    found = [subset_simulation(distance, size, 3.5, 1000, seed) for seed in range(60)]
    exact = float(stats.norm.cdf(-3.5))
    values = np.array([one.probability for one in found])
    spread = float(values.std(ddof=1)) / exact
    assert abs(values.mean() - exact) < 3 * spread * exact / math.sqrt(60)
    assert np.mean([one.cov for one in found]) == pytest.approx(spread, rel=0.35)


def test_a_less_rare_outcome_agrees_with_counting() -> None:
    """P(x + noise > 2.5), noise drawn by the twin itself: the estimate covers both."""
    engine = Engine(sums("Noisy"), PLANNER_FACTORY)
    found = rarity(engine, "y", 2.5, measure="none", samples=1000, seed=3)
    rng = np.random.default_rng(5)
    counted = rng.random(10**6) + rng.standard_normal(10**6) > 2.5
    exact = float(counted.mean())
    assert abs(found["probability"] - exact) < 3 * found["cov"] * exact
    assert found["ci95"][0] < exact < found["ci95"][1]


def test_correlation_makes_a_joint_outcome_more_probable() -> None:
    """a + b has the deviation sqrt(2 + 2 rho)."""
    pair = [{"of": ["sum.a", "sum.b"], "rho": 0.8}]
    engine = Engine(sums("Plane", uncertainty=PLANE, correlation=pair), PLANNER_FACTORY)
    found = rarity(engine, "y", 3.5, measure="none", samples=1000, seed=1)
    exact = float(stats.norm.cdf(-3.5 / math.sqrt(1.8)))
    assert abs(found["probability"] - exact) < 3 * found["cov"] * exact


def test_an_outcome_that_never_comes_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "Figure")
    command = ["rare", str(path), "--kpi", "sum.y", "--above", "1.5", "--samples", "100"]
    said = json.loads(told(capsys, *command, "--json"))
    assert not said["is_reached"]
    assert said["ci95"][0] == 0.0
    assert "no run came there" in told(capsys, *command)
    assert main([*command[:3], "sum.z", *command[4:]]) == 2
    assert "UNKNOWN_VARIABLE" in capsys.readouterr().err


# -- differences ---------------------------------------------------------------------------


def test_measures_of_one_study_are_compared_run_by_run(
    town: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = json.loads(told(capsys, "compare", f"{town}:none", f"{town}:early", "--json"))
    paired = Study(town).summary["paired"]["early"]["dry_hours"]
    assert found["method"] == "paired"
    assert found["runs"] == 60
    assert found["kpis"]["dry_hours"]["difference"] == pytest.approx(paired["mean"])
    assert found["kpis"]["dry_hours"]["ci95"] == pytest.approx(paired["ci95"])
    assert found["kpis"]["dry_hours"]["excludes_0"]


def test_studies_with_other_seeds_are_compared_by_welch(tmp_path: Path) -> None:
    path = written(tmp_path, "Noisy")
    for seed, runs in ((1, 30), (2, 20)):
        out = str(tmp_path / str(seed))
        assert main(["run", str(path), "--runs", str(runs), "--seed", str(seed), "--out", out]) == 0
    ((a, b),) = sides(str(tmp_path / "1"), str(tmp_path / "2"))
    found = compare(a, b)
    assert found["method"] == "welch"
    left, right = (s.study.good("none")["kpi.y"].to_numpy() for s in (a, b))
    reference = stats.ttest_ind(right, left, equal_var=False).confidence_interval()
    assert found["kpis"]["y"]["ci95"] == pytest.approx([reference.low, reference.high])
    same = compare(a, a)
    assert same["method"] == "paired"
    assert same["kpis"]["y"]["ci95"] == [0.0, 0.0]


def test_a_comparison_with_nobody_is_told(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{town}:late", f"{town}:none"]) == 2
    assert "no measure 'late'; it has none, early" in capsys.readouterr().err
    assert main(["compare", str(town / "nowhere")]) == 2
    assert "RUN_NOT_FOUND" in capsys.readouterr().err


# -- tables --------------------------------------------------------------------------------


def test_a_study_answers_in_sql_arrow_and_pandas(
    town: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = 'SELECT measure, avg("kpi.dry_hours") AS dry FROM runs GROUP BY measure ORDER BY dry'
    rows = list(csv.DictReader(io.StringIO(told(capsys, "query", town, sql))))
    summary = Study(town).summary["measures"]
    assert [row["measure"] for row in rows] == ["early", "none"]
    for row in rows:
        mean = summary[row["measure"]]["dry_hours"]["mean"]
        assert float(row["dry"]) == pytest.approx(mean)
    line = told(capsys, "query", town, "SELECT count(*) AS n FROM series", "--json")
    assert json.loads(line) == {"n": 60 * 2 * 3 * 7}  # runs, measures, scalars, hours
    study = Study(town)
    assert isinstance(study.runs, pa.Table)
    assert study.frame().groupby("measure")["kpi.dry_hours"].mean()["none"] == pytest.approx(
        summary["none"]["dry_hours"]["mean"]
    )
    assert study.reference("events", "early")["kind"].to_pylist()[0] == "outage"
    kinds = study.query("SELECT DISTINCT measure, kind FROM events ORDER BY ALL").to_pylist()
    assert {"measure": "none", "kind": "outage"} in kinds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert study.query("SELECT owner FROM ledger LIMIT 1").num_rows == 1


@pytest.mark.parametrize(
    "sql",
    [
        "COPY runs TO 'stolen.csv'",
        "CREATE TABLE x AS SELECT 1",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT 1; SELECT 2",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT nothing FROM runs",
        "",
    ],
)
def test_a_query_can_only_read_the_study(
    sql: str, town: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["query", str(town), sql]) == 2
    assert capsys.readouterr().err.startswith("multitwin: QUERY_FAILED")


# -- cascades ------------------------------------------------------------------------------


def test_paths_are_counted_over_all_runs(town: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Study(town)
    dry = study.good("none")["kpi.dry_hours"]
    found = json.loads(told(capsys, "cascade", town, "--json"))
    assert found == frequent(study, "none", 20)
    assert found["paths"][0]["kinds"] == ["power/outage", "water/tower_empty"]
    edge = graph(study, "none").edges["power/outage", "water/tower_empty"]
    assert edge["runs"] <= int((dry > 0).sum()) <= edge["runs"] + 1
    assert found["edges"][0]["runs"] == edge["runs"]
    assert "power/outage -> water/tower_empty" in told(capsys, "cascade", town)


def test_runs_at_quantiles_are_explained_by_their_causes(
    town: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(capsys, "quantiles", town, "--kpi", "dry_hours", "--at", "50,95")
    study = Study(town)
    bad = study.nearest("dry_hours", "none", 0.95)
    dry = study.good("none")["kpi.dry_hours"]
    assert f"95 %: dry_hours = {dry[bad]:g} in run {bad} under none" in said
    assert abs(dry[bad] - np.quantile(dry, 0.95)) == (dry - np.quantile(dry, 0.95)).abs().min()
    assert "[plant.power -> tower.pump_power]" in said
    assert (town / "explained" / f"{bad}-none").is_dir()
    assert main(["sensitivity", str(town)]) == 0
    page = write_report(town).read_text(encoding="utf-8")
    for section in ("paths", "explained", "indices"):
        assert f'<section id="{section}">' in page
    assert "Outage <small>" not in page  # kinds are words
    assert "outage <small>(power)</small> &rarr; tower empty <small>(water)</small>" in page
    assert f"in run {bad} (" in page
    assert "Chance alone" in page
    with pytest.raises(ScenarioError) as caught:
        study.nearest("wet_hours", "none", 0.5)
    assert caught.value.reason is Reason.UNKNOWN_VARIABLE
