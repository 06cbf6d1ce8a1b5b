"""What is on record of a run besides its ledger, so that it can go on or be gone through again."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from federation.broker.seats import Degradation, Past, Place, Saved, Succession
from federation.broker.store import Frame, Item, Note, Store
from federation.core.ledger import Quality
from federation.core.messages import Degraded, Left, Ordered
from federation.errors import Reason, ScenarioError
from federation.peer.live import Absence
from federation.scenario.future import Future
from federation.scenario.run import Case
from federation.twin import NO_DESK, Action, Description, DeskStep, StepResult
from federation.v1 import error_pb2, twin_pb2
from federation.wire import codec, status

LATE, ABSENCE = "late", "absence"
"""Kinds of notes that tell of an outage, and that a run does not go by."""


@dataclass(frozen=True, slots=True)
class Added:
    """Members that joined at `time_ns`, as the document says that brought them."""

    document: str
    time_ns: int
    operator: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a run comes from: the run that it has its past from, and the instant of the cut.

    A replay goes through the record of that run again, whose digest it must give; those who
    are `recorded` are no services in it. After the cut a run may be in another `future`.
    """

    run: str
    until_ns: int
    is_replay: bool = False
    recorded: tuple[str, ...] = ()
    future: Future | None = None


Asked = Ordered | Left | Added
"""What people asked of a run and got, as it is on record."""


@dataclass(frozen=True)
class Memory:
    """The case of a run, the past of its members, and what people have asked for, in turn."""

    case: Case | None = None
    descriptions: Mapping[str, Description] = field(default_factory=dict)
    """Of its members, as they were when they came."""
    pasts: Mapping[str, Past] = field(default_factory=dict)
    asked: tuple[Asked, ...] = ()
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where the services of members are that were replaced."""
    origin: Origin | None = None
    desks: Mapping[str, Mapping[tuple[int, int], DeskStep]] = field(default_factory=dict)
    """What the desks of members had to do with their steps, by instant and micro-step, in a run
    that is gone through again; of those whose answers are not on record."""


def write_case(case: Case) -> Note:
    return Note("case", 0, json.dumps(asdict(case)).encode())


def write_description(member: str, description: Description, since_ns: int = 0) -> Note:
    told = codec.encode_description(description).SerializeToString(deterministic=True)
    body = {"member": member, "description": base64.b64encode(told).decode()}
    return Note("described", since_ns, json.dumps(body).encode())


def write_origin(origin: Origin) -> Note:
    plain: dict[str, Any] = {
        "run": origin.run,
        "until_ns": origin.until_ns,
        "is_replay": origin.is_replay,
        "recorded": origin.recorded,
    }
    if (future := origin.future) is not None:
        plain["future"] = {
            "number": future.number,
            "seed": future.seed,
            "parameters": dict(future.parameters),
            "believed": {
                member: {name: values.tolist() for name, values in outputs.items()}
                for member, outputs in future.believed.items()
            },
        }
    return Note("origin", 0, json.dumps(plain).encode())


def _read_origin(plain: dict[str, Any]) -> Origin:
    future = plain.pop("future", None)
    if future is not None:
        believed = {
            member: {name: np.array(values) for name, values in outputs.items()}
            for member, outputs in future["believed"].items()
        }
        future = Future(future["number"], future["seed"], future["parameters"], believed)
    return Origin(**{**plain, "recorded": tuple(plain["recorded"])}, future=future)


def write_degraded(change: Degraded) -> Note:
    body = {"member": change.member, "quality": int(change.quality)}
    error = status.encode_error(change.error)
    told = {"reason": error.reason, "message": error.message, "metadata": dict(error.metadata)}
    return Note("degraded", change.time_ns, json.dumps({**body, "error": told}).encode())


def write_desks(frame: Frame) -> list[Note]:
    """What a member's desk had to do with the steps of a frame whose answers are left out."""
    notes = []
    for result in codec.decode_results(frame.answer):
        if result.desk is not None:
            kept = codec.encode_results(
                [StepResult(result.time_ns, result.micro, desk=result.desk)]
            )
            body = {"member": frame.member, "step": base64.b64encode(kept).decode()}
            notes.append(Note("desk", result.time_ns, json.dumps(body).encode()))
    return notes


def write_replaced(member: str, change: Succession) -> Note:
    body = {"member": member, "text": change.text, "is_same": change.is_same}
    at = change.place
    # on which errand it is asked stands in the document
    place = None if at is None else {"name": at.name, "address": at.address}
    return Note("replaced", change.time_ns, json.dumps({**body, "place": place}).encode())


def write_late(member: str, results: Sequence[StepResult], receive_ns: int) -> Note:
    """What a member said late of its values, when its instants had been answered for."""
    values = [StepResult(result.time_ns, outputs=result.outputs) for result in results]
    told = base64.b64encode(codec.encode_results(values)).decode()
    body = {"member": member, "receive_ns": receive_ns, "told": told}
    return Note(LATE, results[-1].time_ns, json.dumps(body).encode())


def read_late(note: Note) -> tuple[str, int, list[StepResult]]:
    """The same again: the member, when it was heard, and its values."""
    said = json.loads(note.body)
    results = codec.decode_results(base64.b64decode(said["told"]))
    return said["member"], said["receive_ns"], results


def write_absence(absence: Absence) -> Note:
    """That another city, which looks at the run, went on without it for a while."""
    return Note(ABSENCE, absence.end_ns, json.dumps(asdict(absence)).encode())


def read_absence(note: Note) -> Absence:
    said = json.loads(note.body)
    return Absence(**{**said, "variables": tuple(said["variables"])})


def write_asked(asked: Asked) -> Note:
    assert asked.time_ns is not None
    match asked:
        case Ordered():
            said = {"operator": asked.operator, "serial": asked.serial}
            kind, body = "order", {**said, "action": asdict(asked.action)}
        case Left():
            kind, body = "left", {"member": asked.member, "operator": asked.operator}
        case Added():
            kind, body = "added", {"document": asked.document, "operator": asked.operator}
    return Note(kind, asked.time_ns, json.dumps(body).encode())


def recall(store: Store, run: str, until_ns: int | None = None) -> Memory:
    """All that is on record of a run, or what is of instants up to `until_ns`.

    Fails as `Store.journal` does, and as `remember`.
    """
    memory = remember(run, cut(store, run, until_ns))
    for snapshot in store.snapshots(run):  # of each member the newest first
        past = memory.pasts.get(snapshot.member, Past())
        if past.saved is None and snapshot.number <= past.steps:
            past.saved = Saved(snapshot.number, snapshot.time_ns, snapshot.state)
    return memory


def remember(run: str, items: Iterable[Item]) -> Memory:
    """What some items of a journal say. Fails with STORE_FAILED when they make no sense."""
    case: Case | None = None
    origin: Origin | None = None
    descriptions: dict[str, Description] = {}
    pasts: dict[str, Past] = {}
    asked: list[Asked] = []
    places: dict[str, Place] = {}
    desks: dict[str, dict[tuple[int, int], DeskStep]] = {}
    for item in items:
        if isinstance(item, Frame):
            past = pasts.setdefault(item.member, Past())
            results = codec.decode_results(item.answer)
            past.items.extend(results)
            past.steps += len(results)
            continue
        said = json.loads(item.body)
        match item.kind:
            case "case":
                case = Case(**said)
            case "origin":
                origin = _read_origin(said)
            case "described":
                message = twin_pb2.Description.FromString(base64.b64decode(said["description"]))
                descriptions[said["member"]] = codec.decode_description(message)
            case "degraded":
                error = status.decode_error(error_pb2.Error(**said["error"]))
                change = Degradation(item.time_ns, Quality(said["quality"]), error)
                pasts.setdefault(said["member"], Past()).items.append(change)
            case "replaced":
                place = None if said["place"] is None else Place(**said["place"])
                heir = Succession(item.time_ns, said["text"], said["is_same"], place)
                pasts.setdefault(said["member"], Past()).items.append(heir)
                if place is not None:
                    places[said["member"]] = place
            case "desk":
                desk = desks.setdefault(said["member"], {})
                for step in codec.decode_results(base64.b64decode(said["step"])):
                    desk[step.time_ns, step.micro] = step.desk or NO_DESK
            case "order":
                action = Action(**said["action"])
                asked.append(Ordered(said["operator"], action, item.time_ns, said["serial"]))
            case "left":
                asked.append(Left(said["member"], item.time_ns, said["operator"]))
            case "added":
                asked.append(Added(said["document"], item.time_ns, said["operator"]))
            case kind if kind in (LATE, ABSENCE):
                pass  # what was so, and not what the run went by
            case _:
                raise ScenarioError(
                    Reason.STORE_FAILED,
                    f"the journal of {run} has an item of the unknown kind {item.kind!r}",
                    {"run": run},
                )
    return Memory(case, descriptions, pasts, tuple(asked), places, origin, desks)


def cut(store: Store, run: str, until_ns: int | None = None) -> Iterator[Item]:
    """The journal of a run, without what is of instants after `until_ns`.

    What takes effect after that instant is left out even if it was asked for before.
    """
    for _, item in store.journal(run):
        if until_ns is None:
            yield item
        elif isinstance(item, Note):
            if item.time_ns <= until_ns:
                yield item
        else:
            results = codec.decode_results(item.answer)
            kept = [result for result in results if result.time_ns <= until_ns]
            if kept:
                number = item.number - len(results) + len(kept)
                yield Frame(item.member, number, codec.encode_results(kept))
