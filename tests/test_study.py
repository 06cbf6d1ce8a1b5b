"""Studies from draw to digest: what is drawn, when it is enough, and what survives what."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from federation.__main__ import main
from federation.errors import Reason, ScenarioError
from federation.scenario.archive import Study
from federation.scenario.course import Course
from federation.scenario.design import design, read_design
from federation.scenario.engine import Engine
from federation.scenario.sampling import draws
from federation.scenario.spec import Scenario, Stop, parse
from federation.scenario.stopping import Stopping
from federation.studies import PLANNER_FACTORY

ROOT = Path(__file__).parent.parent


def sums(twin: str = "Noisy", **more: Any) -> Scenario:
    return Scenario.model_validate(scenario_of(twin, **more))


def scenario_of(twin: str, config: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "name": "sums",
        "region": "nowhere",
        "horizon_h": 1,
        "members": {"sum": {"class": f"tests.sums:{twin}", "config": dict(config or {})}},
        "uncertainty": {"sum.x": {"uniform": [0, 1]}},
        **more,
    }


def written(folder: Path, twin: str, config: Mapping[str, Any] | None = None, **more: Any) -> Path:
    path = folder / "sums.yaml"
    path.write_text(json.dumps(scenario_of(twin, config, **more)), encoding="utf-8")
    return path


def multitwin(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "federation", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=ROOT,
        check=False,
    )


# -- what is drawn -----------------------------------------------------------------------

TWO: dict[str, Any] = {
    "members": {"sum": {"class": "tests.sums:Plane"}},
    "uncertainty": {"sum.a": {"normal": [0, 1]}, "sum.b": {"lognormal": [2, 0.5]}},
}


def test_correlated_parameters_keep_their_distributions_and_go_together() -> None:
    """rho of the normal variables behind them; the rank correlation is 6/pi asin(rho/2)."""
    pair = [{"of": ["sum.a", "sum.b"], "rho": 0.8}]
    drawn = draws(sums(**TWO, correlation=pair), 4000, 3)
    a, b = (np.array([d[name] for d in drawn]) for name in ("sum.a", "sum.b"))
    assert stats.kstest(a, "norm").pvalue > 1e-3
    assert stats.kstest(np.log(b / 2) / 0.5, "norm").pvalue > 1e-3
    assert np.corrcoef(a, np.log(b))[0, 1] == pytest.approx(0.8, abs=0.02)
    expected = 6 / np.pi * np.arcsin(0.8 / 2)
    assert stats.spearmanr(a, b).statistic == pytest.approx(expected, abs=0.02)


def test_a_correlation_that_no_variables_can_have_is_refused_with_its_line() -> None:
    text = (
        "name: x\nregion: y\nhorizon_h: 1\nmembers: {sum: {class: 'tests.sums:Ishigami'}}\n"
        "uncertainty: {sum.a: {uniform: [0, 1]}, sum.b: {uniform: [0, 1]}, "
        "sum.c: {uniform: [0, 1]}}\ncorrelation:\n  - {of: [sum.a, sum.b], rho: 0.9}\n"
        "  - {of: [sum.b, sum.c], rho: 0.9}\n  - {of: [sum.a, sum.c], rho: -0.9}\n"
    )
    with pytest.raises(ScenarioError) as caught:
        parse(text)
    assert caught.value.reason is Reason.SCENARIO_INVALID
    assert "not positive definite" in caught.value.message
    assert parse(text.replace("-0.9", "0.7")).copula() is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correlation": [{"of": ["sum.x", "sum.z"], "rho": 0.1}]}, "sum.z is not uncertain"),
        ({"correlation": [{"of": ["sum.x", "sum.x"], "rho": 0.1}]}, "no pair"),
        ({"sampling": "monte-carlo"}, "neither latin-hypercube nor sobol"),
        ({"stop": {"runs": 3, "kpi": "sum.y"}}, "give runs, or kpi"),
        ({"stop": {"kpi": "sum.y"}}, "give runs, or kpi"),
        ({"stop": {"kpi": "weighted", "half_width": 1}}, "needs weights"),
        ({"stop": {"kpi": "sum.z", "half_width": 1}, "kpis": ["sum.y"]}, "not among the kpis"),
    ],
)
def test_uncertainty_that_makes_no_sense_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sums(**change)


def test_sobol_points_fill_the_range_more_evenly_than_chance() -> None:
    values = sorted(d["sum.x"] for d in draws(sums(sampling="sobol"), 64, 1))
    assert [int(v * 64) for v in values] == list(range(64))  # one in each of 64 parts


def test_given_samples_are_taken_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "given.csv").write_text("sum.x\n0.5\n7\n-1e3\n", encoding="utf-8")
    scenario = sums(sampling="given.csv").model_copy(update={"folder": tmp_path})
    assert [d["sum.x"] for d in draws(scenario, 3, 1)] == [0.5, 7.0, -1000.0]
    with pytest.raises(ScenarioError, match="samples for 3 runs, and 4"):
        draws(scenario, 4, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sum.x\n1\nnan\n", "line 3: 'nan' is no finite number"),
        ("sum.x\n1\n\n two\n", "is no finite number"),
        ("sum.z\n1\n1\n", "no column for the uncertain parameter sum.x"),
        ("sum.x,son.y\n1,2\n", "'son.y' names no parameter"),
    ],
)
def test_samples_that_can_not_be_used_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "given.csv").write_text(text, encoding="utf-8")
    scenario = sums(sampling="given.csv").model_copy(update={"folder": tmp_path})
    with pytest.raises(ScenarioError, match=said):
        draws(scenario, 2, 1)


# -- when it is enough ---------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_a_study_stops_at_the_same_run_in_whatever_order_runs_end(seed: int, order: int) -> None:
    rule = Stop.model_validate(
        {"kpi": "sum.y", "half_width": 0.4, "least_runs": 5, "most_runs": 60}
    )
    rng = np.random.default_rng(seed)
    runs = [(run, m) for run in range(60) for m in ("none", "other")]
    values = {key: float(rng.standard_normal()) for key in runs}
    failed = {key for key in runs if rng.random() < 0.1}
    found = []
    for shuffled in (False, True):
        heard = list(runs)
        if shuffled:
            random.Random(order).shuffle(heard)
        stopping = Stopping(rule, ("none", "other"), 60)
        for key in heard:
            stopping.hear(*key, None if key in failed else {"y": values[key]})
        assert stopping.is_over
        found.append(stopping.runs)
    assert found[0] == found[1]
    if found[0] < 60:
        for measure in ("none", "other"):
            kept = [values[run, measure] for run in range(found[0]) if (run, measure) not in failed]
            half = stats.t.ppf(0.975, len(kept) - 1) * np.std(kept, ddof=1) / len(kept) ** 0.5
            assert half <= 0.4 * (1 + 1e-9)
            assert len(kept) >= 5


def test_a_study_with_a_width_does_as_many_runs_as_it_needs(tmp_path: Path) -> None:
    """Mean 0.5 and deviation sqrt(1 + 1/12): a half width of 0.3 takes about 50 runs."""
    rule = {"kpi": "sum.y", "half_width": 0.3, "most_runs": 400}
    path = written(tmp_path, "Noisy", stop=rule)
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 0
    study = Study(tmp_path / "out")
    low, high = study.summary["measures"]["none"]["y"]["ci95"]
    assert (high - low) / 2 <= 0.3
    assert 25 <= study.summary["runs"] <= 90
    assert study.runs.num_rows == study.summary["runs"]
    before = study.good("none")["kpi.y"].to_numpy()[:-1]
    half = stats.t.ppf(0.975, before.size - 1) * np.std(before, ddof=1) / before.size**0.5
    assert half > 0.3  # one run less was not enough


def test_a_stopping_rule_on_an_unknown_kpi_is_told_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "Noisy", stop={"kpi": "sum.z", "half_width": 0.3})
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "UNKNOWN_VARIABLE: stop: sum.z is no KPI of this study; it has y" in (
        capsys.readouterr().err
    )


# -- what survives what --------------------------------------------------------------------


def test_failed_runs_are_collected_and_each_comes_again_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path, "Fragile"), tmp_path / "out"
    assert main(["run", str(path), "--runs", "20", "--seed", "5", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    failed = summary["failed_runs"]
    assert len(failed) == 2  # of a Latin hypercube of 20
    assert {one["seed"] for one in failed} == {5}
    assert f"multitwin rerun {out} {failed[0]['run']}:none" in said
    assert main(["rerun", str(out), f"{failed[0]['run']}:none"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"] == failed[0]["error"]
    assert "the same as in the study" in captured.err
    good = next(run for run in range(20) if run not in {one["run"] for one in failed})
    only = ["--only", f"{good}:none", "--runs", "20", "--seed", "5", "--out", str(tmp_path / "o")]
    assert main(["run", str(path), *only]) == 0
    digest = json.loads(capsys.readouterr().out)["digest"]
    assert digest == Study(out).good("none").loc[good, "digest"]
    assert main(["rerun", str(out), "20:none"]) == 2
    assert "RUN_NOT_FOUND" in capsys.readouterr().err


def test_a_run_that_gives_something_else_than_in_its_study_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path, "Noisy"), tmp_path / "out"
    assert main(["run", str(path), "--runs", "3", "--out", str(out)]) == 0
    changed = (out / "scenario.yaml").read_text(encoding="utf-8").replace("Noisy", "Slow")
    (out / "scenario.yaml").write_text(changed, encoding="utf-8")
    assert main(["rerun", str(out), "1:none"]) == 2
    assert "DESCRIPTION_DIFFERS" in capsys.readouterr().err


@settings(max_examples=8)
@given(st.data())
def test_a_study_that_is_cut_anywhere_ends_with_the_same_digest(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Runs come in any order and in parts of any size, and each life of the driver loses what it
    has not written; torn files of a part that was never finished do not count."""
    folder = tmp_path_factory.mktemp("cut")
    found = design(sums(measures={"none": {}, "more": {"parameters": {"sum.x": 2}}}), runs=6)
    engine = Engine(found.scenario, PLANNER_FACTORY)
    keep = lambda case: case.run == 0  # noqa: E731
    findings = list(engine.findings(found.cases, keep=keep))
    whole = {(f.case.run, f.case.measure): f for f in findings}
    expected = [f.row["digest"] for f in findings]
    course = Course(found, folder)
    for _ in range(20):
        todo = list(course.todo())
        lasts = data.draw(st.integers(0, len(todo)))
        order = data.draw(st.permutations(todo))
        for case in order[:lasts]:
            course.take(whole[case.run, case.measure])
            if data.draw(st.booleans()):
                course.pause()
        if course.is_over():
            break
        if (folder / "study.json").is_file():
            parts = folder / "parts"
            parts.mkdir(exist_ok=True)
            torn = len(list(parts.glob("runs-*.parquet"))) + 1
            (parts / f"series-{torn:05d}.parquet").write_bytes(b"PAR1 torn")
            (parts / f"runs-{torn:05d}.parquet.part").write_bytes(b"PAR1 torn")
            if torn > 1:  # a reader sees one table meanwhile
                assert 0 < Study(folder).runs.num_rows <= 12
            course = Course(read_design(folder), folder, resumed=True)
        else:
            course = Course(found, folder)
    else:
        for case in course.todo():
            course.take(whole[case.run, case.measure])
    rows = course.gather()
    assert [row["digest"] for row in rows] == expected
    assert Study(folder).series.num_rows == 12 * 2


def test_a_driver_that_is_killed_is_resumed_to_the_digest_of_an_undisturbed_study(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, "Slow", {"pause_s": 0.05})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    driver = subprocess.Popen(
        [sys.executable, "-m", "federation", "run", str(path), "--runs", "60", "--out", str(cut)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_part(cut, driver)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (cut / "summary.json").exists()
    assert 0 < Study(cut).runs.num_rows < 60
    resumed = multitwin("resume", cut, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert "runs are there already" in resumed.stderr
    assert main(["run", str(path), "--runs", "60", "--out", str(whole)]) == 0
    expected = Study(whole).summary
    told = json.loads(resumed.stdout)
    for key in ("digest", "runs", "measures", "cascade"):
        assert told[key] == expected[key]
    assert not (cut / "parts").exists()
    again = multitwin("resume", cut, "--json")
    assert json.loads(again.stdout)["digest"] == expected["digest"]


def _wait_for_part(folder: Path, driver: subprocess.Popen[Any]) -> None:
    deadline_s = time.monotonic() + 60
    while not list(folder.glob("parts/runs-*.parquet")):
        assert driver.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_study_on_workers_is_resumable_and_leaves_nobody_behind(
    tmp_path: Path, by: signal.Signals
) -> None:
    path, cut = written(tmp_path, "Slow", {"pause_s": 0.05}), tmp_path / "cut"
    driver = subprocess.Popen(
        [
            *(sys.executable, "-m", "federation", "run", str(path), "--runs", "400"),
            *("--workers", "2", "--out", str(cut)),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # who runs in the background of a shell is born deaf to SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        _wait_for_part(cut, driver)
        family = psutil.Process(driver.pid).children(recursive=True)
        assert len(family) > 2
        os.kill(driver.pid, by)
        _, said = driver.communicate(timeout=60)
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left
    finally:
        driver.kill()
        driver.wait()
    if by is signal.SIGINT:
        assert driver.returncode == 130
        assert f"multitwin resume {cut}" in said
    assert driver.returncode != 0
    assert not list(cut.rglob("*.part"))
    assert not (cut / "summary.json").exists()
    for part in cut.glob("parts/*.parquet"):
        pq.read_table(part)
    assert 0 < Study(cut).runs.num_rows < 400


def test_a_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    """It is killed from within, once; its runs are done again by another."""
    mark, out = tmp_path / "mark", tmp_path / "out"
    path = written(tmp_path, "Deadly", {"mark": str(mark)})
    done = multitwin("run", path, "--runs", 12, "--workers", 2, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    told = json.loads(done.stdout)
    assert told["failed_runs"] == []
    assert main(["run", str(path), "--runs", "12", "--out", str(tmp_path / "calm")]) == 0
    assert told["digest"] == Study(tmp_path / "calm").summary["digest"]


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """A Ray cluster of two processors with nothing in it of ours, and its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={port}", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as head:
        try:
            assert head.stdout is not None
            assert any("Ray runtime started" in line for line in head.stdout)
            yield f"127.0.0.1:{port}"
        finally:
            family = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            _, left = psutil.wait_procs(family, timeout=20)
            for process in left:
                process.kill()


def test_a_cluster_that_loses_a_worker_gives_the_digest_of_one_process() -> None:
    """The worker is killed from outside, as it may be when a machine of the cluster goes."""
    # Ray's sockets lie there, whose paths may be 107 characters long
    with tempfile.TemporaryDirectory(dir="/tmp") as name, cluster(Path(name) / "ray") as address:
        path, out = written(Path(name), "Slow", {"pause_s": 0.02}), Path(name) / "out"
        command = [sys.executable, "-m", "federation", "run", str(path), "--runs", "300"]
        command += ["--ray", address, "--out", str(out)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as driver:
            _wait_for_part(out, driver)
            _busy_at(address).kill()
            _, said = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
        found = Study(out).summary
        assert found["failed_runs"] == []
        calm = Path(name) / "calm"
        assert main(["run", str(path), "--runs", "300", "--out", str(calm)]) == 0
        assert found["digest"] == Study(calm).summary["digest"]


def _busy_at(address: str) -> psutil.Process:
    """A worker of this cluster that has a task."""
    port, give_up_s = address.rpartition(":")[2], time.monotonic() + 20
    while time.monotonic() < give_up_s:
        for process in psutil.process_iter(["cmdline"]):
            if "ray::_do" not in " ".join(process.info["cmdline"] or ()):
                continue
            if any(f":{port}" in " ".join(each.cmdline()) for each in process.parents()):
                return process
    raise AssertionError("no worker of the cluster is at work")
