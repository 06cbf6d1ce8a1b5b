"""Studies whose members are services of others, with limits of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from federation.__main__ import main
from federation.errors import Reason, TwinError
from federation.scenario.archive import Study
from federation.wire.link import Link
from federation.wire.serve import ServeOptions, serving
from tests.sums import Noisy
from tests.test_study import ROOT, scenario_of


def test_a_service_says_how_many_sessions_it_takes_and_refuses_more() -> None:
    async def talk() -> None:
        async with (
            serving(Noisy, "sum", ServeOptions(max_sessions=2)) as (address, _),
            await Link.connect(address, "sum") as link,
        ):
            assert link.max_sessions == 2
            first = await link.session("sum", 1, {}, 1)
            await link.session("sum", 2, {}, 1)
            with pytest.raises(TwinError) as caught:
                await link.session("sum", 3, {}, 1)
            assert caught.value.reason is Reason.TOO_MANY_SESSIONS
            assert caught.value.metadata["max_sessions"] == "2"
            await first.close()
            await link.session("sum", 3, {}, 1)  # there is room again

    asyncio.run(talk())


def test_a_service_without_a_limit_says_none() -> None:
    async def talk() -> None:
        async with (
            serving(Noisy, "sum") as (address, _),
            await Link.connect(address, "sum") as link,
        ):
            assert link.max_sessions == 0

    asyncio.run(talk())


@contextmanager
def served(*more: str) -> Iterator[str]:
    """The address of a process that serves the twin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "federation", "serve", "tests.sums:Noisy", *more],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stderr is not None
        yield process.stderr.readline().split()[3]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_a_member_that_is_only_a_service_takes_part_in_an_ensemble(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one that has a class; three runs at a time are asked for and one is what it takes.
    Somebody else's session makes the study wait, not fail."""
    here = tmp_path / "here.yaml"
    here.write_text(json.dumps(scenario_of("Noisy")), encoding="utf-8")
    assert main(["run", str(here), "--runs", "4", "--out", str(tmp_path / "here")]) == 0
    with served("--max-sessions", "1") as address:
        there = tmp_path / "there.yaml"
        document = scenario_of("Noisy", members={"sum": {"address": address}})
        there.write_text(json.dumps(document), encoding="utf-8")
        command = ["run", str(there), "--runs", "4", "--workers", "3"]

        async def hold() -> int:
            async with await Link.connect(address, "guest") as link:
                session = await link.session("guest", 1, {}, 1)
                study = asyncio.create_task(
                    asyncio.to_thread(main, [*command, "--out", str(tmp_path / "there")])
                )
                await asyncio.sleep(1.5)
                assert not study.done()
                await session.close()
                return await study

        assert asyncio.run(hold()) == 0
        said = capsys.readouterr().err
        assert "1 runs at a time" in said
        expected = Study(tmp_path / "here").summary
        found = Study(tmp_path / "there").summary
        assert found["failed_runs"] == []
        assert found["digest"] == expected["digest"]
        assert main(["rerun", str(tmp_path / "there"), "2:none"]) == 0


def test_a_service_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "there.yaml"
    document = scenario_of("Noisy", members={"sum": {"address": "127.0.0.1:9"}})
    path.write_text(json.dumps(document), encoding="utf-8")
    assert main(["run", str(path), "--runs", "4", "--out", str(tmp_path / "out")]) == 2
    assert "UNREACHABLE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
