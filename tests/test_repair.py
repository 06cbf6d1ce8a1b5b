"""Repair crews: the work that is caused, done and left, to the nanosecond."""

import copy
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.twin import HOUR_NS
from twins.repair import MOST_CREWS, Repairs


def test_one_crew_arrives_works_its_hours_and_is_free_again() -> None:
    repairs = Repairs(3)
    assert list(repairs.damage(np.array([0.0, 5.0, 2.0]))) == [1, 2]
    assert list(repairs.intact) == [1, 0, 0]
    assert repairs.assign(1, 1, now_ns=HOUR_NS, travel_h=0.5) == 1
    assert repairs.progress(HOUR_NS, 2 * HOUR_NS) == []
    assert repairs.remaining_h[1] == pytest.approx(4.5)
    assert list(repairs.crews) == [0, 1, 0]
    assert repairs.progress(2 * HOUR_NS, 10 * HOUR_NS) == [(1, round(6.5 * HOUR_NS))]
    assert list(repairs.intact) == [1, 1, 0]
    assert list(repairs.crews) == [0, 0, 0]


def test_a_second_crew_joins_when_it_gets_there() -> None:
    repairs = Repairs(1)
    repairs.damage(np.array([6.0]))
    repairs.assign(0, 1, 0, 1.0)
    repairs.assign(0, 2, 2 * HOUR_NS, 1.0)
    # 1 h to 3 h alone: 2 crew-hours; then two crews take 2 h for the other 4
    assert repairs.progress(0, 9 * HOUR_NS) == [(0, 5 * HOUR_NS)]


def test_a_recalled_crew_leaves_its_work_done() -> None:
    repairs = Repairs(1)
    repairs.damage(np.array([4.0]))
    repairs.assign(0, 2, 0, 0.0)
    repairs.progress(0, HOUR_NS)
    assert repairs.assign(0, 0, HOUR_NS, 0.0) == -2
    repairs.progress(HOUR_NS, 5 * HOUR_NS)
    assert repairs.remaining_h[0] == pytest.approx(2.0)
    assert repairs.crews[0] == 0


def test_an_aftershock_adds_only_what_it_costs() -> None:
    repairs = Repairs(2)
    repairs.damage(np.array([4.0, 0.0]))
    repairs.assign(0, 1, 0, 0.0)
    repairs.progress(0, HOUR_NS)
    assert list(repairs.damage(np.array([4.0, 3.0]))) == [1]
    assert list(repairs.damage(np.array([6.0, 3.0]))) == [0]
    assert list(repairs.remaining_h) == pytest.approx([5.0, 3.0])


def test_what_is_whole_takes_no_crew() -> None:
    repairs = Repairs(1)
    assert repairs.assign(0, MOST_CREWS, 0, 0.0) == 0
    assert repairs.crews[0] == 0


@given(
    work=st.floats(0.01, 200.0),
    travel=st.lists(st.floats(0.0, 30.0), min_size=1, max_size=MOST_CREWS),
    cuts=st.lists(st.integers(1, 400 * HOUR_NS), max_size=12, unique=True),
)
def test_the_end_of_a_repair_does_not_depend_on_the_steps(
    work: float, travel: list[float], cuts: list[int]
) -> None:
    repairs = Repairs(1)
    repairs.damage(np.array([work]))
    for crews, hours in enumerate(travel, start=1):
        repairs.assign(0, crews, 0, hours)
    stepwise = copy.deepcopy(repairs)
    ((_, at_once_ns),) = repairs.progress(0, 500 * HOUR_NS)
    instants = [0, *sorted(cuts), 500 * HOUR_NS]
    done = [end for a, b in pairwise(instants) for end in stepwise.progress(a, b)]
    assert len(done) == 1
    # each cut can cost a rounding of the work to a double
    assert abs(done[0][1] - at_once_ns) <= 1000
    crew_hours = sum(max(at_once_ns / HOUR_NS - hours, 0.0) for hours in travel)
    assert crew_hours == pytest.approx(work, abs=1e-6)
