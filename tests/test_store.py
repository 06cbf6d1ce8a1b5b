"""What the store has acknowledged is there afterwards, whole and to the last bit."""

from __future__ import annotations

import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from federation.broker.store import NOT_SETTLED, Frame, Item, Note, Run, State, Store, Stored
from federation.broker.store import chunks as chunks_module
from federation.broker.store import postgres as postgres_module
from federation.broker.store import store as store_module
from federation.core.ledger import ActionRecord, Entry, EventRecord, Quality, Record
from federation.errors import FederationError, Reason, ScenarioError, TwinError
from federation.twin import Action, Event, Vector
from tests import postgres

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
alike = settings(
    max_examples=40,
    deadline=None,  # of a store that a loaded machine shares with others
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be: a file that isn't there yet, or an empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "broker.sqlite")
    found: postgres.Server = request.getfixturevalue("server")
    return found.database()


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    opened = Store(place)
    yield opened
    opened.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are sorted into chunks, long vectors at once, and chunks are cut and summed up,
    long before there are many."""
    monkeypatch.setattr(store_module, "FOLDED_BATCHES", 3)
    monkeypatch.setattr(chunks_module, "BYTES", 60)
    monkeypatch.setattr(chunks_module, "SHORTEST", 2)
    monkeypatch.setattr(chunks_module, "SUMMED", 2)
    monkeypatch.setattr(chunks_module, "WIDE", 4)


def run(name: str = "a run") -> Run:
    return Run(name, "s", "none", "", (1 << 64) - 1, 100, 7, (("dam", "spilled", "m^3"),))


def value(time_ns: int, variable: str, number: float, owner: str = "dam") -> Record:
    return Record(time_ns, 0, 0, owner, variable, time_ns + 1, np.array([number, -number]))


def happening(time_ns: int, serial: int, owner: str = "dam") -> EventRecord:
    event = Event(f"{owner}/{serial}", time_ns, "spill", "D1", "it spills", ("sky/1",))
    return EventRecord(time_ns, 0, 0, owner, event, (("sky/1", "sky.rain -> dam.rain"),))


def keep(store: Store, name: str, entries: Sequence[Entry], settled_ns: int = 0) -> int:
    return store.append(name, entries, [7] * len(entries), settled_ns)


def keep_journal(store: Store, name: str, items: Sequence[Item]) -> None:
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


@alike
@given(ledgers)
def test_every_entry_comes_back_to_the_last_bit(store: Store, ledger: list[Entry]) -> None:
    name = store.create(run()).name
    store.append(name, ledger, range(len(ledger)), 3)
    for state in (State.RUNNING, State.SUCCEEDED):
        store.change(name, state)
        found, end, known = store.entries(name)
        assert [bits(stored.entry) for stored in found] == [bits(entry) for entry in ledger]
        assert [stored.number for stored in found] == list(range(1, len(ledger) + 1))
        assert [stored.receive_ns for stored in found] == list(range(len(ledger)))
        assert (end, known.entries, known.settled_ns) == (len(ledger), len(ledger), 3)


names = st.sampled_from(["dam", "sky", "d\0m"])
times = st.integers(0, 30)
lengths = st.sampled_from([0, 1, 1, 1, 2, 4, 9])
common = st.builds(
    lambda time_ns, owner, variable, revision, size, number: Record(
        time_ns, 0, 0, owner, variable, revision, np.arange(size, dtype=np.float64) + number
    ),
    times,
    names,
    st.sampled_from(["x", "y"]),
    int64,
    lengths,
    st.floats(-1e6, 1e6),
)
spills = st.builds(happening, times, st.integers(0, 9), names)
sets = st.builds(
    ActionRecord,
    times,
    st.just(0),
    st.just(0),
    names,
    st.builds(Action, names, st.just("gate"), st.just("D1"), floats, st.just("")),
    st.sampled_from(["", "too far"]),
)
Reading = tuple[int, int, set[str], str]
readings: st.SearchStrategy[Reading] = st.tuples(
    st.integers(0, 40), st.integers(1, 12), st.sets(names), st.sampled_from("xyz")
)
steps = st.lists(
    st.one_of(
        st.lists(st.one_of(common, common, common, spills, sets), max_size=8),
        readings,
        st.sampled_from(["fold", "reopen"]),
    ),
    max_size=25,
)


@alike
@given(steps)
def test_a_store_answers_as_a_plain_list_does(
    place: str, small: None, story: list[list[Entry] | Reading | str]
) -> None:
    store = Store(place)
    name = store.create(run()).name
    model: list[Entry] = []

    def same(found: Sequence[Stored], numbers: Iterable[int]) -> None:
        told = [(s.number, s.receive_ns, bits(s.entry)) for s in found]
        assert told == [(n, n * 7, bits(model[n - 1])) for n in numbers]

    for step in story:
        if isinstance(step, list):
            received = [(len(model) + 1 + i) * 7 for i in range(len(step))]
            assert store.append(name, step, received, 0) == len(model) + len(step)
            model += step
        elif step == "fold":
            store.change(name, State.CANCELLED)
        elif isinstance(step, str):
            store.close()
            store = Store(place)
        else:
            after, limit, owners, variable = step
            owner = min(owners, default="dam")
            numbered = list(enumerate(model, 1))
            page, end, _ = store.entries(name, after, limit=limit)
            assert end == max(after, min(after + limit, len(model)))
            same(page, range(after + 1, end + 1))
            some, _, _ = store.entries(name, after, members=owners, variables=[variable])
            theirs = [(n, e) for n, e in numbered if not owners or e.owner in owners]
            asked = [n for n, e in theirs if not isinstance(e, Record) or e.variable == variable]
            same(some, [n for n in asked if n > after])
            values = [(n, e) for n, e in numbered if isinstance(e, Record)]
            mine = [(n, e) for n, e in values if (e.owner, e.variable) == (owner, variable)]
            span = store.history(name, owner, variable, after // 2, limit * 2)
            same(span, [n for n, e in mine if after // 2 <= e.time_ns <= limit * 2])
            last = {(e.owner, e.variable): n for n, e in values}
            rest = [n for n, e in numbered if not isinstance(e, Record)]
            same(store.snapshot(name)[0], sorted([*last.values(), *rest]))
            before = [e.value for n, e in mine if n <= after]
            if not before or len(before[-1]):
                found = store.present(name, owner, variable, after)
                assert found == (float(before[-1][0]) if before else None)
            spilt = [n for n, e in numbered if isinstance(e, EventRecord)]
            same(store.events(name, "spill"), spilt)
            same(store.events(name, "spill", "D1"), spilt)
            done = [(n, e) for n, e in numbered if isinstance(e, ActionRecord) and not e.refusal]
            same(store.actions(name, owner), [n for n, e in done if e.owner == owner])
    store.close()


@alike
@example(
    # a chunk with a summary between two that have to be read
    batches=[[(0, 0.0)], [(0, 0.0), (0, 1.0)], [(0, 0.0)]],
    start=0,
    length=0,
    buckets=1,
    is_over=False,
    size=6,
)
@given(
    st.lists(st.lists(st.tuples(times, st.floats(-1e9, 1e9)), max_size=9), max_size=8),
    times,
    times,
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([1, 3, 6]),
)
def test_an_outline_tells_what_numpy_tells_of_all_values(
    store: Store,
    small: None,
    batches: list[list[tuple[int, float]]],
    start: int,
    length: int,
    buckets: int,
    is_over: bool,
    size: int,
) -> None:
    name = store.create(run()).name
    rows: list[tuple[int, Vector]] = []
    for batch in batches:
        part = [(t, x + np.arange(size, dtype=np.float64) ** 2) for t, x in batch]
        other = [value(t, "rain", x, "sky") for t, x in batch]
        mine = [Record(t, 0, 0, "dam", "level", 1, vector) for t, vector in part]
        keep(store, name, [e for pair in zip(mine, other, strict=True) for e in pair])
        rows += part
    if is_over:
        store.change(name, State.SUCCEEDED)
    end = start + length
    found = store.outline(name, "dam", "level", start, end, buckets)
    width = -(-(length + 1) // buckets)
    at = 0
    for low in range(start, end + 1, width):
        high = min(low + width - 1, end)
        inside = np.array([v for t, v in rows if low <= t <= high])
        if not len(inside):
            continue
        assert (found.start_ns[at], found.end_ns[at], found.count[at]) == (low, high, len(inside))
        assert (found.first[at] == inside[0]).all()
        assert (found.last[at] == inside[-1]).all()
        assert (found.low[at] == inside.min(axis=0)).all()
        assert (found.high[at] == inside.max(axis=0)).all()
        assert found.mean[at] == pytest.approx(inside.mean(axis=0), rel=1e-12, abs=1e-3)
        at += 1
    assert at == len(found.count)
    assert at <= buckets
    one = store.outline(name, "dam", "level", start, end, buckets, entity=size - 1)
    assert (one.high == found.high[:, size - 1 :]).all()
    assert (one.count == found.count).all()


def test_an_outline_of_nothing_has_no_buckets(store: Store) -> None:
    name = store.create(run()).name
    assert len(store.outline(name, "dam", "fish", 0, 10, 5).count) == 0
    keep(store, name, [value(0, "level", 1.0)])
    assert len(store.outline(name, "dam", "level", 1, 10, 5).mean) == 0
    whole = store.outline(name, "dam", "level", -(1 << 63), (1 << 63) - 1, 1)
    assert whole.count.tolist() == [1]


def test_a_store_that_is_opened_again_knows_its_runs(place: str) -> None:
    first = Store(place)
    name = first.create(run()).name
    keep(first, name, [value(0, "level", 2.0), happening(0, 1)], 4)
    lost = TwinError(Reason.MEMBER_LOST, "dam was lost", {"member": "dam"})
    first.change(name, State.FAILED, error=lost, end_ns=9, ended_by="Ann", ended_because="wet")
    identity = first.id
    first.close()

    again = Store(place)
    known = again.run(name)
    assert again.id == identity
    assert (known.state, known.settled_ns, known.entries, known.end_ns) == (State.FAILED, 4, 2, 9)
    assert (known.seed, known.figures) == ((1 << 64) - 1, (("dam", "spilled", "m^3"),))
    assert (known.ended_by, known.ended_because) == ("Ann", "wet")
    assert isinstance(known.error, TwinError)
    assert (known.error.reason, known.error.metadata) == (Reason.MEMBER_LOST, {"member": "dam"})
    assert len(again.entries(name)[0]) == 2
    again.close()


def test_runs_have_names_of_their_own_and_are_listed_from_the_newest(store: Store) -> None:
    names = [store.create(run(title)).name for title in ("Wet valley!", "Wet valley!", "洪水")]
    assert names == ["runs/wet-valley-1", "runs/wet-valley-2", "runs/run-3"]
    page, more = store.runs(2)
    assert [r.name for r in page] == names[:0:-1]
    rest, end = store.runs(2, more)
    assert ([r.name for r in rest], end) == (names[:1], None)
    with pytest.raises(ScenarioError, match="RUN_NOT_FOUND"):
        store.run("runs/none-9")
    assert store.run(names[0]).settled_ns == NOT_SETTLED


def test_a_reader_asks_for_some_members_and_some_variables(store: Store) -> None:
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
    place: str,
) -> None:
    old, new = Store(place), Store(place)
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


def test_what_an_earlier_life_left_unfinished_is_given_up_with_its_reason(store: Store) -> None:
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


def test_a_journal_comes_back_in_the_order_in_which_it_was_kept(store: Store) -> None:
    name = store.create(run()).name
    items: list[Item] = [Frame("dam", n, bytes([n]) * n) for n in range(1, 40)]
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


def test_of_each_member_the_newest_snapshots_are_kept(store: Store) -> None:
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


def test_runs_that_an_earlier_life_left_unfinished_are_listed(store: Store) -> None:
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
    with pytest.raises(FederationError, match="unable to open"):
        Store(tmp_path / "nowhere" / "broker.sqlite")


def others_change(place: str, statement: str) -> None:
    """Somebody else does something in a place where a store is or will be."""
    if place.startswith("postgresql:"):
        with psycopg.connect(place) as server:
            server.execute(statement.encode())
        return
    with sqlite3.connect(place) as db:
        db.execute(statement)
    db.close()


def test_a_database_of_somebody_else_is_left_alone(place: str) -> None:
    others_change(place, "CREATE TABLE fish (name TEXT)")
    with pytest.raises(FederationError, match="no store of a broker"):
        Store(place)


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (3, "schema 3, of a newer version.* schema 2"),
        (1, "schema 1, of an older version.* schema 2"),
    ],
)
def test_a_store_of_another_version_is_refused_with_what_to_do(
    place: str, found: int, what: str
) -> None:
    Store(place).close()
    others_change(place, f"UPDATE meta SET value = {found} WHERE key = 'schema'")
    with pytest.raises(FederationError, match=what) as caught:
        Store(place)
    assert caught.value.reason is Reason.STORE_FAILED
    assert "name another place" in caught.value.message


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    store = Store(path)
    name = store.create(run()).name
    for batch in range(50):
        keep(store, name, [value(batch, f"v{n}", 1.0) for n in range(50)])
    store.close()
    os.truncate(path, path.stat().st_size // 2 + 100)
    with pytest.raises(FederationError, match="malformed") as caught:
        Store(path)
    assert caught.value.reason is Reason.STORE_FAILED


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ("UPDATE batches SET data = ? WHERE first = 3", "entries 3 to 4: .*checksum"),
        ("DELETE FROM batches WHERE first = 3", "of entries 1 to 6 4 are there"),
        ("UPDATE vectors SET data = ? WHERE chunk = 1", "dam.v0 of .*, entries 1 to 5: .*checksum"),
        ("DELETE FROM vectors WHERE chunk = 1", "dam.v0 of .*, entries 1 to 5: .*checksum"),
        ("UPDATE happenings SET data = ?", "entry 7: .*checksum"),
        ("UPDATE journal SET data = ? WHERE first = 3", "items 3 to 4: .*checksum"),
        ("DELETE FROM journal WHERE first = 3", "item 3 is missing"),
        ("UPDATE snapshots SET state = ?", "snapshot of dam of .* after frame 8: .*checksum"),
    ],
)
def test_damage_is_found_and_named_and_nothing_is_half_read(
    store: Store, damage: str, what: str
) -> None:
    name = store.create(run()).name
    for n in range(3):
        pair = [value(n, f"v{i}", 1.0) for i in range(2)]
        store.append(name, pair, [7, 7], n, [Frame("dam", n + 1, b"x"), Note("order", n, b"")])
    if "vectors" in damage:
        store.change(name, State.SUCCEEDED)
    if "happenings" in damage:
        keep(store, name, [happening(3, 1)])
    store.keep_snapshot(name, "dam", 8, 3, b"state")
    store._db.execute(damage, [b"\1\2\3\4damaged"] * damage.count("?"))

    def read() -> None:
        store.entries(name)
        list(store.journal(name))
        store.snapshots(name)

    with pytest.raises(FederationError, match=what) as caught:
        read()
    assert caught.value.reason is Reason.STORE_FAILED
    assert "is damaged" in caught.value.message


def test_runs_that_have_ended_are_dropped_and_others_never(store: Store) -> None:
    names = [store.create(run()).name for _ in range(5)]
    for at, name in enumerate(names):
        entries: list[Entry] = [value(1, "level", 2.0), happening(1, 1)]
        store.append(name, entries, [7, 7], 1, [Frame("dam", 1, b"x")])
        store.keep_snapshot(name, "dam", 1, 1, b"state")
        if at < 4:
            store.change(name, State.SUCCEEDED, end_ns=100 + at)
    store.change(names[1], State.RUNNING)
    assert store.prune(keep_runs=9) == []
    assert store.prune(keep_runs=0, ended_before_ns=102, journal_only=True) == [names[0]]
    with pytest.raises(ScenarioError, match="JOURNAL_PRUNED"):
        list(store.journal(names[0]))
    assert (len(store.entries(names[0])[0]), store.snapshots(names[0])) == (2, [])
    assert store.prune(keep_runs=1) == [names[0], names[2]]
    for name in (names[0], names[2]):
        with pytest.raises(ScenarioError, match="RUN_NOT_FOUND"):
            store.run(name)
    assert store.prune(keep_runs=0) == [names[3]]
    for name in (names[1], names[4]):
        assert len(store.entries(name)[0]) == 2
        assert [n for n, _ in store.journal(name)] == [1]
        assert len(store.snapshots(name)) == 1
    # no name ever comes again
    assert store.create(run()).name == "runs/a-run-6"


def test_a_file_gets_smaller_when_runs_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "broker.sqlite"
    store = Store(path)
    name = store.create(run()).name
    wide = [Record(0, 0, 0, "dam", f"v{n}", 1, np.arange(1000.0)) for n in range(100)]
    for _ in range(10):
        store.append(name, wide, [7] * 100, 0, [Frame("dam", 1, bytes(100_000))])
    store.change(name, State.SUCCEEDED, end_ns=1)
    assert store.prune(keep_runs=0, journal_only=True) == [name]
    assert 8_000_000 < path.stat().st_size < 8_900_000
    assert store.prune(keep_runs=0) == [name]
    assert path.stat().st_size < 500_000
    store.close()


def test_of_two_brokers_on_one_store_the_older_writes_nothing_after_the_newer_has_begun(
    place: str,
) -> None:
    old, new = Store(place), Store(place)
    old.next_epoch()
    name = old.create(run()).name
    acknowledged = 0
    begun = threading.Event()

    def write() -> ScenarioError:
        nonlocal acknowledged
        while True:
            try:
                acknowledged = keep(old, name, [value(0, "level", 1.0)])
            except ScenarioError as error:
                return error
            if acknowledged == 20:
                begun.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        assert begun.wait(30)
        new.next_epoch()
        found = new.run(name).entries
        refused = writing.result(30)
    assert refused.reason is Reason.STALE_EPOCH
    assert acknowledged == found == new.run(name).entries
    assert keep(new, name, [value(1, "level", 2.0)]) == found + 1
    old.close()
    new.close()


# -- PostgreSQL alone ------------------------------------------------------------------------


def test_a_server_that_falls_and_comes_back_loses_and_doubles_nothing(
    server: postgres.Server,
) -> None:
    store = Store(server.database(), patience_s=30)
    name = store.create(run()).name
    running, halfway = threading.Event(), threading.Event()
    running.set()

    def write() -> int:
        count = 0
        while running.is_set() or count < 200:
            pair: list[Entry] = [value(count, "level", float(count)), happening(count, count)]
            assert store.append(name, pair, [7, 7], count, [Frame("dam", count + 1, b"x")])
            count += 1
            if count == 50:
                halfway.set()
        return count

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        assert halfway.wait(30)
        for how in (signal.SIGQUIT, signal.SIGINT):
            server.stop(how)
            server.start()
        running.clear()
        count = writing.result(60)
    found, _, known = store.entries(name, limit=1 << 40)
    assert known.entries == 2 * count
    assert [s.entry.time_ns for s in found] == [n for n in range(count) for _ in range(2)]
    assert [item for _, item in store.journal(name)] == [
        Frame("dam", n + 1, b"x") for n in range(count)
    ]
    store.close()


@pytest.mark.parametrize("was_committed", [True, False])
def test_a_commit_whose_answer_was_lost_is_neither_lost_nor_done_twice(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch, was_committed: bool
) -> None:
    store = Store(server.database(), patience_s=10)
    name = store.create(run()).name
    commits = 0

    execute = postgres_module._Connection.execute

    def cut(self: psycopg.Connection[Any], query: Any, *rest: Any, **options: Any) -> Any:
        nonlocal commits
        if query != "COMMIT":
            return execute(self, query, *rest, **options)
        commits += 1
        if commits == 1 and not was_committed:
            self.close()
        found = execute(self, query, *rest, **options)
        if commits == 1:
            self.close()
            raise psycopg.OperationalError("the connection was cut")
        return found

    monkeypatch.setattr(postgres_module._Connection, "execute", cut)
    assert keep(store, name, [value(0, "level", 1.0)]) == 1
    assert commits == (1 if was_committed else 2)
    assert keep(store, name, [value(1, "level", 1.0)]) == 2
    assert [s.number for s in store.entries(name)[0]] == [1, 2]
    store.close()


def test_a_server_that_stays_away_is_given_up_after_the_patience_and_its_password_is_not_told(
    server: postgres.Server, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(server.database(), patience_s=0.3)
    name = store.create(run()).name
    server.stop()
    try:
        began = time.monotonic()
        with pytest.raises(FederationError, match="can't be written") as caught:
            keep(store, name, [value(0, "level", 1.0)])
        with pytest.raises(FederationError, match="can't be read"):
            store.run(name)
        with pytest.raises(FederationError, match="can't be opened"):
            Store(server.url("nowhere"), patience_s=0.3)
        assert time.monotonic() - began < 10
    finally:
        server.start()
    assert caught.value.reason is Reason.STORE_FAILED
    assert keep(store, name, [value(0, "level", 1.0)]) == 1
    wrong = server.url("postgres").replace(server.password, "Tr0ub4dor")
    with pytest.raises(FederationError, match="can't be opened") as refused:
        Store(wrong)
    with pytest.raises(FederationError, match="URL can't be read") as odd:
        Store(f"postgresql://ann:{server.password}@host:port:port/%zz")
    with pytest.raises(FederationError) as full:
        store._db.execute("SELECT 1 / 0")
    told = [repr(e.value) + str(e.value.metadata) for e in (caught, refused, odd, full)]
    for text in (*told, store.path, caplog.text):
        assert server.password not in text
        assert "Tr0ub4dor" not in text
    store.close()


def test_a_connection_that_freezes_is_left_for_another(server: postgres.Server) -> None:
    store = Store(server.database(), patience_s=1)
    name = store.create(run()).name
    (pid,) = store._db.execute("SELECT pg_backend_pid()").fetchone()
    os.kill(pid, signal.SIGSTOP)
    try:
        assert keep(store, name, [value(0, "level", 1.0)]) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    assert keep(store, name, [value(1, "level", 1.0)]) == 2
    store.close()


# -- a killed writer -------------------------------------------------------------------------

WRITER = """
import sys
import numpy as np
from federation.broker.store import Frame, Store
from federation.core.ledger import Record
from tests.test_store import run

store = Store(sys.argv[1])
name = store.create(run()).name
for batch in range(100000):
    rows = [Record(batch, 0, 0, "dam", f"v{i}", batch, np.full(50, batch + 0.5)) for i in range(40)]
    store.append(name, rows, [0] * 40, batch, [Frame("dam", batch + 1, bytes(900))])
    print(batch, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_was_acknowledged(place: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as child:
        assert child.stdout is not None
        acknowledged = [int(child.stdout.readline()) for _ in range(25)][-1]
        child.kill()
        acknowledged = max([acknowledged, *map(int, child.stdout.read().split())])
    store = Store(place)
    known = store.run("runs/a-run-1")
    found, _, _ = store.entries(known.name, limit=1 << 40)
    assert known.entries == len(found)
    assert len(found) % 40 == 0
    assert len(found) >= 40 * (acknowledged + 1)
    assert known.settled_ns == len(found) // 40 - 1
    assert [item for _, item in store.journal(known.name)] == [
        Frame("dam", number + 1, bytes(900)) for number in range(len(found) // 40)
    ]
    for stored in found:
        assert isinstance(stored.entry, Record)
        assert (stored.entry.value == stored.entry.time_ns + 0.5).all()
    store.close()
