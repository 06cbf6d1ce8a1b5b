"""The meaning of a run, written as plainly as possible: one loop over instants, no cleverness.

The coordinator and the schedule must give the same ledger bit for bit. Nothing here is fast,
nothing looks ahead, and every visible value is found by searching the whole history. A value has
changed when its bits have, with -0.0 counted as 0.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from federation.core.coordinator import LoopPolicy
from federation.core.coupling import Coupling, Slot, Wiring
from federation.core.envelope import Envelope, Pool
from federation.core.exchange import NEVER
from federation.core.ledger import ActionRecord, EventRecord, Ledger, Record
from federation.errors import Reason, TwinError
from federation.twin import Action, Session, StepInput, StepResult, Vector


def differ(one: Vector, other: Vector) -> bool:
    return (one + 0.0).tobytes() != (other + 0.0).tobytes()


class Reference:
    """Runs sessions of a wiring one after the other, instant by instant."""

    def __init__(
        self,
        wiring: Wiring,
        sessions: Mapping[str, Session],
        horizon_ns: int,
        loop: LoopPolicy | None = None,
        pools: tuple[Pool, ...] = (),
    ) -> None:
        self.wiring = wiring
        self.sessions = sessions
        self.horizon_ns = horizon_ns
        self.policy = loop or LoopPolicy()
        self.ledger = Ledger(wiring.leads())
        self.envelope = Envelope(wiring.descriptions, wiring.actuations, pools)
        # every value ever published: (member, output) -> [(time, value)]
        self.values: dict[tuple[str, str], list[tuple[int, Vector]]] = {}
        # every explanation: (member, output, column) -> [(time, event)]
        self.reasons: dict[tuple[str, str, int], list[tuple[int, str]]] = {}
        self.next_ns = {m: d.time.offset_ns for m, d in wiring.descriptions.items()}
        self.given = {
            (s.member, s.variable.name): s.initial()
            for slots in wiring.slots.values()
            for s in slots
        }
        self.told: dict[tuple[str, str, int], tuple[str, ...]] = {}
        self.orders: list[tuple[int, Action]] = []
        self.done_orders: set[int] = set()

    def run(self) -> str:
        while (time_ns := self.next_instant()) <= self.horizon_ns:
            for unit in self.wiring.units:
                if unit.is_loop:
                    self.iterate(unit.members, time_ns)
                else:
                    self.visit(unit.members[0], time_ns)
        self.entries = self.ledger.settle(NEVER)
        return self.ledger.digest()

    def next_instant(self) -> int:
        """The earliest time at which anybody steps, or anything becomes visible to a waker."""
        times = list(self.next_ns.values())
        for coupling in self.wiring.couplings:
            if self.wiring.descriptions[coupling.target].time.wakes_on_input:
                times += [t + coupling.delay_ns for t in self.news(coupling)]
        for index, (visible_ns, action) in enumerate(self.orders):
            waker = self.wiring.descriptions[action.member].time.wakes_on_input
            if index not in self.done_orders and waker:
                times.append(visible_ns)
        return min((t for t in times if t > self.last), default=NEVER)

    last = -1

    def visit(self, member: str, time_ns: int) -> None:
        self.last = time_ns
        is_own = self.next_ns[member] == time_ns
        step = self.offer(member, time_ns, 0)
        if is_own or (self.wakes(member) and (step.inputs or step.actions)):
            self.keep(member, self.take(member, step))

    def iterate(self, members: tuple[str, ...], time_ns: int) -> None:
        self.last = time_ns
        results: dict[str, StepResult] = {}
        micros: dict[str, int] = {}
        acted: dict[str, tuple[Action, ...]] = {}
        todo = list(members)
        for _ in range(self.policy.limit + 1):
            for member in todo:
                micro = micros.get(member, 0)
                step = self.offer(member, time_ns, micro)
                is_own = micro == 0 and self.next_ns[member] == time_ns
                is_woken = (self.wakes(member) or micro > 0) and (step.inputs or step.actions)
                if not (is_own or is_woken):
                    continue
                acted.setdefault(member, step.actions)
                step = StepInput(time_ns, micro, step.inputs, step.causes, acted[member])
                results[member] = result = self.take(member, step)
                micros[member] = micro + 1
                self.publish(member, result)
            todo = [m for m in members if self.is_unsettled(m, time_ns, m in results)]
            if not todo:
                break
        else:
            raise TwinError(Reason.LOOP_NOT_CONVERGED, "the reference did not settle either")
        for member in members:
            if member in results:
                self.keep(member, results[member])

    def news(self, coupling: Coupling) -> list[int]:
        """The times at which its source published a new value or a new explanation."""
        times = [t for t, _ in self.values.get((coupling.source, coupling.output), ())]
        for (source, output, _), reasons in self.reasons.items():
            if (source, output) == (coupling.source, coupling.output):
                times += [t for t, _ in reasons]
        return times

    def is_rung(self, member: str, time_ns: int) -> bool:
        """Whether anything becomes visible to `member` at exactly this instant."""
        return any(
            time_ns - c.delay_ns in self.news(c)
            for c in self.wiring.couplings
            if c.target == member
        )

    def wakes(self, member: str) -> bool:
        return self.wiring.descriptions[member].time.wakes_on_input

    def visible(self, slot: Slot, time_ns: int) -> Vector:
        found: list[Vector | None] = []
        for wire in slot.wires:
            coupling = wire.coupling
            history = self.values.get((coupling.source, coupling.output), [])
            seen = [v for t, v in history if t + coupling.delay_ns <= time_ns]
            found.append(seen[-1] if seen else None)
        return slot.combined(found)

    def is_unsettled(self, member: str, time_ns: int, has_stepped: bool) -> bool:
        for slot in self.wiring.slots[member]:
            new, old = self.visible(slot, time_ns), self.given[member, slot.variable.name]
            limit = self.policy.tolerance * (1 + np.abs(old))
            if has_stepped and (np.abs(new - old) > limit).any():
                return True
            is_rung = self.wakes(member) and self.is_rung(member, time_ns)
            if not has_stepped and is_rung and differ(new, old):
                return True
        return False

    def offer(self, member: str, time_ns: int, micro: int) -> StepInput:
        inputs: dict[str, Vector] = {}
        causes: dict[str, dict[int, tuple[str, ...]]] = {}
        is_own = self.next_ns[member] == time_ns and micro == 0
        if not (is_own or micro or self.wakes(member)):
            return StepInput(time_ns, micro)
        is_rung = is_own or micro or self.is_rung(member, time_ns)
        for slot in self.wiring.slots[member]:
            name = slot.variable.name
            old, new = self.given[member, name], self.visible(slot, time_ns)
            if micro and self.policy.relaxation < 1:
                new = old + self.policy.relaxation * (new - old)
            if differ(new, old):
                inputs[name] = new
        actions = tuple(
            action
            for index, (visible_ns, action) in enumerate(self.orders)
            if action.member == member and visible_ns <= time_ns and index not in self.done_orders
        )
        if not (actions or (is_rung and (is_own or inputs))):
            return StepInput(time_ns, micro)
        for index, (visible_ns, action) in enumerate(self.orders):
            if action.member == member and visible_ns <= time_ns:
                self.done_orders.add(index)
        for name, value in inputs.items():
            self.given[member, name] = value
        for slot in self.wiring.slots[member]:
            name = slot.variable.name
            for row, sources in slot.sources_of.items():
                reasons: dict[str, None] = {}
                for index, column in sources:
                    coupling = slot.wires[index].coupling
                    key = (coupling.source, coupling.output, column)
                    past = [
                        e for t, e in self.reasons.get(key, ()) if t + coupling.delay_ns <= time_ns
                    ]
                    if past:
                        reasons[past[-1]] = None
                told = tuple(reasons)[:8]
                if self.told.get((member, name, row), ()) != told:
                    self.told[member, name, row] = told
                    causes.setdefault(name, {})[row] = told
        return StepInput(time_ns, micro, inputs, causes, actions)

    def take(self, member: str, step: StepInput) -> StepResult:
        return self.sessions[member].advance(step)

    def publish(self, member: str, result: StepResult) -> None:
        rank = self.wiring.rank[member]
        for name, value in result.outputs.items():
            history = self.values.setdefault((member, name), [])
            if not history or differ(history[-1][1], value):
                history.append((result.time_ns, value))
                self.ledger.add(
                    Record(result.time_ns, result.micro, rank, member, name, len(history), value)
                )

    def keep(self, member: str, result: StepResult) -> None:
        rank = self.wiring.rank[member]
        self.publish(member, result)
        for name, reasons in result.causes.items():
            for column, event_id in reasons.items():
                self.reasons.setdefault((member, name, column), []).append(
                    (result.time_ns, event_id)
                )
        for event in result.events:
            self.ledger.add(EventRecord(result.time_ns, result.micro, rank, member, event, ()))
        inputs = {
            s.variable.name: self.given[member, s.variable.name] for s in self.wiring.slots[member]
        }
        delay = {a.target: a.delay_ns for a in self.wiring.actuations if a.source == member}
        for action, refusal in self.envelope.screen(member, result.actions, inputs):
            self.ledger.add(
                ActionRecord(result.time_ns, result.micro, rank, member, action, refusal)
            )
            if not refusal:
                self.orders.append((result.time_ns + delay[action.member], action))
        policy = self.wiring.descriptions[member].time
        if policy.period_ns:
            if self.next_ns[member] <= result.time_ns:
                self.next_ns[member] = result.time_ns + policy.period_ns
        elif result.next_ns is not None:
            self.next_ns[member] = result.next_ns
        elif self.next_ns[member] <= result.time_ns:
            self.next_ns[member] = NEVER
