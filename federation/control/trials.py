"""Tries what might be done, in futures of a live run at its broker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from federation.control.situation import Series
from federation.control.view import LiveView, Observation, Variable
from federation.core.ledger import ActionRecord
from federation.errors import FederationError, Reason, TwinError
from federation.scenario.spec import PLANNER
from federation.twin import Action, Vector
from federation.v1 import broker_pb2, scenario_pb2
from federation.wire import codec, status

Attempt = tuple[str, int | None]
"""A measure, and the number of a future or, with None, the one that the run itself is in."""

TRIES = "guard"
"""Whose actions those are that a fork begins with."""

CANCEL_S = 5.0
"""How long the broker may take to end a fork that nobody waits for any more."""


@dataclass(frozen=True)
class Trial:
    """What became of a run in one fork under one measure, from the cut on.

    `outputs` are the values at the cut and then each that was told, by member and output;
    `actions` what the measure had done, and when.
    """

    measure: str
    cut_ns: int
    outputs: Mapping[Variable, Sequence[tuple[int, Vector]]]
    actions: tuple[tuple[int, Action], ...]

    def at(self, variable: Variable, time_ns: int) -> float:
        """A scalar as it stood at an instant."""
        found = self.outputs[variable][0][1]
        for when_ns, value in self.outputs[variable]:
            if when_ns > time_ns:
                break
            found = value
        return float(found[0])

    def growth(self, weights: Mapping[Variable, float], time_ns: int) -> float:
        """By how much the weighted figure grew from the cut to an instant."""
        return sum(
            weight * (self.at(variable, time_ns) - self.at(variable, self.cut_ns))
            for variable, weight in weights.items()
        )

    def first(self, within_ns: int) -> tuple[Action, ...]:
        """What was done at the first instant at which anything was, if that is soon enough, in
        the order in which it was done.

        What would be done later is decided anew by then.
        """
        times = [when_ns for when_ns, _ in self.actions]
        if not times or times[0] > self.cut_ns + within_ns:
            return ()
        found = {
            (action.member, action.actuator, action.entity): action
            for when_ns, action in self.actions
            if when_ns == times[0]
        }
        return tuple(found.values())

    def series(self, variable: Variable) -> Series:
        points = self.outputs[variable]
        times = tuple(when_ns for when_ns, _ in points)
        return Series(times, np.array([value for _, value in points]))


class Trials:
    """Futures of one run. `figures` and `others` are the outputs that a trial brings back."""

    def __init__(self, view: LiveView, figures: Iterable[Variable], others: Iterable[Variable]):
        self._view = view
        self.wanted = tuple(dict.fromkeys((*figures, *others)))

    async def run_all(
        self, cut: Observation, attempts: Sequence[Attempt], until_ns: int
    ) -> list[Trial | FederationError]:
        """Let each attempt take its course from a cut to an instant; what came of each, in order.

        What nobody waits for any more is ended. Fails as `TryFutures` does; what the broker can't
        try, be it because it is too old or because of what was in the run, is forked.
        """
        request = scenario_pb2.TryFuturesRequest(
            name=self._view.run,
            time_ns=cut.time_ns,
            horizon_ns=until_ns,
            figures=[".".join(variable) for variable in self.wanted],
        )
        for measure, number in attempts:
            attempt = request.attempts.add(measure=measure)
            if number is not None:
                attempt.future.number = number
        found: dict[int, Trial | FederationError] = {}
        try:
            with self._view.asking():
                async for answer in self._view.scenarios.TryFutures(request):
                    measure, _ = attempts[answer.attempt]
                    found[answer.attempt] = (
                        status.decode_error(answer.error)
                        if answer.HasField("error")
                        else self._tried(cut, measure, answer)
                    )
        except FederationError as error:
            if error.reason is not Reason.UNSUPPORTED:
                raise
            forks = (self.run(cut, measure, number, until_ns) for measure, number in attempts)
            return [
                _known(forked) for forked in await asyncio.gather(*forks, return_exceptions=True)
            ]
        return [found[number] for number in range(len(attempts))]

    def _tried(
        self, cut: Observation, measure: str, answer: scenario_pb2.TryFuturesResponse
    ) -> Trial:
        outputs: dict[Variable, list[tuple[int, Vector]]] = {
            variable: [(cut.time_ns, self._at_cut(variable, cut))] for variable in self.wanted
        }
        for told in answer.told:
            value = codec.decode_vector(told.values, told.variable)
            outputs[told.member, told.variable].append((told.time_ns, value))
        actions = tuple((sent.time_ns, codec.decode_action(sent.action)) for sent in answer.sent)
        return Trial(measure, cut.time_ns, outputs, actions)

    async def run(
        self,
        cut: Observation,
        measure: str,
        future: int | None,
        until_ns: int,
        actions: Iterable[Action] = (),
    ) -> Trial:
        """The same for one attempt, in a fork that is a run of its own and begins with actions.

        Fails as `ForkRun` does, and with what the fork fails with.
        """
        view = self._view
        request = scenario_pb2.ForkRunRequest(
            name=view.run, time_ns=cut.time_ns, horizon_ns=until_ns, measure=measure
        )
        if future is not None:
            request.future.number = future
        for action in actions:
            request.operator = TRIES
            request.actions.append(codec.encode_action(action))
        with view.asking():
            answer = await view.scenarios.ForkRun(request)
            name = answer.run.name
            try:
                ended = answer.run
                if future is not None and not answer.is_future:
                    raise TwinError(Reason.UNSUPPORTED, "the broker is older than futures")
                watching = scenario_pb2.WatchRunRequest(name=name)
                async for told in view.scenarios.WatchRun(watching):
                    ended = told.run
            except BaseException:
                await asyncio.shield(self._cancel(name))
                raise
            if ended.state != scenario_pb2.Run.STATE_SUCCEEDED:
                raise (
                    status.decode_error(ended.error)
                    if ended.HasField("error")
                    else TwinError(Reason.MEMBER_LOST, f"the fork {name} was ended")
                )
            outputs = await asyncio.gather(
                *(self._told(name, variable, cut) for variable in self.wanted)
            )
            sent = await self._actions(name, cut.time_ns)
        found = dict(zip(self.wanted, outputs, strict=True))
        return Trial(measure, cut.time_ns, found, sent)

    async def lived(self, cut: Observation, until_ns: int) -> Trial:
        """What has become of the run itself, from a cut up to an instant that is settled."""
        with self._view.asking():
            outputs = await asyncio.gather(
                *(self._told(self._view.run, variable, cut) for variable in self.wanted)
            )
        told = {
            variable: [point for point in points if point[0] <= until_ns]
            for variable, points in zip(self.wanted, outputs, strict=True)
        }
        return Trial(self._view.measure, cut.time_ns, told, ())

    async def _told(
        self, fork: str, variable: Variable, cut: Observation
    ) -> list[tuple[int, Vector]]:
        """Each value of an output from the cut on, the one at the cut first."""
        member, output = variable
        request = broker_pb2.QueryHistoryRequest(
            run=fork, member=member, variable=output, start_ns=cut.time_ns + 1
        )
        points = [(cut.time_ns, self._at_cut(variable, cut))]
        try:
            answer = await self._view.broker.QueryHistory(request)
        except grpc.aio.AioRpcError as error:
            if status.from_rpc(error, fork).reason is Reason.UNKNOWN_VARIABLE:
                return points  # it has told nothing so far
            raise
        for message in answer.entries:
            told = codec.decode_vector(message.value.values.values, output)
            points.append((message.time_ns, told))
        return points

    def _at_cut(self, variable: Variable, cut: Observation) -> Vector:
        reading = cut.readings.get(variable)
        if reading is not None:
            return reading.values
        described = self._view.descriptions[variable[0]]
        known = next(v for v in described.outputs() if v.name == variable[1])
        return np.full(len(described.ids(known.kind)), known.initial)

    async def _actions(self, fork: str, cut_ns: int) -> tuple[tuple[int, Action], ...]:
        """What the planner had done after the cut."""
        request = broker_pb2.WatchRequest(run=fork, members=[PLANNER])
        found = []
        async for answer in self._view.broker.Watch(request):
            for message in answer.entries:
                entry = codec.decode_entry(message)
                is_done = isinstance(entry, ActionRecord) and not entry.refusal
                if is_done and entry.time_ns > cut_ns:
                    assert isinstance(entry, ActionRecord)
                    found.append((entry.time_ns, entry.action))
        return tuple(found)

    async def _cancel(self, fork: str) -> None:
        request = scenario_pb2.CancelRunRequest(name=fork)
        await asyncio.gather(
            self._view.scenarios.CancelRun(request, timeout=CANCEL_S), return_exceptions=True
        )


def _known(found: Trial | BaseException) -> Trial | FederationError:
    if isinstance(found, Trial | FederationError):
        return found
    raise found
