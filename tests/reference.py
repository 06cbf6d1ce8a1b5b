"""The meaning of a run, written as plainly as possible: one loop over instants, no cleverness.

The coordinator and the schedule must give the same ledger bit for bit. Nothing here is fast,
nothing looks ahead, and every visible value is found by searching the whole history. A value has
changed when its bits have, with -0.0 counted as 0.0.

Members may come and go. One that joins at T has its first step at T and its offset, and sees at
T what its sources say then, whatever the delay; from then on all is as if the run had begun at T
for it. It ranks after all that joined before it. One that leaves at T makes no step at T or later,
and its last values are recorded once more at T, as held. One that is replaced at T goes on as
another session from its first step at T or later: with its state, or afresh, and then it is shown
every input and covers the span since the last step of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from federation.core.coordinator import LoopPolicy
from federation.core.coupling import Coupling, Slot, Wiring
from federation.core.envelope import Envelope, Pool
from federation.core.exchange import NEVER
from federation.core.ledger import ActionRecord, EventRecord, Ledger, Quality, Record
from federation.errors import Reason, TwinError
from federation.twin import NOTHING, Action, Event, Session, StepInput, StepResult, Vector
from federation.wire import codec


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
        leaves: Mapping[str, int] = NOTHING,
        heirs: Mapping[str, tuple[int, Session, str]] = NOTHING,
        orders: Sequence[tuple[str, Action, int, str]] = (),
        asked_by: str = "",
    ) -> None:
        """`leaves` says who leaves when; `heirs` who is replaced when, by what session and with
        which words; `orders` are those of an operator, with the instant and the event of each.
        `asked_by` is who lets members join and leave."""
        self.asked = f", as {asked_by} asked" if asked_by else ""
        self.wiring = wiring
        self.leaves = leaves
        self.heirs = dict(heirs)
        self.sessions = dict(sessions)
        self.horizon_ns = horizon_ns
        self.policy = loop or LoopPolicy()
        self.ledger = Ledger(wiring.leads())
        self.envelope = Envelope(wiring.descriptions, wiring.actuations, pools)
        # every value ever published: (member, output) -> [(time, value)]
        self.values: dict[tuple[str, str], list[tuple[int, Vector]]] = {}
        # every explanation: (member, output, column) -> [(time, event)]
        self.reasons: dict[tuple[str, str, int], list[tuple[int, str]]] = {}
        self.next_ns = {
            m: wiring.since_ns(m) + d.time.offset_ns for m, d in wiring.descriptions.items()
        }
        self.given = {
            (s.member, s.variable.name): s.initial()
            for slots in wiring.slots.values()
            for s in slots
        }
        self.told: dict[tuple[str, str, int], tuple[str, ...]] = {}
        # every action that passed: (visible from, rank of who acts, action)
        self.orders: list[tuple[int, int, Action]] = []
        self.done_orders: set[int] = set()
        for operator, action, time_ns, event_id in orders:
            self.order(event_id, operator, action, time_ns)

    def order(self, event_id: str, operator: str, action: Action, time_ns: int) -> None:
        """An operator's order stands in the ledger before all steps of its instant."""
        action = replace(action, cause=event_id)
        place = f"{action.member}.{action.actuator}[{action.entity}]"
        text = f"{operator} sets {place} to {action.value:g}"
        event = Event(event_id, time_ns, "operator_order", action.entity, text)
        self.ledger.add(EventRecord(time_ns, 0, -1, "operator", event, ()))
        self.ledger.add(ActionRecord(time_ns, 0, -1, "operator", action))
        self.orders.append((time_ns, -1, action))

    def tell(self, time_ns: int, what: str, member: str, text: str) -> None:
        """A change of members stands in the ledger before the orders of its instant."""
        event = Event(
            f"federation/{what}-{member}-{time_ns}", time_ns, f"member_{what}", member, text
        )
        self.ledger.add(EventRecord(time_ns, 0, -2, "federation", event, ()))

    def run(self) -> str:
        for arrival in self.wiring.arrivals:
            for member in arrival.members:
                self.tell(arrival.time_ns, "joined", member, f"{member} joins{self.asked}")
        while (time_ns := self.next_instant()) <= self.horizon_ns:
            for unit in self.wiring.units:
                if unit.is_loop:
                    self.iterate(unit.members, time_ns)
                else:
                    self.visit(unit.members[0], time_ns)
        for member, time_ns in self.leaves.items():
            self.tell(time_ns, "left", member, f"{member} leaves{self.asked}")
            rank = self.wiring.rank[member]
            for (owner, name), past in self.values.items():
                if owner == member:
                    held = (len(past) + 1, past[-1][1], Quality.HELD)
                    self.ledger.add(Record(time_ns, 0, rank, member, name, *held))
        self.entries = self.ledger.settle(NEVER)
        return self.ledger.digest()

    def is_gone(self, member: str, time_ns: int) -> bool:
        return time_ns >= self.leaves.get(member, NEVER)

    def next_instant(self) -> int:
        """The earliest time at which anybody steps, or anything becomes visible to a waker."""
        times = [(t, member) for member, t in self.next_ns.items()]
        for coupling in self.wiring.couplings:
            if self.wakes(coupling.target):
                times += [(coupling.visible_ns(t), coupling.target) for t in self.news(coupling)]
        for index, (visible_ns, _, action) in enumerate(self.orders):
            if index not in self.done_orders and self.wakes(action.member):
                times.append((visible_ns, action.member))
        return min((t for t, m in times if t > self.last and not self.is_gone(m, t)), default=NEVER)

    last = -1

    def visit(self, member: str, time_ns: int) -> None:
        self.last = time_ns
        if self.is_gone(member, time_ns):
            return
        is_own = self.next_ns[member] == time_ns
        step = self.offer(member, time_ns, 0)
        if is_own or (self.wakes(member) and (step.inputs or step.actions)):
            self.keep(member, self.take(member, step))

    def iterate(self, members: tuple[str, ...], time_ns: int) -> None:
        self.last = time_ns
        members = tuple(member for member in members if not self.is_gone(member, time_ns))
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
            c.visible_ns(t) == time_ns
            for c in self.wiring.couplings
            if c.target == member
            for t in self.news(c)
        )

    def wakes(self, member: str) -> bool:
        return self.wiring.descriptions[member].time.wakes_on_input

    def visible(self, slot: Slot, time_ns: int) -> Vector:
        found: list[Vector | None] = []
        for wire in slot.wires:
            coupling = wire.coupling
            history = self.values.get((coupling.source, coupling.output), [])
            seen = [v for t, v in history if coupling.visible_ns(t) <= time_ns]
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
        due = [
            (visible_ns, rank, index)
            for index, (visible_ns, rank, action) in enumerate(self.orders)
            if action.member == member and visible_ns <= time_ns and index not in self.done_orders
        ]
        actions = tuple(self.orders[index][2] for _, _, index in sorted(due))
        if not (actions or (is_rung and (is_own or inputs))):
            return StepInput(time_ns, micro)
        self.done_orders.update(index for _, _, index in due)
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
                        e for t, e in self.reasons.get(key, ()) if coupling.visible_ns(t) <= time_ns
                    ]
                    if past:
                        reasons[past[-1]] = None
                told = tuple(reasons)[:8]
                if self.told.get((member, name, row), ()) != told:
                    self.told[member, name, row] = told
                    causes.setdefault(name, {})[row] = told
        return StepInput(time_ns, micro, inputs, causes, actions)

    def take(self, member: str, step: StepInput) -> StepResult:
        session = self.sessions[member]
        from_ns, heir, text = self.heirs.get(member, (NEVER, session, ""))
        if step.time_ns >= from_ns:
            del self.heirs[member]
            self.tell(step.time_ns, "replaced", member, text)
            if "afresh" in text:
                heir.serial, heir.last_ns = session.serial, session.last_ns
                heir.input_causes.update(session.input_causes)
                seen = {slot.variable.name for slot in self.wiring.slots[member] if slot.wires}
                shown = {n: v for (m, n), v in self.given.items() if m == member and n in seen}
                step = step._replace(inputs=shown)
            else:
                codec.restore_session(heir, codec.encode_session(session))
            self.sessions[member] = heir
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
                visible_ns = result.time_ns + delay[action.member]
                there_ns = self.wiring.since_ns(action.member)
                self.orders.append((max(visible_ns, there_ns), rank, action))
        policy = self.wiring.descriptions[member].time
        if policy.period_ns:
            if self.next_ns[member] <= result.time_ns:
                self.next_ns[member] = result.time_ns + policy.period_ns
        elif result.next_ns is not None:
            self.next_ns[member] = result.next_ns
        elif self.next_ns[member] <= result.time_ns:
            self.next_ns[member] = NEVER
