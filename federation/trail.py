"""Keeps records append-only, hash-chained, and signed at their end.

A trail is a directory. Its segments (`00000001.jsonl`, named by the number of their first record)
hold one record per line as canonical JSON; each has the SHA-256 hash of the one before and of
itself. `head.json` says how many records there are and the hash of the last one, signed if there
is a key. A record is on the disk (fsync) before `append` returns, and the head after it.

What `verify` finds: any record that was altered, dropped, swapped, inserted or doubled, down to a
bit; a segment that is missing; an end that was cut off. Who can write the directory and sign as the
head does can write another trail; without a signature, so can whoever can write the directory. Who
puts back an older trail *with* its older head can't be told from the directory alone: keep a copy
of heads elsewhere and give it as `expected`. Records after the head (at most the one that was being
written when the process died) may be lost with nobody the wiser, and no caller was told of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from federation.errors import Reason, ScenarioError

ORIGIN = "0" * 64
"""What stands for the hash before the first record."""

HEAD = "head.json"
SEGMENT_BYTES = 16 * 1024 * 1024

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], bool]
"""Whether the signer of heads signed this message with this signature."""


class Entry(Protocol):
    """A dataclass of plain data that says what kind of record it is."""

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]


def canonical(value: object) -> bytes:
    """The one form of a record: JSON with sorted keys, no spaces, floats to the bit.

    A number that JSON lacks stands as "nan", "inf" or "-inf".
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in record.items() if k != "hash"})).hexdigest()


class Finding(NamedTuple):
    """One thing that is wrong with a trail, and where."""

    file: str
    line: int
    """From 1; 0 when it is about the file as a whole."""
    what: str
    """`altered`, `missing`, `moved`, `doubled`, `inserted`, `torn`, `cut`, `head`."""
    sentence: str


class Trail:
    """Appends to a trail; only one process at a time may.

    Fails with TRAIL_IN_USE, and with TRAIL_BROKEN when its end is torn or does not fit its head:
    what is there is then for a person to look at.
    """

    def __init__(
        self, directory: str | Path, sign: Sign | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._folder = Path(directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sign = sign
        self._segment_bytes = segment_bytes
        self._lock = (self._folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            text = f"another process writes to {self._folder}"
            raise ScenarioError(Reason.TRAIL_IN_USE, text) from None
        try:
            self._count, self._last = self._end()
            names = segments(self._folder)
            self._file = (names[-1] if names else self._name(1)).open("ab")
            _sync_folder(self._folder)
        except BaseException:
            self._lock.close()
            raise

    @property
    def count(self) -> int:
        """How many records there are."""
        return self._count

    def append(self, entry: Entry, time_unix_s: float) -> int:
        """Put one record on the disk and return its number, from 1."""
        number = self._count + 1
        record = {
            "number": number,
            "before": self._last,
            "kind": entry.kind,
            "time_unix_s": time_unix_s,
            "body": asdict(entry),
        }
        hash_ = _hash(record)
        line = canonical({**record, "hash": hash_}) + b"\n"
        if self._file.tell() and self._file.tell() + len(line) > self._segment_bytes:
            self._file.close()
            self._file = self._name(number).open("ab")
            _sync_folder(self._folder)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._count, self._last = number, hash_
        self._write_head()
        return number

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    def __enter__(self) -> Trail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, number: int) -> Path:
        return self._folder / f"{number:08d}.jsonl"

    def _end(self) -> tuple[int, str]:
        """The number and hash of the last record."""
        head = _head(self._folder)
        names = segments(self._folder)
        data = names[-1].read_bytes() if names else b""
        count, last = 0, ORIGIN
        try:
            if data:
                if not data.endswith(b"\n"):
                    raise ValueError("its last line is torn")
                record = json.loads(data[:-1].rpartition(b"\n")[2])
                if record["hash"] != _hash(record):
                    raise ValueError("its last record was altered")
                count, last = int(record["number"]), str(record["hash"])
            if head is None and count > 1:
                raise ValueError("it has no head")
            if head is not None and not count - 1 <= int(head["count"]) <= count:
                raise ValueError(f"it has {count} records and its head speaks of {head['count']}")
            if head is not None and int(head["count"]) == count and head["hash"] != last:
                raise ValueError("its last record is not the one that its head speaks of")
        except (ValueError, KeyError, TypeError) as error:
            text = f"the trail {self._folder} can't be continued: {error}; `multitwin audit verify`"
            raise ScenarioError(Reason.TRAIL_BROKEN, text) from None
        return count, last

    def _write_head(self) -> None:
        head = {"count": self._count, "hash": self._last}
        if self._sign is not None:
            head["signature"] = self._sign(canonical(head)).hex()
        fresh = self._folder / (HEAD + ".new")
        with fresh.open("wb") as file:
            file.write(canonical(head) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._folder / HEAD)
        _sync_folder(self._folder)


def segments(folder: Path) -> list[Path]:
    """The segments of a trail in order."""
    return sorted(p for p in folder.glob("*.jsonl") if p.stem.isdigit())


def _head(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / HEAD).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def heads(directory: str | Path) -> tuple[int, str]:
    """How many records a trail says that it has, and the hash of the last: to be kept elsewhere."""
    head = _head(Path(directory)) or {"count": 0, "hash": ORIGIN}
    return int(head["count"]), str(head["hash"])


# -- reading it ----------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a trail; `record` is None when it is no sound record."""

    file: str
    line: int
    record: dict[str, Any] | None
    is_torn: bool


def _lines(folder: Path) -> Iterator[Line]:
    for path in segments(folder):
        data = path.read_bytes()
        parts = data.split(b"\n")
        torn = parts.pop() if parts else b""
        for i, part in enumerate(parts, 1):
            yield Line(path.name, i, _sound(part), False)
        if torn:
            yield Line(path.name, len(parts) + 1, _sound(torn), True)


def _sound(line: bytes) -> dict[str, Any] | None:
    """The record of a line, if the line is to the bit what was written for it."""
    try:
        record = json.loads(line)
        is_sound = canonical(record) == line and record["hash"] == _hash(record)
        return record if is_sound and isinstance(record["number"], int) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def verify(
    directory: str | Path,
    verify_head: Verify | None = None,
    expected: tuple[int, str] | None = None,
) -> list[Finding]:
    """All that is wrong with a trail; nothing when it is whole. Changes nothing.

    With `verify_head` the head must be signed. `expected` is the count and hash of a head that was
    kept elsewhere: the trail must contain it. Fails with MISSING_FILE when there is no trail.
    """
    return _read(Path(directory), verify_head, expected)[1]


def read(directory: str | Path, verify_head: Verify | None = None) -> list[dict[str, Any]]:
    """The records of a whole trail. Fails with MISSING_FILE and TRAIL_BROKEN."""
    records, findings = _read(Path(directory), verify_head, None)
    if findings:
        first = findings[0]
        text = f"{directory}: {first.file}, line {first.line}: {first.sentence}"
        raise ScenarioError(Reason.TRAIL_BROKEN, text, {"file": first.file})
    return records


def _read(
    folder: Path, verify_head: Verify | None, expected: tuple[int, str] | None
) -> tuple[list[dict[str, Any]], list[Finding]]:
    head = _head(folder)
    if not segments(folder) and head is None:
        text = f"there is no trail at {folder}"
        raise ScenarioError(Reason.MISSING_FILE, text, {"file": str(folder)})
    findings: list[Finding] = []
    sound: list[tuple[Line, dict[str, Any]]] = []
    records: dict[int, dict[str, Any]] = {}
    lost: set[int] = set()
    """The numbers that lines had which are no sound records any more."""
    last = 0
    for line in _lines(folder):
        file, number, record, is_torn = line
        if is_torn:
            is_told = head is not None and int(head.get("count", 0)) > last
            text = "the line does not end" + ("; its record was acknowledged" * is_told)
            findings.append(Finding(file, number, "torn", text))
            last += 1
            lost.add(last)
        elif record is None:
            last += 1
            lost.add(last)
            text = f"record {last} was altered, or the line was never a record"
            findings.append(Finding(file, number, "altered", text))
        elif (last := record["number"]) in records:
            what = "doubled" if records[last] == record else "inserted"
            findings.append(Finding(file, number, what, f"there is another record {last} before"))
        else:
            records[last] = record
            sound.append((line, record))
    findings += _judge_order(sound, records, lost)
    findings += _judge_head(head, records, lost, verify_head)
    if expected is not None and (
        expected[0] and records.get(expected[0], {}).get("hash") != expected[1]
    ):
        text = f"record {expected[0]} is not the one that was kept elsewhere"
        findings.append(Finding(HEAD, 0, "cut", text))
    return [records[n] for n in sorted(records)], findings


def _judge_order(
    sound: list[tuple[Line, dict[str, Any]]], records: Mapping[int, dict[str, Any]], lost: set[int]
) -> list[Finding]:
    """Whether the sound records are all there, in order, and follow from each other."""
    findings = []
    before = 0
    for (line, record), due in zip(sound, sorted(records), strict=True):
        number = record["number"]
        gone = [n for n in range(before + 1, due) if n not in lost]
        before = due
        if gone:
            which = f"record {gone[0]}" + (f" to {gone[-1]}" if len(gone) > 1 else "")
            text = f"{which} is missing before it"
            findings.append(Finding(line.file, line.line, "missing", text))
        if number != due:
            text = f"record {number} stands where {due} belongs"
            findings.append(Finding(line.file, line.line, "moved", text))
        previous = records.get(number - 1) if number > 1 else {"hash": ORIGIN}
        if previous is not None and record["before"] != previous["hash"]:
            text = f"record {number} does not follow from {number - 1}: one of them is not genuine"
            findings.append(Finding(line.file, line.line, "inserted", text))
    return findings


def _judge_head(
    head: dict[str, Any] | None,
    records: Mapping[int, dict[str, Any]],
    lost: set[int],
    verify: Verify | None,
) -> list[Finding]:
    last = max([*records, *lost], default=0)
    if head is None:
        if last <= 1 and verify is None:
            return []  # the first record was written, and then the process died
        return [Finding(HEAD, 0, "head", "there is no head")]
    try:
        count, hash_ = int(head["count"]), str(head["hash"])
        if verify is not None:
            message = canonical({"count": head["count"], "hash": head["hash"]})
            if not verify(message, bytes.fromhex(str(head.get("signature", "")))):
                return [Finding(HEAD, 0, "head", "its signature is not good")]
    except (ValueError, KeyError, TypeError):
        return [Finding(HEAD, 0, "head", "it was altered")]
    if count > last:
        return [Finding(HEAD, 0, "cut", f"of {count} records the last {count - last} are gone")]
    if count < last - 1:
        return [Finding(HEAD, 0, "head", f"it speaks of {count} records and there are {last}")]
    if count and count not in lost and records.get(count, {}).get("hash") != hash_:
        return [Finding(HEAD, 0, "head", f"record {count} is not the one that it speaks of")]
    return []


def repair(directory: str | Path) -> str:
    """Cut off a torn last line that nobody was told of; what was cut off.

    Fails with TRAIL_BROKEN when anything else is wrong, or the head speaks of that record.
    """
    folder = Path(directory)
    findings = verify(folder)
    if not findings:
        return ""
    first = findings[0]
    if len(findings) > 1 or first.what != "torn" or "acknowledged" in first.sentence:
        worst = next((f for f in findings if f.what != "torn"), first)
        text = f"only a torn end can be repaired; {worst.file}, line {worst.line}: {worst.sentence}"
        raise ScenarioError(Reason.TRAIL_BROKEN, text)
    path = folder / first.file
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())
    return data[keep:].decode("ascii", "backslashreplace")
