"""The trail shows what was done to it, and answers who decided what, and what came of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.__main__ import main
from federation.control import audit
from federation.control.audit import (
    Acted,
    Approved,
    Basis,
    Entry,
    Judged,
    Noted,
    Observed,
    Rejected,
    Trail,
)
from federation.core.bundle import Bundle, Condition, Priority, Setpoint, bundle_of
from federation.errors import Reason, ScenarioError
from federation.trail import _hash

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOON = 1_790_000_000.0
BASIS = Basis("cut-9f", {"grid": "2.1", "water": "1.0"}, 42, 7, {"horizon_h": 24.0})


def decide(basis: Basis) -> Bundle:
    """A planner whose answer follows from its basis and nothing else."""
    draw = random.Random(f"{basis.snapshot} {basis.seed} {basis.rules_version}")
    return Bundle(
        f"plan-{basis.seed}",
        "runs/town-1",
        (Setpoint("grid", "feed", "f1", 40 + draw.random(), 10**9),),
        Priority.AUTONOMOUS,
        0,
        10**9,
        "planner",
        basis.digest(),
        (Condition("water", "flood", "p1", float("-inf"), 0.5),),
    )


def is_signed(message: bytes, signature: bytes) -> bool:
    try:
        KEY.public_key().verify(signature, message)
    except InvalidSignature:
        return False
    return True


def story() -> list[Entry]:
    """Four decisions: done, refused by the guard, refused by silence, and one without a plan."""
    alternatives = ({"differs": "feed of f2", "cost_usd": 12.5},)
    second = replace(BASIS, seed=43)
    bad = replace(decide(second), setpoints=(Setpoint("grid", "feed", "f1", float("nan")),))
    third = replace(BASIS, seed=44)
    return [
        audit.decided(
            "d1",
            "runs/town-1",
            5,
            BASIS,
            decide(BASIS),
            limits=("sum:supply",),
            alternatives=alternatives,
            predicted={"unserved_mwh": 3.25},
            level=4,
        ),
        Judged("d1", True, "loop"),
        Approved("d1", "ida", ("power",), "00ff"),
        Acted("d1", "committed", 7),
        audit.decided("d2", "runs/town-1", 9, second, bad, level=5),
        Judged("d2", False, "recovery", (("range:grid.feed", "nan is outside"),), "guard-1"),
        Observed("d1", 11, {"unserved_mwh": 3.25}, {"unserved_mwh": 3.5}),
        audit.decided("d3", "runs/town-1", 12, third, decide(third), limits=("fuel",)),
        Rejected("d3", "", "nobody answered in 10 min"),
        audit.decided("d4", "runs/town-1", 20, third, None),
        Noted("stopped", {"by": "ida", "what": "grid"}),
    ]


def written(folder: Path, sign: bool = True, segment_bytes: int = 1 << 24) -> Path:
    with Trail(folder, KEY.sign if sign else None, segment_bytes) as trail:
        for i, entry in enumerate(story()):
            trail.append(entry, NOON + 60 * i)
    return folder


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    return written(tmp_path / "trail")


def lines_of(folder: Path) -> list[bytes]:
    return b"".join(p.read_bytes() for p in audit.segments(folder)).splitlines(keepends=True)


def tampered(folder: Path, change: Callable[[list[bytes]], None]) -> Path:
    (path,) = audit.segments(folder)
    lines = lines_of(folder)
    change(lines)
    path.write_bytes(b"".join(lines))
    return folder


# -- what tampering shows ------------------------------------------------------------------


def test_level45_22_a_trail_as_it_was_written_is_whole(trail: Path) -> None:
    assert audit.verify(trail, is_signed) == []
    assert len(audit.read(trail)) == len(story())


@pytest.mark.parametrize("bit", range(8))
def test_level45_22_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path, bit: int) -> None:
    folder = written(tmp_path / "trail")
    (path,) = audit.segments(folder)
    data = path.read_bytes()
    for place in range(bit, len(data), 31):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        findings = audit.verify(folder)
        line = data[:place].count(b"\n") + 1
        assert findings, f"byte {place}"
        assert line in [finding.line for finding in findings] or findings[-1].file == "head.json"


def test_level45_22_a_dropped_record_is_found(trail: Path) -> None:
    tampered(trail, lambda lines: lines.__delitem__(4))
    (finding,) = audit.verify(trail)
    assert (finding.line, finding.what) == (5, "missing")
    assert finding.sentence == "record 5 is missing before it"


def test_level45_22_several_dropped_records_are_found(trail: Path) -> None:
    tampered(trail, lambda lines: lines.__delitem__(slice(2, 5)))
    (finding,) = audit.verify(trail)
    assert finding.sentence == "record 3 to 5 is missing before it"


def test_level45_22_two_swapped_records_are_found(trail: Path) -> None:
    def swap(lines: list[bytes]) -> None:
        lines[2], lines[6] = lines[6], lines[2]

    tampered(trail, swap)
    assert [(f.line, f.what, f.sentence) for f in audit.verify(trail)] == [
        (3, "moved", "record 7 stands where 3 belongs"),
        (7, "moved", "record 3 stands where 7 belongs"),
    ]


def test_level45_22_a_doubled_record_is_found(trail: Path) -> None:
    tampered(trail, lambda lines: lines.insert(5, lines[1]))
    (finding,) = audit.verify(trail)
    assert (finding.line, finding.what) == (6, "doubled")


def test_level45_22_a_record_that_was_rewritten_with_a_new_hash_is_found(trail: Path) -> None:
    def rewrite(lines: list[bytes]) -> None:
        record = json.loads(lines[2])
        record["body"]["person"] = "mallory"
        record["hash"] = _hash(record)
        lines[2] = audit.canonical(record) + b"\n"

    tampered(trail, rewrite)
    (finding,) = audit.verify(trail)
    assert finding.sentence == "record 4 does not follow from 3: one of them is not genuine"


@pytest.mark.parametrize("gone", [1, 3, 11])
def test_level45_22_an_end_that_was_cut_off_is_found(trail: Path, gone: int) -> None:
    tampered(trail, lambda lines: lines.__delitem__(slice(len(lines) - gone, None)))
    (finding,) = audit.verify(trail)
    assert (finding.file, finding.what) == ("head.json", "cut")
    assert f"the last {gone} are gone" in finding.sentence


def test_level45_22_the_end_with_another_head_is_found_by_its_signature(trail: Path) -> None:
    tampered(trail, lambda lines: lines.__delitem__(slice(8, None)))
    last = json.loads(lines_of(trail)[-1])
    head = json.loads((trail / "head.json").read_bytes())
    head |= {"count": 8, "hash": last["hash"]}
    (trail / "head.json").write_bytes(audit.canonical(head))
    assert audit.verify(trail) == [], "who asks for no signature can't tell"
    (finding,) = audit.verify(trail, is_signed)
    assert finding.sentence == "its signature is not good"
    (trail / "head.json").unlink()
    assert [f.what for f in audit.verify(trail)] == ["head"]


def test_level45_22_an_older_trail_with_its_own_head_needs_a_head_kept_elsewhere(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "trail"
    with Trail(folder, KEY.sign) as trail:
        trail.append(story()[0], NOON)
        trail.append(story()[1], NOON)
        old = {path.name: path.read_bytes() for path in folder.iterdir()}
        trail.append(story()[2], NOON)
    kept = audit.heads(folder)
    assert audit.verify(folder, is_signed, kept) == []
    for name, data in old.items():
        (folder / name).write_bytes(data)
    assert audit.verify(folder, is_signed) == [], "this is what a directory alone can't tell"
    assert [f.what for f in audit.verify(folder, is_signed, kept)] == ["cut"]


def test_level45_22_a_missing_segment_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "trail", segment_bytes=1500)
    names = audit.segments(folder)
    assert len(names) >= 3
    assert audit.verify(folder) == []
    assert len(audit.read(folder)) == len(story())
    names[1].unlink()
    assert {f.what for f in audit.verify(folder)} == {"missing"}


@settings(max_examples=80)
@given(data=st.data())
def test_level45_22_whatever_is_done_to_the_lines_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = written(tmp_path_factory.mktemp("trail") / "t", sign=False)
    (path,) = audit.segments(folder)
    lines = lines_of(folder)
    picks = st.lists(st.integers(0, len(lines) - 1), max_size=len(lines) + 3)
    chosen = data.draw(st.one_of(st.permutations(range(len(lines))), picks))
    path.write_bytes(b"".join(lines[i] for i in chosen))
    assert (audit.verify(folder) == []) == (list(chosen) == list(range(len(lines))))


# -- crashes -------------------------------------------------------------------------------


def test_a_torn_last_line_is_told_and_cut_off_only_when_asked(trail: Path) -> None:
    (path,) = audit.segments(trail)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"before":"12')
    (finding,) = audit.verify(trail)
    assert (finding.line, finding.what) == (12, "torn")
    with pytest.raises(ScenarioError, match="its last line is torn") as caught:
        Trail(trail)
    assert caught.value.reason is Reason.TRAIL_BROKEN
    assert audit.repair(trail) == '{"before":"12'
    assert path.read_bytes() == whole
    with Trail(trail, KEY.sign) as again:
        assert again.append(Noted("repaired"), NOON) == 12
    assert audit.verify(trail, is_signed) == []


def test_a_torn_record_that_somebody_was_told_of_is_not_cut_off(trail: Path) -> None:
    (path,) = audit.segments(trail)
    path.write_bytes(path.read_bytes()[:-5])
    (finding,) = audit.verify(trail)
    assert "its record was acknowledged" in finding.sentence
    with pytest.raises(ScenarioError, match="only a torn end can be repaired"):
        audit.repair(trail)


def test_a_crash_between_record_and_head_leaves_a_trail_that_goes_on(trail: Path) -> None:
    head = (trail / "head.json").read_bytes()
    with Trail(trail, KEY.sign) as again:
        again.append(Noted("one more"), NOON)
    (trail / "head.json").write_bytes(head)
    assert audit.verify(trail, is_signed) == []
    with Trail(trail, KEY.sign) as again:
        assert again.count == 12
        assert again.append(Noted("and one"), NOON) == 13
    assert audit.verify(trail, is_signed) == []


def test_two_processes_do_not_write_to_one_trail(tmp_path: Path) -> None:
    with Trail(tmp_path), pytest.raises(ScenarioError) as caught:
        Trail(tmp_path)
    assert caught.value.reason is Reason.TRAIL_IN_USE


# -- what it answers -----------------------------------------------------------------------


def test_level45_22_it_says_in_which_decisions_a_limit_was_active_and_what_came_of_them(
    trail: Path,
) -> None:
    (found,) = audit.query(trail, limit="sum:supply")
    assert found["decision"] == "d1"
    assert found["alternatives"] == [{"differs": "feed of f2", "cost_usd": 12.5}]
    assert [(a["person"], a["domains"]) for a in found["approvals"]] == [("ida", ["power"])]
    assert [act["state"] for act in found["acts"]] == ["committed"]
    assert found["outcomes"][0]["observed"] == {"unserved_mwh": 3.5}
    assert [d["decision"] for d in audit.query(trail, limit="supply")] == ["d1"]
    assert [d["decision"] for d in audit.query(trail, limit="range")] == ["d2"], "by the guard"
    assert [d["decision"] for d in audit.query(trail)] == ["d1", "d2", "d3", "d4"]
    assert [d["decision"] for d in audit.query(trail, since_unix_s=NOON + 400)] == ["d3", "d4"]
    assert audit.query(trail, limit="sup") == []


def test_level45_21_a_decision_is_made_again_from_its_record(trail: Path) -> None:
    for found in audit.query(trail):
        basis = Basis(**found["basis"])
        if found["decision"] in ("d1", "d3"):
            again = decide(basis)
            assert audit.is_reproduced(found, again)
            assert not audit.is_reproduced(found, decide(replace(basis, seed=1)))
            assert bundle_of(found["bundle"]) == again
            assert again.basis == basis.digest()
        elif found["decision"] == "d4":
            assert audit.is_reproduced(found, None)
        else:
            bundle = bundle_of(found["bundle"])
            assert bundle.digest() == found["bundle_digest"], "NaN and infinity too"


# -- the command ---------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> str:
    path = tmp_path / "key.pem"
    public = KEY.public_key()
    path.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return str(path)


def test_the_command_verifies_a_trail(
    trail: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "verify", str(trail), "--key", key]) == 0
    head = capsys.readouterr().err.rpartition(" ")[2].strip()
    assert main(["audit", "verify", str(trail), "--head", head]) == 0
    tampered(trail, lambda lines: lines.__delitem__(4))
    capsys.readouterr()
    assert main(["audit", "verify", str(trail), "--head", head]) == 3
    assert "00000001.jsonl, line 5: missing: record 5 is missing" in capsys.readouterr().out
    assert main(["audit", "verify", str(trail), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)[0]["what"] == "missing"
    assert main(["audit", "query", str(trail)]) == 3
    assert capsys.readouterr().out == "", "a broken trail answers nothing"


def test_the_command_tells_a_wrong_request_from_a_broken_trail(trail: Path, key: str) -> None:
    assert main(["audit", "verify", str(trail / "nowhere")]) == 2
    assert main(["audit", "verify", str(trail), "--key", str(trail / "none.pem")]) == 2
    assert main(["audit", "verify", str(trail), "--key", str(trail / "head.json")]) == 2
    assert main(["audit", "verify", str(trail), "--head", "12"]) == 2
    with pytest.raises(SystemExit) as caught:
        main(["audit", "query", str(trail), "--since", "yesterday"])
    assert caught.value.code == 2


def test_the_command_answers_in_words_and_in_json(
    trail: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "query", str(trail), "--limit", "supply"]) == 0
    words = capsys.readouterr().out
    for part in ("d1", "level 4", "approved by ida for power", "committed", "3.5 (predicted 3.25)"):
        assert part in words
    query = ["audit", "query", str(trail), "--json", "--since", "2026-09-21T13:20:00"]
    assert main(query) == 0
    assert [d["decision"] for d in json.loads(capsys.readouterr().out)] == ["d1", "d2", "d3", "d4"]
    assert main([*query, "--until", "2026-09-21T13:20:00+00:00"]) == 0
    (path,) = audit.segments(trail)
    path.write_bytes(path.read_bytes() + b"{")
    assert main(["audit", "repair", str(trail)]) == 0
    assert main(["audit", "verify", str(trail)]) == 0
