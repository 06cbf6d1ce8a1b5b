"""The benchmarks answer in the form that is promised, and leave no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.turns import CONTENDERS, OWN, Contender, ContenderError, Runner, take_turns

ROOT = Path(__file__).parent.parent
HARNESS = [sys.executable, "-m", "benchmarks.federation"]


def test_a_ring_is_one_json_line_and_a_table() -> None:
    done = subprocess.run(
        [*HARNESS, "--only=local", "--cases=2x3", "--repeat=1", "--contenders=mosaik"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert list(row) == [
        *("mode", "n", "m", "t", "steps_per_s", "values_per_s", "cpu_s", "rss_mib", "ratios")
    ]
    assert (row["mode"], row["n"], row["m"]) == ("local", 2, 3)
    assert row["values_per_s"] == pytest.approx(row["steps_per_s"] * 2 * 3, rel=1e-3)
    assert row["cpu_s"] > 0
    assert row["rss_mib"] > 0
    assert all(ratio > 0 for ratio in row["ratios"].values())
    assert "2x3" in done.stderr.split("rounds/s")[-1]


def test_a_peer_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    runners = {
        OWN: Runner(CONTENDERS["local"][OWN], 2, 1),
        "broken": Runner(Contender("benchmarks.ring", "upside-down", 1e-3, 0), 2, 1),
    }
    take_turns(runners, 1, "here")
    assert list(runners) == [OWN]
    assert "here: broken is left out: there is no mode 'upside-down'" in capsys.readouterr().err


def test_the_federations_own_failure_ends_it() -> None:
    runners = {OWN: Runner(Contender("benchmarks.ring", "upside-down", 1e-3, 0), 2, 1)}
    with pytest.raises(ContenderError, match="here: there is no mode"):
        take_turns(runners, 1, "here")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_no_process_behind(by: signal.Signals) -> None:
    """It is interrupted while a contender, and the members that this one started, are at work."""
    harness = subprocess.Popen(
        [*HARNESS, "--only=grpc", "--cases=2x1", "--contenders=bare-grpc"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # who runs in the background of a shell is born deaf to SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        below = psutil.Process(harness.pid)
        deadline_s = time.monotonic() + 60
        family: list[psutil.Process] = []
        while len(family) < 3 or family != below.children(recursive=True):
            assert time.monotonic() < deadline_s
            assert harness.poll() is None
            family = below.children(recursive=True)
            time.sleep(0.2)  # nobody is just being started
        os.kill(harness.pid, by)
        assert harness.wait(30) != 0
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left
    finally:
        harness.kill()
        harness.wait()
