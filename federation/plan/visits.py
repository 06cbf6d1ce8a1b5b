"""Lists what crews could do: the visits that a plan chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from federation.twin import Vector


@dataclass(frozen=True, slots=True)
class Task:
    """One component to repair: crew-hours left, and how it stands at the decision.

    `crews` > 0 when crews are already at it or on their way, and stay until it is done; more
    may join them, up to `most_crews`. A crew that is sent is `travel_h` on its way.
    """

    member: str
    component: str
    work_h: float
    travel_h: float
    crews: float = 0.0
    most_crews: float = 1.0


@dataclass(frozen=True, slots=True)
class Visit:
    """Crews set out for a task at `start_h` and have it done at `end_h`, from the decision.

    `sent` is False where crews that are there go on alone.
    """

    task: int
    crews: float
    start_h: float
    end_h: float
    sent: bool = True


def possible_visits(
    tasks: Sequence[Task],
    crews: float,
    starts_h: Sequence[float],
    horizon_h: float,
    even_late: bool = False,
) -> list[Visit]:
    """All visits that end within the horizon, and those under way, task by task.

    Crews set out as many together as may work there: one after the other, tasks are done no later
    than side by side, and the first of them sooner. With `even_late` there are also visits that set
    out at once and end after the horizon.
    """
    visits = []
    for index, task in enumerate(tasks):
        most = min(task.most_crews, crews)
        alone_h = np.inf
        if task.crews:
            alone_h = task.work_h / task.crews
            visits.append(Visit(index, task.crews, 0.0, alone_h, sent=False))
        if most <= task.crews:
            continue
        for start_h in starts_h:
            arrival_h = start_h + task.travel_h
            if arrival_h >= alone_h:
                break
            left_h = task.work_h - (arrival_h * task.crews if task.crews else 0.0)
            end_h = arrival_h + left_h / most
            if end_h < horizon_h or task.crews or (even_late and start_h == 0.0):
                visits.append(Visit(index, most, start_h, end_h))
    return visits


def share_available(visits: Sequence[Visit], lengths_h: Vector) -> Vector:
    """[visit, period]: the share of the period that is left when the work is done."""
    close_h = np.cumsum(lengths_h)
    end_h = np.array([visit.end_h for visit in visits])[:, None]
    share: Vector = np.clip((close_h - end_h) / lengths_h, 0.0, 1.0)
    return share


def crews_engaged(
    visits: Sequence[Visit], tasks: Sequence[Task], starts_h: Sequence[float], horizon_h: float
) -> Vector:
    """[visit, slot]: crews under way or at work, on the mean of the time between two starts."""
    begin = np.array(starts_h)
    close = np.append(begin[1:], horizon_h)

    def share(from_h: Vector, to_h: Vector) -> Vector:
        inside = np.minimum(to_h[:, None], close) - np.maximum(from_h[:, None], begin)
        return np.asarray(np.maximum(inside, 0.0) / (close - begin))

    start = np.array([visit.start_h for visit in visits])
    end = np.array([visit.end_h for visit in visits])
    crews = np.array([visit.crews for visit in visits])
    before = np.array([tasks[visit.task].crews for visit in visits])
    return crews[:, None] * share(start, end) + before[:, None] * share(0.0 * start, start)
