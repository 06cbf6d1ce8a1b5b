"""The kit that grades twins and cities finds nothing wrong with good ones, and what is wrong with
others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from federation.__main__ import main
from federation.conformance.caller import Asked
from federation.conformance.grading import Finding, Grade, grade, table
from federation.errors import FederationError, Reason
from federation.twin import Description, LinearBlock, Step, Twin, Variable
from federation.wire.serve import ServeOptions, serving
from tests.cities import BIRCH_POLICY, write_birch
from tests.test_peers import city, free_ports
from tests.test_wire import ROOT, Reservoirs, bounded, process
from tests.works import Plants

RAW = str(ROOT / "tests" / "rawtwin.py")
SERVED = ServeOptions(grace_s=0.1, max_sessions=3)


def graded(twin: type[Twin], options: ServeOptions = SERVED) -> dict[str, Finding]:
    """The findings about a twin, by check."""
    found: list[Finding] = []

    async def story() -> None:
        async with serving(twin, "twin", options) as (address, _):
            found.extend(await grade(address))

    bounded(story)
    return {finding.check: finding for finding in found}


def failed(findings: Mapping[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.grade is Grade.FAIL}


class Tanks(Reservoirs):
    """The reservoirs with a block over as many periods as it is asked for, and a sound state."""

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        block = super().flexibility(periods_ns)
        assert block is not None
        (port,) = block.ports
        columns = np.arange(len(periods_ns)).reshape(1, -1)
        return replace(block, ports=(replace(port, columns=columns),))

    def snapshot(self) -> bytes:
        plain = [self.volume.tolist(), self.inflow.tolist(), self.random.bit_generator.state]
        return json.dumps(plain).encode()

    def restore(self, state: bytes) -> None:
        volume, inflow, random = json.loads(state)
        self.volume, self.inflow = np.array(volume), np.array(inflow)
        self.random.bit_generator.state = random


def test_a_twin_that_keeps_the_contract_passes_every_check_that_is_about_it() -> None:
    findings = graded(Tanks)
    assert failed(findings) == set(), table(list(findings.values()))
    left_out = {name for name, f in findings.items() if f.grade is Grade.NOT_OFFERED}
    assert left_out == {"gives nobody what it does not export"}
    assert findings["hosts as many sessions as it says"].found == "3"


def test_what_a_twin_does_without_is_no_failure() -> None:
    findings = graded(Plants, ServeOptions(grace_s=0.1))
    assert failed(findings) == set(), table(list(findings.values()))
    assert findings["goes on from a snapshot"].grade is Grade.NOT_OFFERED
    assert findings["hosts as many sessions as it says"].grade is Grade.NOT_OFFERED


def test_a_city_is_graded_as_a_twin_is(tmp_path: Path) -> None:
    found: list[Finding] = []
    files = write_birch(tmp_path, BIRCH_POLICY)

    async def story() -> None:
        async with city("birch", *files) as birch:
            found.extend(await grade(birch.address, Asked("spiffe://ash/peer/broker")))
            with pytest.raises(FederationError) as caught:
                await grade(birch.address, Asked("spiffe://cedar/peer/broker"))
            assert caught.value.reason is Reason.NOT_EXPORTED

    bounded(story)
    findings = {finding.check: finding for finding in found}
    assert failed(findings) == set(), table(found)
    assert findings["gives nobody what it does not export"].grade is Grade.PASS
    assert findings["lets nobody act unsigned"].grade is Grade.PASS
    left_out = {name for name, f in findings.items() if f.grade is Grade.NOT_OFFERED}
    assert left_out == {"says what it could do"}


# -- what it finds ---------------------------------------------------------------------------------


class Forgetful(Tanks):
    """Its generator is not in its snapshot."""

    def snapshot(self) -> bytes:
        return json.dumps([self.volume.tolist(), self.inflow.tolist(), None]).encode()

    def restore(self, state: bytes) -> None:
        volume, inflow, _ = json.loads(state)
        self.volume, self.inflow = np.array(volume), np.array(inflow)


class Gossip(Tanks):
    """Draws on a generator that all sessions share."""

    shared: ClassVar[Any] = np.random.default_rng(1)

    def advance(self, step: Step) -> None:
        self.random = type(self).shared
        super().advance(step)


class Leaky(Tanks):
    """What one session rains, another one has too."""

    others: ClassVar[dict[int, float]] = {}

    def advance(self, step: Step) -> None:
        super().advance(step)
        type(self).others[id(self)] = float(step.time_ns)
        step.publish("rain", float(len(type(self).others)))

    def close(self) -> None:
        type(self).others.pop(id(self), None)


class Fickle(Tanks):
    """Says otherwise what it is, the next time."""

    serial = itertools.count()

    def describe(self) -> Description:
        return replace(super().describe(), version=str(next(self.serial)))


class Muddled(Tanks):
    """Gives a unit that nobody knows."""

    def describe(self) -> Description:
        d = super().describe()
        wrong = tuple(
            replace(v, unit="furlongs_per_firkin") if v.name == "rain" else v for v in d.variables
        )
        return replace(d, variables=wrong)


class Vague(Tanks):
    """Has two variables of one name, and one over what there is nothing of."""

    def describe(self) -> Description:
        d = super().describe()
        (rain,) = [v for v in d.variables if v.name == "rain"]
        more = (rain, Variable("flow", "river", "1", rain.causality))
        return replace(d, variables=(*d.variables, *more))


class Credulous(Tanks):
    """Takes any bytes for a state."""

    def restore(self, state: bytes) -> None:
        if state.startswith(b"["):
            super().restore(state)


class Short(Tanks):
    """Offers over one period what it is asked over two."""

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock | None:
        return super().flexibility(periods_ns[:1])


@pytest.mark.parametrize(
    ("twin", "checks"),
    [
        (Forgetful, {"goes on from a snapshot", "refuses bad input"}),
        (Gossip, {"gives the same for the same seed"}),
        (Leaky, {"keeps sessions apart"}),
        (Muddled, {"knows its units"}),
        (Vague, {"describes itself"}),
        (Short, {"says what it could do"}),
    ],
)
def test_a_defect_of_a_model_is_found_by_the_check_that_is_about_it(
    twin: type[Twin], checks: set[str]
) -> None:
    findings = graded(twin)
    assert checks <= failed(findings), table(list(findings.values()))
    for check in checks:
        assert findings[check].advice
    # what has nothing to do with it is not blamed
    assert not failed(findings) & {"tells the time", "lets nobody act unsigned"}


def test_a_twin_that_was_written_without_care_for_bad_input_is_told_so() -> None:
    """The raw twin of the tests: good enough for a broker that asks for nothing bad."""
    with process(RAW, "--port", "0") as (_, address):
        found: list[Finding] = []

        async def story() -> None:
            found.extend(await grade(address))

        bounded(story)
    findings = {finding.check: finding for finding in found}
    assert failed(findings) == {
        "refuses bad input",
        "refuses frames that are not due",
        "refuses parameters that it does not have",
        "opens steps and closes",
    }, table(found)
    assert findings["gives the same for the same seed"].grade is Grade.PASS
    assert findings["repeats answers"].grade is Grade.PASS
    assert findings["tells the time"].grade is Grade.NOT_OFFERED
    assert "->" in table(found)


def test_the_command_says_it_for_people_and_for_programs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with process(RAW, "--port", "0") as (_, address):
        assert main(["check", address, "--json", "--only", "repeats answers"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["passed"]
        assert [f["check"] for f in told["findings"]] == ["repeats answers"]
        assert main(["check", address]) == 3
        out = capsys.readouterr()
        assert "refuses bad input" in out.out
        assert "checks failed" in out.err
    (port,) = free_ports(1)
    assert main(["check", f"127.0.0.1:{port}"]) == 2
    assert "UNREACHABLE" in capsys.readouterr().err
