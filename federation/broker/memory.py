"""What is on record of a run besides its ledger, so that it can go on or be gone through again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from federation.broker.seats import Degradation, Past, Saved
from federation.broker.store import Frame, Note, Store
from federation.core.ledger import Quality
from federation.core.messages import Degraded, Ordered
from federation.errors import Reason, ScenarioError
from federation.scenario.run import Case
from federation.twin import Action
from federation.v1 import error_pb2
from federation.wire import codec, status

_CASE, _DEGRADED, _ORDER = "case", "degraded", "order"


@dataclass(frozen=True)
class Memory:
    """The case of a run, the past of its members, and what people have ordered."""

    case: Case | None = None
    pasts: Mapping[str, Past] = field(default_factory=dict)
    orders: tuple[Ordered, ...] = ()


def write_case(case: Case) -> Note:
    return Note(_CASE, 0, json.dumps(asdict(case)).encode())


def write_degraded(change: Degraded) -> Note:
    body = {"member": change.member, "quality": int(change.quality)}
    error = status.encode_error(change.error)
    told = {"reason": error.reason, "message": error.message, "metadata": dict(error.metadata)}
    return Note(_DEGRADED, change.time_ns, json.dumps({**body, "error": told}).encode())


def write_order(order: Ordered) -> Note:
    assert order.time_ns is not None
    body = {"operator": order.operator, "action": asdict(order.action)}
    return Note(_ORDER, order.time_ns, json.dumps(body).encode())


def recall(store: Store, run: str, until_ns: int | None = None) -> Memory:
    """All that is on record of a run, or what is of instants up to `until_ns`.

    Fails as `Store.journal` does, and with STORE_FAILED when the record makes no sense.
    """
    case: Case | None = None
    pasts: dict[str, Past] = {}
    orders: list[Ordered] = []
    for _, item in store.journal(run):
        if isinstance(item, Frame):
            past = pasts.setdefault(item.member, Past())
            for result in codec.decode_results(item.answer):
                if until_ns is None or result.time_ns <= until_ns:
                    past.items.append(result)
                    past.steps += 1
            continue
        said = json.loads(item.body)
        if item.kind == _CASE:
            case = Case(**said)
        elif until_ns is not None and item.time_ns > until_ns:
            continue
        elif item.kind == _DEGRADED:
            error = status.decode_error(error_pb2.Error(**said["error"]))
            change = Degradation(item.time_ns, Quality(said["quality"]), error)
            pasts.setdefault(said["member"], Past()).items.append(change)
        elif item.kind == _ORDER:
            orders.append(Ordered(said["operator"], Action(**said["action"]), item.time_ns))
        else:
            raise ScenarioError(
                Reason.STORE_FAILED,
                f"the journal of {run} has an item of the unknown kind {item.kind!r}",
                {"run": run},
            )
    for snapshot in store.snapshots(run):  # of each member the newest first
        past = pasts.get(snapshot.member, Past())
        if past.saved is None and snapshot.number <= past.steps:
            past.saved = Saved(snapshot.number, snapshot.time_ns, snapshot.state)
    return Memory(case, pasts, tuple(orders))
