"""The limits that every action must respect, checked where no optimiser can reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from federation.core.coupling import Actuation
from federation.twin import Action, Actuator, Description, Vector


@dataclass(frozen=True, slots=True)
class Pool:
    """A resource that several actuators share, such as repair crews.

    What is in use at the instant of a decision is read from inputs of the deciding `member`:
    `in_use[i]` says, entity by entity, what `actuators[i]` (member, actuator) has set. A
    decision may raise the sum of all setpoints to `total` at most.
    """

    name: str
    member: str
    total: float
    in_use: tuple[str, ...]
    actuators: tuple[tuple[str, str], ...]


class Envelope:
    """Says of each action why it is refused, or nothing if it may pass.

    A refusal is a sentence; the run goes on without the action and the ledger keeps both.
    """

    def __init__(
        self,
        descriptions: Mapping[str, Description],
        actuations: tuple[Actuation, ...],
        pools: tuple[Pool, ...] = (),
    ) -> None:
        self._allowed = {(a.source, a.target) for a in actuations}
        self._actuators: dict[tuple[str, str], tuple[Actuator, frozenset[str]]] = {
            (member, actuator.name): (actuator, frozenset(description.ids(actuator.kind)))
            for member, description in descriptions.items()
            for actuator in description.actuators
        }
        self._pools = pools
        self._rows: dict[tuple[str, str], dict[str, int]] = {}
        """Per pool and input, where each entity stands in the input."""
        for pool in pools:
            description = descriptions[pool.member]
            kinds = {v.name: v.kind for v in description.inputs()}
            for name in pool.in_use:
                rows = {entity: i for i, entity in enumerate(description.ids(kinds[name]))}
                self._rows[pool.name, name] = rows

    def screen(
        self, source: str, actions: tuple[Action, ...], inputs: Mapping[str, Vector]
    ) -> tuple[tuple[Action, str], ...]:
        """Each action of one step with its refusal ("" when it passes), in the given order."""
        used = {
            pool.name: float(sum(np.sum(inputs[name]) for name in pool.in_use))
            for pool in self._pools
            if pool.member == source
        }
        verdicts = []
        for action in actions:
            refusal = self._refusal(source, action)
            if not refusal:
                for pool in self._pools:
                    target = (action.member, action.actuator)
                    if pool.name not in used or target not in pool.actuators:
                        continue
                    name = pool.in_use[pool.actuators.index(target)]
                    now = float(inputs[name][self._rows[pool.name, name][action.entity]])
                    more = action.value - now
                    if used[pool.name] + more > pool.total + 1e-9:
                        refusal = (
                            f"{pool.name}: {used[pool.name]:g} of {pool.total:g} in use, "
                            f"{more:g} more asked for"
                        )
                        break
                    used[pool.name] += more
            verdicts.append((action, refusal))
        return tuple(verdicts)

    def _refusal(self, source: str, action: Action) -> str:
        if (source, action.member) not in self._allowed:
            return f"{source} has no right to act on {action.member}"
        return self.fault(action)

    def fault(self, action: Action) -> str:
        """What is wrong with an action whoever asks for it, or nothing."""
        found = self._actuators.get((action.member, action.actuator))
        if found is None:
            return f"{action.member} has no actuator {action.actuator!r}"
        actuator, entities = found
        if action.entity not in entities:
            return f"{action.member}.{action.actuator} has no entity {action.entity!r}"
        if not math.isfinite(action.value):
            return f"{action.value} is not a setpoint"
        if not actuator.low <= action.value <= actuator.high:
            return (
                f"{action.value:g} {actuator.unit} is outside "
                f"{actuator.low:g}..{actuator.high:g} {actuator.unit}"
            )
        return ""
