"""What a planner knows comes back from data, of this version, and never from a program."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import federation
from federation.errors import Reason, ScenarioError
from federation.plan import keeping
from federation.plan.crews import CrewPlanner, Family
from federation.plan.dispatch import Control, Course, DispatchPlan, DispatchPlanner
from federation.twin import HOUR_NS, Planner, Session, StepInput, Vector
from tests.test_plan import feeders

GRID = Family("grid", "assign", ("f0", "f1", "f2", "f3", "f4"))
SERVE = Control("grid", "serve", "feeder", "1", ("a", "b"), 0.0, 1.0, 1.0)


def crews() -> CrewPlanner:
    made = CrewPlanner("plan", [GRID], 3.0, HOUR_NS, 72 * HOUR_NS)
    made.open(0, {"crews": 3.0})
    return made


def dispatch() -> DispatchPlanner:
    made = DispatchPlanner("none", (SERVE,), (), HOUR_NS, 0, 2 * HOUR_NS)
    made.open(0, {})
    return made


def told(session: Session, hour: int, left_h: Vector) -> tuple[object, ...]:
    inputs = {"remaining_0": left_h, "busy_0": np.zeros(5), "travel_0": np.full(5, 10.0)}
    result = session.advance(StepInput(hour * HOUR_NS, 0, inputs))
    outputs = {name: value.tobytes() for name, value in result.outputs.items()}
    return (outputs, result.actions, result.events)


def test_a_planner_goes_on_from_its_state_with_the_model_that_it_was_shown() -> None:
    first = crews()
    blocks = {"grid": feeders([1.0, 2.0, 3.0, 4.0, 5.0], [[i] for i in range(5)])}
    first.prepare(blocks)
    session = Session(first, "planner")
    told(session, 0, np.array([6.0, 5.0, 4.0, 3.0, 2.0]))
    state = first.snapshot()
    second = crews()  # is shown nothing
    second.restore(state)
    again = session.fork(second)
    assert second.snapshot() == state
    later = np.array([6.0, 5.0, 9.0, 0.0, 1.0])
    assert told(session, 24, later) == told(again, 24, later)
    assert first.snapshot() == second.snapshot()


def test_a_course_that_is_followed_comes_back() -> None:
    plan = DispatchPlan(0, (HOUR_NS,), (SERVE,), (np.array([[0.5], [1.0]]),), 1.0, float("nan"))
    first = dispatch().follower(Course("plan", plan))
    second = dispatch()
    second.restore(first.snapshot())
    assert repr(second._memory.course) == repr(Course("plan", plan))


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a planner's state was run",))


@pytest.mark.parametrize("made", [crews, dispatch])
def test_the_state_of_an_older_broker_is_refused_and_not_run(made: Callable[[], Planner]) -> None:
    known = made().snapshot()
    other = (dispatch if made is crews else crews)().snapshot()
    later = known.replace(b"planner 1", b"planner 2", 1)
    for state in (pickle.dumps(Trap()), pickle.dumps({}), later, other, b"", known[:-1]):
        planner = made()
        with pytest.raises(ScenarioError) as caught:
            planner.restore(state)
        assert caught.value.reason is Reason.INVALID_FRAME
        assert planner.snapshot() == known  # it has changed nothing
    assert keeping.VERSION == 1


def test_nothing_that_reads_what_was_kept_can_read_a_program() -> None:
    """Ray alone carries its own processes' pickles."""
    folder = Path(federation.__file__).parent
    named = {str(f.relative_to(folder)) for f in folder.rglob("*.py") if imports(f, "pickle")}
    assert named == {"scenario/engine.py"}


def imports(file: Path, module: str) -> bool:
    return any(
        line.split()[:2] in (["import", module], ["from", module])
        for line in file.read_text(encoding="utf-8").splitlines()
    )
