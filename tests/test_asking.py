"""A planner asks what is best to do at an instant of a run, and what else there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation.__main__ import main
from tests.valley import SCENARIO


def ask(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, str, str]:
    file = folder / "valley.yaml"
    file.write_text(SCENARIO)
    code = main(["plan", str(file), *options])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_a_plan_from_an_instant_is_the_best_that_crews_can_do_from_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bridges with 3, 4 and 5 h of work, 10, 20 and 30 min away, are worth 3,000, 2,000 and 1,000
    USD an hour while they are open; the third waits for the next start, at hour 6."""
    code, out, _ = ask(capsys, tmp_path, "--at", "8", "--json")
    told = json.loads(out)
    hours = (24 - 3 - 1 / 6, 24 - 4 - 1 / 3, 24 - 6 - 5 - 1 / 2)
    worth = sum(h * usd for h, usd in zip(hours, (3e3, 2e3, 1e3), strict=True))
    assert code == 0
    assert told["time_ns"] == 8 * 3600 * 10**9
    assert told["schedule"]["cost_usd"] == pytest.approx(-worth)
    assert told["actions"] == [
        "crews: 1 to town B1 at hour 0",
        "crews: 1 to town B2 at hour 0",
        "crews: 1 to town B3 at hour 6",
    ]
    assert [a["more_usd"] for a in told["alternatives"]] == pytest.approx([6e3, 12e3])
    assert told["worth"][0]["plan_usd"] == pytest.approx(6e3)


def test_what_was_done_until_then_and_the_number_of_crews_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, few, _ = ask(capsys, tmp_path, "--at", "8", "--crews", "1")
    _, later, _ = ask(capsys, tmp_path, "--at", "8", "--measure", "nearest")
    assert few.startswith("hour 8: 3 repairs, 1 crews; ")
    assert "crews: 1 to town B1 at hour 0" in few
    assert "those at town B2 go on" in later
    assert "next best plans" in few


@pytest.mark.parametrize("option", ["--seed", "--run", "--alternatives", "--bindings"])
def test_a_number_below_0_is_refused_by_the_option(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        ask(capsys, tmp_path, option, "-1")
    assert ended.value.code == 2
    assert f"argument {option}: must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--at", "24"), "goes from hour 0 to 24"),
        (("--at", "0"), "nothing is left to repair at hour 0"),
        (("--measure", "sleep"), "no measure 'sleep'"),
        (("--extra", "a pump", "much", "town: x"), "'much' is no number"),
        (("--at", "8", "--extra", "a pump", "1", "town: x"), "no block has 'town: x'"),
    ],
)
def test_a_question_that_can_not_be_asked_is_refused_with_the_remedy(
    options: tuple[str, ...],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, error = ask(capsys, tmp_path, *options)
    assert code in (2, 4)
    assert out == ""
    assert why in error
