"""Says what one of the futures of a run is opened with: luck and parameters, drawn anew."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from federation.errors import Reason, ScenarioError
from federation.scenario.run import Case, parameters_of
from federation.scenario.sampling import quantile
from federation.scenario.spec import Scenario
from federation.twin import Vector


@dataclass(frozen=True)
class Future:
    """One of the futures that a run has after a cut.

    Those of one `number` meet the same luck, whatever is done in them. A `seed` takes the place of
    the luck that follows from the run's seed, the cut and the number; `parameters`, by
    `member.parameter`, that of values that would be drawn. `believed` are outputs by member that
    are only estimated, to be taken as the truth.
    """

    number: int = 0
    seed: int | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    believed: Mapping[str, Mapping[str, Vector]] = field(default_factory=dict)

    def case(self, scenario: Scenario, case: Case, time_ns: int) -> Case:
        """What the members of a future from `time_ns` on are opened with.

        Fails with UNKNOWN_MEMBER and UNKNOWN_PARAMETER (as far as the scenario can tell).
        """
        luck = self.seed
        if luck is None:
            text = f"{case.seed}/{case.run}/future/{time_ns}/{self.number}".encode()
            luck = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        draws = np.random.default_rng(luck)
        drawn = {
            name: float(quantile(scenario.uncertainty[name], draws.random(1))[0])
            for name in sorted(scenario.uncertainty)
        }
        for name in self.parameters:
            member, _, parameter = name.partition(".")
            if member not in scenario.members:
                raise ScenarioError(
                    Reason.UNKNOWN_MEMBER,
                    f"the run has no member {member!r}; it has {', '.join(scenario.members)}",
                    {"member": member},
                )
            if not parameter:
                raise ScenarioError(
                    Reason.UNKNOWN_PARAMETER,
                    f"{name!r} names no parameter; say member.parameter",
                    {"parameter": name},
                )
        found = parameters_of(scenario, case.measure, drawn)
        for name, value in self.parameters.items():
            member, _, parameter = name.partition(".")
            found.setdefault(member, {})[parameter] = value
        return Case(0, luck, case.measure, found)
