"""Everything that turns bytes or text of others into something of ours, for a fuzzer to feed.

`python -m tests.fuzz.decoders NAME --runs N --seed S` feeds one of them from inputs that are good,
guided by what each input reaches (atheris). A decoder may answer or refuse, with a
`FederationError`; whatever else it raises ends the process with a traceback and a code.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["federation"]):
    from federation.broker import why
    from federation.control import rules
    from federation.core.aid import Deed, Terms, Word
    from federation.core.coupling import parse_unit
    from federation.core.desk import Desk
    from federation.core.ledger import Record
    from federation.errors import FederationError
    from federation.peer.estate import read_estate
    from federation.peer.policy import read_policy
    from federation.scenario import spec
    from federation.snapshot import Snapshots
    from federation.twin import Session as TwinSession
    from federation.twin import StepInput
    from federation.v1 import (
        broker_pb2,
        control_pb2,
        error_pb2,
        peer_pb2,
        plan_pb2,
        twin_pb2,
    )
    from federation.wire import acting, aid, codec, status
    from federation.wire.authority import Authority
    from federation.wire.credentials import Keyring, permit
    from federation.wire.link import Errand
    from federation.wire.party import Part, Party
    from federation.wire.trust import Trust

import numpy as np
from google.protobuf.message import DecodeError

from tests.waterworks import GUARD, KEYRING, RUN, Pump, bundle

ROOT = Path(__file__).parent.parent.parent

TIMEOUT_S = 10
"""An input that takes longer hangs; the slowest good one takes some milliseconds."""

MOST_BYTES = 8192

MOST_MIB = 4096


@dataclass(frozen=True, slots=True)
class Decoder:
    """What is fed, and inputs that are good to begin with."""

    feed: Callable[[bytes], object]
    good: Callable[[], Iterable[bytes]]


def of_message(kind: Any, decode: Callable[[Any], object]) -> Callable[[bytes], object]:
    def feed(data: bytes) -> object:
        return decode(kind.FromString(data))

    return feed


def of_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    def feed(data: bytes) -> object:
        return parse(data.decode("utf-8", "replace"))

    return feed


# -- good inputs -------------------------------------------------------------------------


def ran() -> TwinSession:
    """A session of the pump that has done some steps."""
    session = TwinSession(Pump(), "north")
    session.open(1, {})
    for second in range(3):
        session.advance(StepInput(second * 1_000_000_000))
    return session


def block() -> plan_pb2.LinearBlock:
    return plan_pb2.LinearBlock(
        columns=["x", "y"],
        low=codec.encode_vector(np.zeros(2)),
        high=codec.encode_vector(np.ones(2)),
        cost=codec.encode_vector(np.ones(2)),
        integer=bytes(2),
        rows=["r"],
        row_low=codec.encode_vector(np.zeros(1)),
        row_high=codec.encode_vector(np.ones(1)),
        row_index=np.array([0, 0], dtype="<i8").tobytes(),
        column_index=np.array([0, 1], dtype="<i8").tobytes(),
        coefficient=codec.encode_vector(np.ones(2)),
    )


def bytes_of(*messages: Any) -> Callable[[], Iterable[bytes]]:
    return lambda: [message.SerializeToString() for message in messages]


def files(*patterns: str) -> Callable[[], Iterable[bytes]]:
    return lambda: [file.read_bytes() for pattern in patterns for file in ROOT.glob(pattern)]


class Forgetful(Pump):
    """Takes any state: it is not the twin that is looked at."""

    def restore(self, state: bytes) -> None:
        return None


def restored(data: bytes) -> object:
    session = TwinSession(Forgetful(), "north")
    session.open(1, {})
    return codec.restore_session(session, data)


GOODS = b"""version: 1
goods:
  power: {unit: MW, gives: {port: grid.out}, takes: [{most: 3, usd_per_h: 90}]}
"""


def deeds() -> Iterable[bytes]:
    """An offer and an answer to it."""
    terms = Terms("birch", "ash", "power", "MW", 0, (1, 2), (3.0, 4.0), (5.0, 6.0), 7, "n" * 16)
    offer = Deed(Word.OFFER, terms.id, "birch", terms, signature=bytes(64))
    no = Deed(Word.REFUSAL, terms.id, "ash", why="no")
    return [aid.encode_deed(deed).SerializeToString() for deed in (offer, no)]


def desk(data: bytes) -> object:
    fresh = Desk(RUN, "north", Pump().describe())
    fresh.load(data)
    return fresh.save()


def party(data: bytes) -> object:
    try:
        return Party.read(data.decode("utf-8", "replace"))
    except ValueError:  # which is what it says of what names nobody
        return None


@cache
def tower() -> Path:
    """The files of a twin under an authority of its own."""
    folder = Path(tempfile.mkdtemp(prefix="multitwin-fuzz-certs-"))
    return Authority.create(folder, "shelby").issue(Part.TWIN, "tower")


@cache
def trust() -> Trust:
    return Trust.of(tower())


def certificate(data: bytes) -> object:
    """Of a certificate that is spoilt within, too: its bytes, and not only their letters."""
    letters = base64.encodebytes(data)
    whole = b"-----BEGIN CERTIFICATE-----\n" + letters + b"-----END CERTIFICATE-----\n"
    return trust().bearer(whole)


def certificates() -> Iterable[bytes]:
    letters = (tower() / "tls.crt").read_text().split("-----")[2]
    yield base64.decodebytes(letters.encode())


def keyring(data: bytes) -> object:
    file = Path(tempfile.gettempdir()) / f"multitwin-keyring-{os.getpid()}.yaml"
    file.write_bytes(data)
    try:
        return Keyring.load(file)
    finally:
        file.unlink()


def order(data: bytes) -> None:
    known, said = KEYRING.check(twin_pb2.Signed.FromString(data))
    permit(known, said.WhichOneof("what") or "", "water")


STATES = Snapshots()

ENTRY = Record(5, 0, 1, "north", "level", 2, np.arange(3.0))

DECODERS: Mapping[str, Decoder] = {
    "description": Decoder(
        of_message(twin_pb2.Description, codec.decode_description),
        lambda: [codec.encode_description(Pump().describe()).SerializeToString()],
    ),
    "step-input": Decoder(
        of_message(twin_pb2.StepInput, codec.decode_step_input),
        lambda: [codec.encode_step_input(StepInput(5)).SerializeToString()],
    ),
    "step-result": Decoder(
        codec.decode_results,
        lambda: [codec.encode_results([ran().advance(StepInput(9_000_000_000))])],
    ),
    "event": Decoder(
        of_message(twin_pb2.Event, codec.decode_event),
        bytes_of(twin_pb2.Event(id="a", kind="b", entity="c", text="d", causes=["e"])),
    ),
    "action": Decoder(
        of_message(twin_pb2.Action, codec.decode_action),
        bytes_of(twin_pb2.Action(member="a", actuator="b", entity="c", value=1.0)),
    ),
    "bundle": Decoder(
        of_message(twin_pb2.Bundle, codec.decode_bundle),
        lambda: [codec.encode_bundle(bundle()).SerializeToString()],
    ),
    "values": Decoder(
        of_message(twin_pb2.StepResult, lambda message: codec.decode_values(message.outputs)),
        lambda: [
            codec.encode_step_result(ran().advance(StepInput(9_000_000_000))).SerializeToString()
        ],
    ),
    "block": Decoder(of_message(plan_pb2.LinearBlock, codec.decode_block), bytes_of(block())),
    "ledger-entry": Decoder(
        of_message(broker_pb2.LedgerEntry, codec.decode_entry),
        lambda: [codec.encode_entry(ENTRY).SerializeToString()],
    ),
    "receipt": Decoder(
        of_message(twin_pb2.Receipt, acting.decode_receipt), bytes_of(twin_pb2.Receipt())
    ),
    "critical-path": Decoder(
        of_message(control_pb2.CriticalPath, why.decode_path), bytes_of(control_pb2.CriticalPath())
    ),
    "error": Decoder(
        of_message(error_pb2.Error, status.decode_error),
        bytes_of(error_pb2.Error(reason="NO_PLAN", message="none", metadata={"a": "b"})),
    ),
    "signed-order": Decoder(order, lambda: [GUARD.sign(twin_pb2.Order()).SerializeToString()]),
    "session-state": Decoder(restored, lambda: [codec.encode_session(ran())]),
    "desk-state": Decoder(desk, lambda: [Desk(RUN, "north", Pump().describe()).save()]),
    "snapshot": Decoder(
        STATES.unpack,
        lambda: [
            STATES.pack({"a": [1, 2.0, (3, "x")], "b": np.arange(4.0), "c": {1, 2}}),
            STATES.pack(np.random.default_rng(1)),
        ],
    ),
    "scenario": Decoder(
        of_text(spec.parse), files("tests/*.yaml", "twins/regions/shelby/earthquake.yaml")
    ),
    "addition": Decoder(
        of_text(spec.parse_addition),
        lambda: [b"members: {a: {class: 'x:Y'}}\ncouplings: [{from: a.x, to: b.y}]\n"],
    ),
    "rules": Decoder(of_text(rules.parse), files("tests/hostile/*.yaml")),
    "policy": Decoder(of_text(read_policy), files("twins/regions/shelby/export.yaml")),
    "deed": Decoder(of_message(peer_pb2.Deed, aid.decode_deed), deeds),
    "goods": Decoder(of_text(read_estate), lambda: [GOODS]),
    "party": Decoder(party, lambda: [b"spiffe://shelby/twin/tower"]),
    "certificate": Decoder(certificate, certificates),
    "errand": Decoder(of_message(twin_pb2.Errand, Errand.decode), bytes_of(twin_pb2.Errand())),
    "keyring": Decoder(keyring, lambda: [b"identities: []\n"]),
    "unit": Decoder(of_text(parse_unit), lambda: [b"MW", b"m^3/h", b"vehicle*h", b"degC"]),
}


def fuzz(name: str, runs: int, seed: int) -> None:
    """Feed a decoder; does not return."""
    decoder = DECODERS[name]

    def feed(data: bytes) -> None:
        try:
            decoder.feed(data)
        except (FederationError, DecodeError):  # of protobuf, which the server answers itself
            return

    for data in decoder.good():
        decoder.feed(data)
    folder = tempfile.mkdtemp(prefix="multitwin-fuzz-")
    for index, data in enumerate(decoder.good()):
        (Path(folder) / str(index)).write_bytes(data[:MOST_BYTES])
    options = [f"-runs={runs}", f"-seed={seed}", f"-timeout={TIMEOUT_S}", "-verbosity=1"]
    options += [
        f"-max_len={MOST_BYTES}",
        f"-rss_limit_mb={MOST_MIB}",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([sys.argv[0], *options, folder], feed)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.decoders", description=__doc__)
    parser.add_argument("name", choices=DECODERS)
    parser.add_argument("--runs", type=int, default=50_000, metavar="N", help="inputs (50000)")
    parser.add_argument("--seed", type=int, default=1, help="of what the fuzzer does (1)")
    options = parser.parse_args()
    fuzz(options.name, options.runs, options.seed)


if __name__ == "__main__":
    main()
