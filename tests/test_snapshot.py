"""What a twin's session knows, as bytes and back: exact, and harmless whatever the bytes say."""

from __future__ import annotations

import math
import pickle
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from federation.errors import Reason, ScenarioError
from federation.snapshot import Snapshots


class Colour(IntEnum):
    RED = 1
    BLUE = 2


class Place(NamedTuple):
    x: float
    name: str


@dataclass(slots=True)
class Tank:
    level: float
    history: list[float] = field(default_factory=list)
    neighbour: Tank | None = None


@dataclass(frozen=True, slots=True)
class Pipe:
    ends: tuple[str, str]
    colour: Colour


class Town:
    def __init__(self) -> None:
        self.tanks = [Tank(1.0), Tank(2.0)]
        self.busiest = self.tanks[0]
        self.rng = np.random.default_rng(7)
        self.again = self.rng


STATES = Snapshots(Colour, Place, Tank, Pipe, Town)

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from(Colour)
    | st.builds(Place, st.floats(), st.text())
    | st.builds(np.float64, st.floats())
    | st.builds(np.int32, st.integers(-(2**31), 2**31 - 1))
    | st.builds(Pipe, st.tuples(st.text(), st.text()), st.sampled_from(Colour))
    | st.sets(st.integers())
    | st.frozensets(st.text())
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.builds(Tank, st.floats(), st.lists(st.floats()))
    ),
    max_leaves=25,
)


def same(a: Any, b: Any) -> bool:
    """Equal, of one type, and NaN where NaN is."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tank):
        return same([a.level, a.history], [b.level, b.history])
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    return bool(a == b)


@given(states)
def test_a_state_comes_back_as_it_was_and_is_written_the_same_again(state: object) -> None:
    data = STATES.pack(state)
    back = STATES.unpack(data)
    assert same(back, state)
    assert STATES.pack(back) == data


@given(
    arrays(
        st.sampled_from(["<f8", "<f4", "<i8", "<i4", "|u1", "|b1", "<c16", "<U3"]).map(np.dtype),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    st.sampled_from("CF"),
)
def test_an_array_comes_back_with_its_type_its_shape_and_its_order(
    array: np.ndarray[Any, Any], order: Any
) -> None:
    array = np.asarray(array, order=order)
    if array.dtype.kind == "c":
        with pytest.raises(TypeError, match="complex128"):
            STATES.pack(array)
        return
    back = STATES.unpack(STATES.pack(array))
    assert (back.dtype, back.shape, back.strides) == (array.dtype, array.shape, array.strides)
    assert back.tobytes("A") == array.tobytes("A")
    assert back.flags.writeable


def test_an_array_of_names_comes_back() -> None:
    names = np.array([["a", "b"], ["", "d"]], dtype=object)
    back = STATES.unpack(STATES.pack(names))
    assert back.tolist() == names.tolist()
    assert back.dtype == object


def test_what_is_one_object_stays_one() -> None:
    town = Town()
    town.tanks[0].neighbour = town.tanks[1]
    town.tanks[1].neighbour = town.tanks[0]
    town.rng.random(3)
    expected = np.random.default_rng(7).random(5)[3:]
    back = STATES.unpack(STATES.pack([town, town]))
    assert back[0] is back[1]
    back = back[0]
    assert back.busiest is back.tanks[0]
    assert back.tanks[0].neighbour is back.tanks[1]
    assert back.tanks[1].neighbour is back.tanks[0]
    assert back.again is back.rng
    assert [back.rng.random(), back.again.random()] == list(expected)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_a_generator_goes_on_where_it_was(bits: Any) -> None:
    rng = np.random.Generator(bits(3))
    rng.random(5)
    back = STATES.unpack(STATES.pack(rng))
    assert back.random(4).tolist() == rng.random(4).tolist()


def test_what_it_was_not_told_of_is_not_written() -> None:
    for state in (Path("x"), object(), [lambda: None], {1: Any}, 1j):
        with pytest.raises(TypeError, match="none of the classes"):
            STATES.pack(state)


# -- bytes of others ---------------------------------------------------------------------


def refused(data: bytes) -> str:
    message = tried(data)
    assert message
    return message


def tried(data: bytes) -> str:
    """Why the bytes were refused, or nothing; any other end fails the test."""
    try:
        STATES.unpack(data)
    except ScenarioError as refusal:
        return refusal.message if refusal.reason is Reason.INVALID_FRAME else ""
    return ""


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a snapshot was run",))


def test_a_pickle_is_refused_and_not_run() -> None:
    assert "no snapshot" in refused(pickle.dumps(Trap()))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_state_or_refused(data: bytes) -> None:
    tried(data)


@given(st.data())
def test_a_spoilt_snapshot_is_another_state_or_refused(data: st.DataObject) -> None:
    town = Town()
    whole = bytearray(STATES.pack({"town": town, "levels": np.arange(6.0), "at": Place(1.0, "a")}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for spoilt in (bytes(whole), bytes(whole[:cut])):
        tried(spoilt)


def extension(kind: int, *inside: object) -> bytes:
    data: bytes = msgpack.packb(msgpack.ExtType(kind, msgpack.packb(list(inside))))
    return data


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (extension(2, "Path", b"\x80"), "KeyError"),
        (extension(2, "Tank", msgpack.packb({"boiler": 1})), "Tank has no boiler"),
        (extension(2, "Town", msgpack.packb({"__class__": 1})), "Town has no __class__"),
        (extension(2, "Place", b"\x80"), "no such class"),
        (extension(13, "Tank", [1.0]), "no such class"),
        (extension(12, "Tank", "x"), "no such class"),
        (extension(3, "|O", [1], "C", b"12345678"), "can't be in a snapshot"),
        (extension(3, "<f8", [1 << 40], "C", b"12345678"), "cannot reshape"),
        (extension(3, "<f8", [-1, -1], "C", b"12345678"), "unknown dimension"),
        (extension(11, "MT19937", {}), "KeyError"),
        (extension(99), "99 is not a valid"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb(5))), "IndexError"),
        (b"\xdd\xff\xff\xff\xff", "ValueError"),  # a list of 4,294,967,295 entries
        (msgpack.packb(msgpack.ExtType(9, b"9" * 100_000)), "ValueError"),
        (b"", "ValueError"),
    ],
)
def test_what_means_harm_is_refused(data: bytes, why: str) -> None:
    assert why in refused(data)


def test_states_within_states_are_refused_before_they_use_up_the_stack() -> None:
    data = msgpack.packb(1)
    for _ in range(10_000):
        data = msgpack.packb(msgpack.ExtType(5, data))
    assert "more than 100 deep" in refused(data)
    chain = Tank(0.0)
    for _ in range(1_000):
        chain = Tank(0.0, [], chain)
    with pytest.raises(TypeError, match="100 deep"):
        STATES.pack(chain)
