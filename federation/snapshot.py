"""Writes what a twin's session knows as bytes, and reads it without ever running what they say.

A snapshot may come over the wire, and a pickle from there is a program. Here bytes can only
become plain data, arrays, and objects of the classes that the twin has named:

    STATES = Snapshots(Run, Damage)

    def snapshot(self): return STATES.pack(self.run)
    def restore(self, state): self.run = STATES.unpack(state)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, IntEnum
from typing import Any

import msgpack
import numpy as np

from federation.errors import Reason, ScenarioError


class _Kind(IntEnum):
    """What an extension of msgpack holds; the numbers are part of what is kept."""

    AGAIN = 1
    OBJECT = 2
    ARRAY = 3
    OBJECTS = 4
    TUPLE = 5
    SET = 6
    FROZENSET = 7
    DEQUE = 8
    LONG = 9
    SCALAR = 10
    GENERATOR = 11
    MEMBER = 12
    NAMED = 13
    SLICE = 14


_PLAIN = "biufSU"
"""The kinds of numpy's types whose bytes are their values."""

_BIT_GENERATORS = {
    made.__name__: made
    for made in (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}

_DEEPEST = 100
"""States within states; each takes of the interpreter's stack, which a hostile one would use up."""


class Snapshots:
    """Packs states made of what Python and numpy have, and of the classes that it is given.

    An object has the attributes that its `__getstate__` names, and is made without `__init__`.
    Objects, arrays and generators that a state refers to twice are one object again; a list or
    a mapping comes back once for every place in which it stands.
    """

    def __init__(self, *classes: type) -> None:
        self._classes = {each.__qualname__: each for each in classes}
        if len(self._classes) < len(classes):
            raise ValueError("two classes have the same name")

    def pack(self, state: object) -> bytes:
        """Fails with TypeError for what it can't write, a programming error of the twin."""
        return _Writer(self._classes).pack(state)

    def unpack(self, data: bytes) -> Any:
        """What was packed. Fails with INVALID_FRAME for any other bytes."""
        try:
            return _Reader(self._classes).unpack(data)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            OverflowError,
        ) as error:
            raise _no_snapshot(f"{type(error).__name__}: {error}") from error


class _Writer:
    def __init__(self, classes: dict[str, type]) -> None:
        self._classes = classes
        self._met: dict[int, tuple[int, object]] = {}
        """By identity, the number of each object and the object itself, which keeps it alive."""
        self._depth = 0

    def pack(self, value: object) -> bytes:
        data: bytes = msgpack.packb(value, default=self._other, strict_types=True)
        return data

    def _other(self, value: object) -> msgpack.ExtType:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise TypeError(f"a state within states {_DEEPEST} deep can't be in a snapshot")
        kind, data = self._form(value)
        self._depth -= 1
        return msgpack.ExtType(kind, data)

    def _form(self, value: Any) -> tuple[_Kind, bytes]:
        if isinstance(value, np.ndarray | np.random.Generator) or self._is_object(value):
            if id(value) in self._met:
                return _Kind.AGAIN, self.pack(self._met[id(value)][0])
            self._met[id(value)] = len(self._met), value
        return self._new(value)

    def _is_object(self, value: object) -> bool:
        named = self._classes.get(type(value).__qualname__)
        return named is type(value) and not issubclass(named, tuple | Enum)

    def _new(self, value: Any) -> tuple[_Kind, bytes]:
        kind = type(value)
        if kind is tuple:
            return _Kind.TUPLE, self.pack(list(value))
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, np.generic) and value.dtype.kind in _PLAIN:
            return _Kind.SCALAR, self.pack([value.dtype.str, value.tobytes()])
        if kind is int:
            return _Kind.LONG, str(value).encode()
        if kind is set or kind is frozenset:  # sorted, so that the same set gives the same bytes
            which = _Kind.SET if kind is set else _Kind.FROZENSET
            return which, self.pack(sorted(value))
        if kind is slice:
            return _Kind.SLICE, self.pack([value.start, value.stop, value.step])
        if kind is deque:
            return _Kind.DEQUE, self.pack([value.maxlen, list(value)])
        if kind is np.random.Generator:
            state = dict(value.bit_generator.state)
            return _Kind.GENERATOR, self.pack([state.pop("bit_generator"), state])
        name = kind.__qualname__
        if self._classes.get(name) is not kind:
            raise TypeError(f"{name} is none of the classes that snapshots are told of")
        if isinstance(value, Enum):
            return _Kind.MEMBER, self.pack([name, value.name])
        if isinstance(value, tuple):
            return _Kind.NAMED, self.pack([name, list(value)])
        return _Kind.OBJECT, self.pack([name, self.pack(_attributes(value))])

    def _array(self, value: np.ndarray[Any, Any]) -> tuple[_Kind, bytes]:
        if value.dtype.kind == "O":
            return _Kind.OBJECTS, self.pack([list(value.shape), value.ravel().tolist()])
        if value.dtype.kind not in _PLAIN:
            raise TypeError(f"an array of {value.dtype} can't be in a snapshot")
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        head = [value.dtype.str, list(value.shape), order]
        return _Kind.ARRAY, self.pack([*head, value.tobytes("A")])


class _Reader:
    def __init__(self, classes: dict[str, type]) -> None:
        self._classes = classes
        self._met: list[Any] = []
        self._depth = 0

    def unpack(self, data: bytes) -> Any:
        # no length in the data may be more than the data has
        return msgpack.unpackb(data, ext_hook=self._other, strict_map_key=False)

    def _other(self, code: int, data: bytes) -> Any:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"it is more than {_DEEPEST} deep")
        made = self._made(_Kind(code), data)
        self._depth -= 1
        return made

    def _made(self, kind: _Kind, data: bytes) -> Any:
        if kind is _Kind.LONG:
            return int(data)
        if kind is _Kind.OBJECT:
            return self._object(data)
        if kind in (_Kind.ARRAY, _Kind.OBJECTS, _Kind.GENERATOR):
            place = len(self._met)
            self._met.append(_UNMADE)
            self._met[place] = made = _MADE[kind](*self.unpack(data))
            return made
        inside = self.unpack(data)
        if kind is _Kind.AGAIN:
            if (found := self._met[inside]) is _UNMADE:
                raise ValueError("an array is in itself")
            return found
        if kind is _Kind.MEMBER:
            return self._named(inside[0], Enum)[inside[1]]
        if kind is _Kind.NAMED:
            return self._named(inside[0], tuple)(*inside[1])
        if kind is _Kind.SLICE:
            return slice(*inside)
        if kind is _Kind.DEQUE:
            return deque(inside[1], inside[0])
        if kind is _Kind.SCALAR:
            return np.frombuffer(inside[1], _plain_dtype(inside[0]), 1)[0]
        return _COLLECTIONS[kind](inside)

    def _object(self, data: bytes) -> object:
        name, inside = self.unpack(data)
        made = object.__new__(self._named(name, object))
        self._met.append(made)  # before its attributes, which may refer to it
        attributes = self.unpack(inside)
        known = _slots(made) or attributes
        for attribute, value in attributes.items():
            if attribute not in known or attribute.startswith("__"):
                raise ValueError(f"{name} has no {attribute}")
            object.__setattr__(made, attribute, value)
        return made

    def _named(self, name: str, base: type) -> Any:
        named = self._classes[name]
        if not issubclass(named, base) or (base is object and issubclass(named, tuple | Enum)):
            raise ValueError(f"{name} is no such class")
        return named


_UNMADE = object()

_COLLECTIONS = {_Kind.TUPLE: tuple, _Kind.SET: set, _Kind.FROZENSET: frozenset}


def _attributes(value: object) -> dict[str, object]:
    state: Any = value.__getstate__()
    if isinstance(state, tuple):  # with slots: the attributes of a `__dict__`, and theirs
        plain, slotted = state
        state = {**(plain or {}), **slotted}
    if isinstance(state, list):  # a frozen dataclass with slots gives the values of its fields
        state = dict(zip(type(value).__dataclass_fields__, state, strict=True))  # type: ignore[attr-defined]
    return dict(state or {})


def _slots(made: object) -> set[str]:
    """The attributes that an object may have, nothing when it may have any."""
    if hasattr(made, "__dict__"):
        return set()
    return {name for each in type(made).__mro__ for name in getattr(each, "__slots__", ())}


def _plain_dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in _PLAIN or dtype.hasobject:
        raise ValueError(f"an array of {text} can't be in a snapshot")
    return dtype


def _array(dtype: str, shape: list[int], order: str, data: bytes) -> np.ndarray[Any, Any]:
    if order not in ("C", "F"):
        raise ValueError(f"no array is in the order {order}")
    flat = np.frombuffer(data, _plain_dtype(dtype))
    return flat.reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _objects(shape: list[int], entries: list[object]) -> np.ndarray[Any, Any]:
    made = np.empty(len(entries), dtype=object)
    made[:] = entries
    return made.reshape(shape)


def _generator(name: str, state: dict[str, Any]) -> np.random.Generator:
    bits: Any = _BIT_GENERATORS[name]()
    bits.state = {"bit_generator": name, **state}
    return np.random.Generator(bits)


_MADE: Mapping[_Kind, Callable[..., object]] = {
    _Kind.ARRAY: _array,
    _Kind.OBJECTS: _objects,
    _Kind.GENERATOR: _generator,
}


def _no_snapshot(why: str) -> ScenarioError:
    return ScenarioError(Reason.INVALID_FRAME, f"this is no snapshot of this twin: {why}")
