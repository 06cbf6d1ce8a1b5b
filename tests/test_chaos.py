"""A small part of `make chaos`: one of each kind of fault, and the counts that it prints."""

from __future__ import annotations

import asyncio

from tests.chaos.__main__ import chaos, is_good, summary
from tests.chaos.plans import named, plans

FEW = (
    "kill-mill-begin-2",
    "kill-broker-told-0",
    "nan-tower",
    "bytes-mill-truncate-up",
    "mill-raises-at-6-under-hold",
)


def test_a_federation_takes_one_fault_of_each_kind_as_it_declares() -> None:
    every = plans(5)
    few = [plan for name in FEW for plan in named(every, name)]
    verdicts = asyncio.run(chaos(few, 5))
    assert [v.problems for v in verdicts if v.kind == "bad"] == []
    found = summary(verdicts)
    assert (found["runs"], found["as_declared"]) == (5, 1)
    assert is_good(found, faults=12)
