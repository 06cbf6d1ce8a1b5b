"""What the store has acknowledged is there afterwards, whole and to the last bit."""

from __future__ import annotations

import itertools
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.broker.store import NOT_SETTLED, Frame, Note, Run, State, Store
from federation.core.ledger import ActionRecord, Entry, EventRecord, Quality, Record
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.twin import Action, Event

ROOT = Path(__file__).parents[1]

int64 = st.integers(-(1 << 63), (1 << 63) - 1)
int32 = st.integers(-(1 << 31), (1 << 31) - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
floats = st.floats(allow_nan=True, allow_infinity=True)
vectors = st.lists(floats, max_size=5).map(lambda v: np.array(v, dtype=np.float64))
records = st.builds(
    Record, int64, int32, int32, text, text, int64, vectors, st.sampled_from(Quality)
)
causes = st.lists(text, max_size=3).map(tuple)
events = st.builds(
    EventRecord,
    int64,
    int32,
    int32,
    text,
    st.builds(Event, text, int64, text, text, text, causes),
    st.lists(st.tuples(text, text), max_size=3).map(tuple),
)
orders = st.builds(Action, text, text, text, floats, text)
actions = st.builds(ActionRecord, int64, int32, int32, text, orders, text)
ledgers = st.lists(st.one_of(records, events, actions), max_size=12)


def run(name: str = "a run") -> Run:
    return Run(name, "s", "none", "", (1 << 64) - 1, 100, 7, (("dam", "spilled", "m^3"),))


def value(time_ns: int, variable: str, number: float, owner: str = "dam") -> Record:
    return Record(time_ns, 0, 0, owner, variable, time_ns + 1, np.array([number, -number]))


def happening(time_ns: int, serial: int, owner: str = "dam") -> EventRecord:
    event = Event(f"{owner}/{serial}", time_ns, "spill", "D1", "it spills", ("sky/1",))
    return EventRecord(time_ns, 0, 0, owner, event, (("sky/1", "sky.rain -> dam.rain"),))


def keep(store: Store, name: str, entries: Sequence[Entry], settled_ns: int = 0) -> int:
    return store.append(name, entries, [7] * len(entries), settled_ns)


def keep_journal(store: Store, name: str, items: Sequence[Frame | Note]) -> None:
    store.append(name, [], [], 9, items)


def bits(entry: Entry) -> object:
    """What must be equal, with NaN equal to itself and -0.0 apart from 0.0."""
    match entry:
        case Record():
            return (*entry.sort_key(), entry.owner, entry.revision, entry.value.tobytes())
        case EventRecord():
            return entry
        case ActionRecord():
            a = entry.action
            setpoint = struct.pack("<d", a.value)
            place = (entry.time_ns, entry.micro, entry.rank, entry.owner)
            return (*place, a.member, a.actuator, a.entity, setpoint, a.cause, entry.refusal)


@given(ledgers)
def test_every_entry_comes_back_to_the_last_bit(ledger: list[Entry]) -> None:
    store = Store()
    name = store.create(run()).name
    store.append(name, ledger, range(len(ledger)), 3)
    found, end, known = store.entries(name)
    assert [bits(stored.entry) for stored in found] == [bits(entry) for entry in ledger]
    assert [stored.number for stored in found] == list(range(1, len(ledger) + 1))
    assert [stored.receive_ns for stored in found] == list(range(len(ledger)))
    assert (end, known.entries, known.settled_ns) == (len(ledger), len(ledger), 3)
    store.close()


@settings(max_examples=25)
@given(ledgers, st.lists(st.integers(0, 12)), st.integers(1, 5), st.integers(0, 12))
def test_a_reader_goes_on_from_any_number_in_steps_of_any_size(
    ledger: list[Entry], cuts: list[int], step: int, start: int
) -> None:
    store = Store()
    name = store.create(run()).name
    edges = [0, *sorted(min(cut, len(ledger)) for cut in cuts), len(ledger)]
    for low, high in itertools.pairwise(edges):
        keep(store, name, ledger[low:high])
    got: list[Entry] = []
    after = min(start, len(ledger))
    begin = after
    while after < len(ledger):
        found, after, _ = store.entries(name, after, limit=step)
        got += [stored.entry for stored in found]
    assert [bits(entry) for entry in got] == [bits(entry) for entry in ledger[begin:]]
    store.close()


def test_a_store_that_is_opened_again_knows_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    first = Store(path)
    name = first.create(run()).name
    keep(first, name, [value(0, "level", 2.0), happening(0, 1)], 4)
    lost = TwinError(Reason.MEMBER_LOST, "dam was lost", {"member": "dam"})
    first.change(name, State.FAILED, error=lost, end_ns=9, ended_by="Ann", ended_because="wet")
    identity = first.id
    first.close()

    again = Store(path)
    known = again.run(name)
    assert again.id == identity
    assert (known.state, known.settled_ns, known.entries, known.end_ns) == (State.FAILED, 4, 2, 9)
    assert (known.seed, known.figures) == ((1 << 64) - 1, (("dam", "spilled", "m^3"),))
    assert (known.ended_by, known.ended_because) == ("Ann", "wet")
    assert isinstance(known.error, TwinError)
    assert (known.error.reason, known.error.metadata) == (Reason.MEMBER_LOST, {"member": "dam"})
    assert len(again.entries(name)[0]) == 2
    again.close()


def test_runs_have_names_of_their_own_and_are_listed_from_the_newest() -> None:
    store = Store()
    names = [store.create(run(title)).name for title in ("Wet valley!", "Wet valley!", "洪水")]
    assert names == ["runs/wet-valley-1", "runs/wet-valley-2", "runs/run-3"]
    page, more = store.runs(2)
    assert [r.name for r in page] == names[:0:-1]
    rest, end = store.runs(2, more)
    assert ([r.name for r in rest], end) == (names[:1], None)
    with pytest.raises(ScenarioError, match="RUN_NOT_FOUND"):
        store.run("runs/none-9")
    assert store.run(names[0]).settled_ns == NOT_SETTLED


def test_a_reader_asks_for_some_members_and_some_variables() -> None:
    store = Store()
    name = store.create(run()).name
    keep(store, name, [value(0, "level", 1.0), value(0, "spilled", 0.0), happening(0, 1)])
    keep(store, name, [value(0, "rain", 3.0, "sky"), value(5, "level", 2.0)])
    found, _, _ = store.entries(name, members=["dam"], variables=["level"])
    assert [s.number for s in found] == [1, 3, 5]
    whole, end, _ = store.snapshot(name)
    assert ([s.number for s in whole], end) == ([2, 3, 4, 5], 5)
    some, _, _ = store.snapshot(name, members=["sky"])
    assert [s.number for s in some] == [4]
    assert store.latest(name)["dam", "level"].value[0] == 2.0
    assert store.present(name, "dam", "level") == 2.0
    assert store.present(name, "dam", "level", at=3) == 1.0
    assert store.present(name, "dam", "fish") is None
    assert [s.number for s in store.history(name, "dam", "level", 1, 5)] == [5]
    assert [s.number for s in store.history(name, "dam", "level", 0, 5)] == [1, 5]


def test_each_life_of_a_broker_has_a_higher_epoch_and_shuts_out_the_one_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "broker.sqlite"
    old, new = Store(path), Store(path)
    name = old.create(run()).name
    assert (old.next_epoch(), new.next_epoch()) == (1, 2)
    with pytest.raises(ScenarioError, match="another broker has taken over") as caught:
        keep(old, name, [value(0, "level", 1.0)])
    assert caught.value.reason is Reason.STALE_EPOCH
    keep(new, name, [value(0, "level", 1.0)])
    new.keep_lease_epoch(7)
    new.keep_lease_epoch(3)
    assert new.lease_epoch == 7
    old.close()
    new.close()


def test_what_an_earlier_life_left_unfinished_is_given_up_with_its_reason() -> None:
    store = Store()
    pending, running, done = (store.create(run()).name for _ in range(3))
    store.change(running, State.RUNNING)
    store.change(done, State.SUCCEEDED, digest="abc", end_ns=3)
    why = TwinError(Reason.MEMBER_LOST, "the broker was restarted")
    assert store.give_up_unfinished(why, 8) == 2
    for name in (pending, running):
        known = store.run(name)
        assert (known.state, known.end_ns) == (State.FAILED, 8)
        assert known.error is not None
        assert known.error.message == "the broker was restarted"
    assert store.run(done).state is State.SUCCEEDED
    assert store.give_up_unfinished(why, 9) == 0


def test_a_journal_comes_back_in_the_order_in_which_it_was_kept() -> None:
    store = Store()
    name = store.create(run()).name
    items = [Frame("dam", n, bytes([n]) * n) for n in range(1, 40)]
    items.insert(7, Note("order", 12, b"\0open"))
    keep_journal(store, name, items[:5])
    keep(store, name, [value(0, "level", 1.0)], 4)
    keep_journal(store, name, items[5:6])
    keep_journal(store, name, items[6:])
    assert list(store.journal(name)) == list(enumerate(items, 1))
    for after in range(len(items) + 1):
        found = [item for _, item in store.journal(name, after)]
        assert found == items[after:]
    assert (store.run(name).items, store.run(name).settled_ns) == (len(items), 9)
    with pytest.raises(ScenarioError, match="RUN_NOT_FOUND"):
        store.journal("runs/none-9")
    store.close()


def test_of_each_member_the_newest_snapshots_are_kept() -> None:
    store = Store()
    name = store.create(run()).name
    for number in (3, 9, 27):
        store.keep_snapshot(name, "dam", number, number * 10, b"dam%d" % number)
    store.keep_snapshot(name, "sky", 1, 10, b"\0" * 1000)
    found = [(s.member, s.number, s.time_ns, s.state) for s in store.snapshots(name)]
    assert found == [
        ("dam", 27, 270, b"dam27"),
        ("dam", 9, 90, b"dam9"),
        ("sky", 1, 10, bytes(1000)),
    ]
    assert [s.number for s in store.snapshots(name, "dam")] == [27, 9]
    store.keep_snapshot(name, "dam", 27, 270, b"again", keep=1)
    assert [s.state for s in store.snapshots(name, "dam")] == [b"again"]
    store.close()


def test_the_sessions_of_a_run_are_found_again() -> None:
    store = Store()
    name = store.create(run()).name
    store.keep_sessions(name, {"dam": ("s-1", 1), "sky": ("s-2", 1, "10.0.0.7:4000")})
    store.keep_sessions(name, {"dam": ("s-3", 2)})
    assert store.sessions(name) == {"dam": ("s-3", 2), "sky": ("s-2", 1, "10.0.0.7:4000")}
    store.keep_sessions(name, {"sky": ()})
    assert store.sessions(name) == {"dam": ("s-3", 2)}
    store.close()


def test_runs_that_an_earlier_life_left_unfinished_are_listed() -> None:
    store = Store()
    pending, running, done = (store.create(run()).name for _ in range(3))
    store.change(running, State.RUNNING)
    store.change(done, State.SUCCEEDED)
    assert [known.name for known in store.unfinished()] == [pending, running]


def test_a_full_disk_is_named_and_leaves_no_half_batch(tmp_path: Path) -> None:
    store = Store(tmp_path / "broker.sqlite")
    name = store.create(run()).name
    keep(store, name, [value(0, "level", 1.0)])
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    large = [Record(1, 0, 0, "dam", f"v{i}", 1, np.arange(1000.0)) for i in range(20)]
    with pytest.raises(FederationError, match=r"can't be written: database or disk is full"):
        keep(store, name, large)
    assert len(store.entries(name)[0]) == store.run(name).entries == 1
    store._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    keep(store, name, large)
    assert [s.number for s in store.entries(name)[0]] == list(range(1, 22))
    store.close()


def test_a_store_that_somebody_else_holds_is_named_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    store = Store(path, patience_s=0.05)
    name = store.create(run()).name
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(FederationError, match=r"can't be written: database is locked"):
        keep(store, name, [value(0, "level", 1.0)])
    assert store.entries(name)[0] == []
    other.execute("ROLLBACK")
    other.close()
    assert keep(store, name, [value(0, "level", 1.0)]) == 1
    store.close()


def test_a_file_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("not a database, but long enough to be looked at " * 50)
    with pytest.raises(FederationError, match="not a database"):
        Store(notes)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE fish (name)")
    db.close()
    with pytest.raises(FederationError, match="no store of a broker"):
        Store(other)
    later = tmp_path / "later.sqlite"
    Store(later).close()
    with sqlite3.connect(later) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    db.close()
    with pytest.raises(FederationError, match="has the schema 99"):
        Store(later)
    with pytest.raises(FederationError, match="unable to open"):
        Store(tmp_path / "nowhere" / "broker.sqlite")


WRITER = """
import sys
import numpy as np
from federation.broker.store import Store
from federation.core.ledger import Record
from tests.test_store import run

store = Store(sys.argv[1])
name = store.create(run()).name
for batch in range(100000):
    rows = [Record(batch, 0, 0, "dam", f"v{i}", batch, np.full(50, batch + 0.5)) for i in range(40)]
    store.append(name, rows, [0] * 40, batch)
    print(batch, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        acknowledged = [int(child.stdout.readline()) for _ in range(25)][-1]
        child.kill()
        acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])
    store = Store(path)
    known = store.run("runs/a-run-1")
    found, _, _ = store.entries(known.name, limit=1 << 40)
    assert known.entries == len(found)
    assert len(found) % 40 == 0
    assert len(found) >= 40 * (acknowledged + 1)
    assert known.settled_ns == len(found) // 40 - 1
    for stored in found:
        assert isinstance(stored.entry, Record)
        assert (stored.entry.value == stored.entry.time_ns + 0.5).all()
    store.close()
