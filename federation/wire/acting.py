"""The desks of a process that hosts a twin: who asks is checked, and steps are given what holds.

Orders come in the event loop, steps are done in threads; a desk's lock is held for neither longer
than the desk takes, so a stop never waits for a step that is being computed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import grpc

from federation.core.bundle import Priority
from federation.core.desk import NEVER, Desk, Receipt, Stop
from federation.errors import FederationError, Reason, ScenarioError
from federation.twin import NO_DESK, Description, DeskStep, Session, StepInput, StepResult, Vector
from federation.v1 import twin_pb2, twin_pb2_grpc
from federation.wire import codec, footing, secure, status
from federation.wire.credentials import Keyring, permit
from federation.wire.party import Part

DECIDE_WITHIN_S = 2.0
"""How long a bundle in doubt stays in force while its arbiter can't be asked; wall time."""

CONFIRMED_KEPT = 256
"""How many confirmed bundles a process remembers beyond its sessions."""

_AGAIN_S = 0.1

_log = logging.getLogger(__name__)


class SeatedDesk:
    """A session's desk, with what its twin said last."""

    def __init__(self, desk: Desk, description: Description, standing: Standing) -> None:
        self.desk = desk
        self.lock = threading.Lock()
        self.epoch = 0
        """The highest of the frames of its session."""
        self.is_behind = False
        """The session does again what it had done; what is asked now would be forgotten."""
        self.asking: set[str] = set()
        """The bundles in doubt whose arbiter is being asked."""
        self._description = description
        self._standing = standing
        self._outputs: dict[str, Vector] = {}
        self._kinds = {variable.name: variable.kind for variable in description.outputs()}
        self._last: DeskStep | None = None
        for stop in standing.stops():
            desk.halt(stop)

    def advance(self, session: Session, given: StepInput) -> StepResult:
        """Let the session do a step with what the desk has to do with it, which is mostly nothing.

        An order that comes while it is seen that there is none counts from the next step on.
        """
        if self.desk.is_idle and not self.is_behind and given.desk is None:
            self.desk.now_ns, self._last = given.time_ns, None
            result = session.advance(given)
        else:
            with self.lock:
                told = self._step(given)
            result = done_with(session, given, told)
        self._outputs.update(result.outputs)
        return result

    def _step(self, given: StepInput) -> DeskStep | None:
        desk = self.desk
        told: DeskStep | None
        if given.desk is not None:
            self.is_behind = True
            self.take_up(given.desk.state)
            desk.now_ns = given.time_ns
            told = given.desk
        elif given.micro:
            told = self._last  # a redone step acts on the same orders
        else:
            if self.is_behind:
                self.is_behind = False
                self._standing.bring(desk)
            told = desk.step(given.time_ns, given.actions)
        self._last = told
        return told

    def take_up(self, state: bytes) -> None:
        """Be as the desk of the session was elsewhere, or before."""
        self.is_behind = True
        if state:
            self.desk.load(state)

    def save(self) -> bytes:
        with self.lock:
            return self.desk.save()

    def read(self, variable: str, entity: str) -> float | None:
        values = self._outputs.get(variable)
        if values is None:
            return None
        ids = self._description.ids(self._kinds[variable])
        return float(values[ids.index(entity)]) if entity in ids else None


def done_with(session: Session, given: StepInput, told: DeskStep | None) -> StepResult:
    """A step with the setpoints of a desk, after its actions; the result says so."""
    if told is None or told == NO_DESK:
        return session.advance(given)
    more = tuple(each.action for each in told.operated)
    result = session.advance(given._replace(actions=given.actions + more))
    return result._replace(desk=told)


class Standing:
    """What holds in this process whatever its sessions: stops, and bundles that were confirmed.

    With a file it outlives the process, and what is acknowledged is on the disk: a twin that was
    stopped is stopped when it is started again, and a bundle that its arbiter has confirmed stays
    so although the arbiter's session is brought back from before. A stop that comes with a session
    from another process holds here as well, unless it was lifted here.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stops: dict[str, Stop] = {}
        self._lifted: dict[str, None] = {}
        self._confirmed: dict[str, None] = {}
        if file is not None and file.is_file():
            plain = json.loads(file.read_text(encoding="utf-8"))
            self._stops = {each["id"]: Stop(**each) for each in plain["stops"]}
            self._lifted = dict.fromkeys(plain["lifted"])
            self._confirmed = dict.fromkeys(plain["confirmed"])

    def stops(self) -> tuple[Stop, ...]:
        return tuple(self._stops.values())

    def halt(self, stop: Stop) -> None:
        """Fails with REQUEST_DIFFERS when a stop of this id was lifted, or says something else."""
        with self._lock:
            known = self._stops.get(stop.id)
            if stop.id in self._lifted or (known is not None and known != stop):
                what = "was lifted" if known is None else "was made for another reason"
                raise ScenarioError(
                    Reason.REQUEST_DIFFERS, f"the stop {stop.id} {what}; make a new one"
                )
            if known is None:
                self._keep(stops={**self._stops, stop.id: stop})

    def lift(self, ids: tuple[str, ...]) -> None:
        """Fails with UNKNOWN_BUNDLE when there is no stop of such an id."""
        with self._lock:
            unknown = [id for id in ids if id not in self._stops and id not in self._lifted]
            if unknown or not ids:
                raise ScenarioError(
                    Reason.UNKNOWN_BUNDLE,
                    f"there is no stop {', '.join(unknown) or 'named'}; there are "
                    f"{', '.join(self._stops) or 'none'}",
                )
            left = {id: stop for id, stop in self._stops.items() if id not in ids}
            self._keep(stops=left, lifted=self._lifted | dict.fromkeys(ids))

    def confirm(self, desk: Desk, bundle: str) -> None:
        """Keep that a bundle is confirmed, for longer than it may be forgotten."""
        with self._lock:
            found = self._confirmed | {_name(desk, bundle): None}
            self._keep(confirmed=dict.fromkeys(list(found)[-CONFIRMED_KEPT:]))

    def bring(self, desk: Desk) -> None:
        """Bring a desk that comes from elsewhere, or from before, to what holds here."""
        with self._lock:
            news = {i: s for i, s in desk.stops.items() if i not in self._lifted}
            if news.keys() - self._stops.keys():
                self._keep(stops={**news, **self._stops})
            desk.lift([id for id in desk.stops if id in self._lifted])
            for held in desk.bundles():
                if _name(desk, held.bundle.id) in self._confirmed:
                    desk.learn(held.bundle.id, is_confirmed=True)
            for stop in self._stops.values():
                desk.halt(stop)

    def _keep(
        self,
        stops: dict[str, Stop] | None = None,
        lifted: dict[str, None] | None = None,
        confirmed: dict[str, None] | None = None,
    ) -> None:
        """Change what is not None, on the disk first."""
        stops = self._stops if stops is None else stops
        lifted = self._lifted if lifted is None else lifted
        confirmed = self._confirmed if confirmed is None else confirmed
        if self._file is not None:
            plain = {
                "stops": [asdict(stop) for stop in stops.values()],
                "lifted": list(lifted),
                "confirmed": list(confirmed),
            }
            new = self._file.with_name(self._file.name + ".new")
            with new.open("w", encoding="utf-8") as out:
                json.dump(plain, out)
                out.flush()
                os.fsync(out.fileno())
            new.replace(self._file)
        self._stops, self._lifted, self._confirmed = stops, lifted, confirmed


def _name(desk: Desk, bundle: str) -> str:
    return f"{desk.run} {desk.member} {bundle}"


class Acting:
    """Takes the orders for the desks of one process."""

    def __init__(self, name: str, domain: str, keyring: Keyring, standing: Standing) -> None:
        self.standing = standing
        self._name = name
        self._domain = domain
        self._keyring = keyring
        self._desks: dict[tuple[str, str], SeatedDesk] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def seat(self, run: str, member: str, description: Description, start_ns: int) -> SeatedDesk:
        """A desk for a session that was opened for a run; the last that was opened is acted on."""
        seated = SeatedDesk(Desk(run, member, description, start_ns), description, self.standing)
        self._desks[run, member] = seated
        return seated

    def unseat(self, seated: SeatedDesk) -> None:
        key = (seated.desk.run, seated.desk.member)
        if self._desks.get(key) is seated:
            del self._desks[key]

    def handle(self, rpc: str, signed: twin_pb2.Signed) -> Receipt:
        """Do what an order asks for by this RPC; fails as the contract says."""
        known, order = self._keyring.check(signed)
        what = order.WhichOneof("what") or ""
        if what != rpc:
            raise _denied(f"{known.name} has signed {what or 'nothing'} and asks for {rpc}")
        if what in ("halt", "lift"):
            permit(known, what, self._domain)
            return self._stop(order, known.name)
        content = _content(order)
        seated = self._find(order.run, order.member)
        with seated.lock:
            desk = seated.desk
            priority: Priority | None
            if what == "select":
                bundle = codec.decode_bundle(order.select.bundle)
                priority = bundle.priority
            else:
                handle = getattr(order, what)
                held = desk.held(handle.bundle)
                priority = None if held is None else held.bundle.priority
            permit(known, what, self._domain, priority)
            if what != "release":  # which is towards safety
                self._check_epoch(seated, order.epoch)

            def do() -> Receipt:
                match what:
                    case "select":
                        token = _token(signed, order.select.arbiter_address)
                        window_ns = order.select.window_ns
                        return desk.select(bundle, known.name, window_ns, seated.read, token)
                    case "operate":
                        return desk.operate(handle.bundle, handle.digest, known.name, seated.read)
                    case "confirm":
                        done = desk.confirm(handle.bundle, handle.digest, known.name)
                        self.standing.confirm(desk, handle.bundle)
                        return done
                    case _:
                        return desk.release(handle.bundle, f"released by {known.name}")

            return desk.once(order.request, content, do)

    def look(self, signed: twin_pb2.Signed) -> twin_pb2.ReadDeskResponse:
        known, order = self._keyring.check(signed)
        if order.WhichOneof("what") != "look":
            raise _denied(f"{known.name} has not signed that it looks")
        answer = twin_pb2.ReadDeskResponse()
        for stop in self.standing.stops():
            answer.stops.add(id=stop.id, by=stop.by, reason=stop.reason)
        for seated in list(self._desks.values()):
            with seated.lock:
                _write_view(answer.desks.add(), seated)
        return answer

    def decide(self, selected: twin_pb2.Signed) -> bool:
        """Say, as the arbiter of a bundle, whether it is confirmed."""
        known, order = self._keyring.check(selected)
        if order.WhichOneof("what") != "select":
            raise _denied(f"{known.name} has selected nothing by this")
        bundle = codec.decode_bundle(order.select.bundle)
        permit(known, "select", self._domain, bundle.priority)
        members = bundle.members()
        seated = self._find(bundle.run, members[0] if members else "")
        with seated.lock:
            return seated.desk.decide(bundle.id)

    def ask_arbiters(self, seated: SeatedDesk) -> None:
        """Find out about the bundles whose window has ended without a word; in the event loop."""
        for id in seated.desk.doubts():
            if id not in seated.asking:
                seated.asking.add(id)
                task = asyncio.get_running_loop().create_task(self._ask_arbiter(seated, id))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _ask_arbiter(self, seated: SeatedDesk, id: str) -> None:
        held = seated.desk.held(id)
        address, selected = _read_token("" if held is None else held.token)
        is_confirmed = False
        if address:
            try:
                async with asyncio.timeout(DECIDE_WITHIN_S):
                    is_confirmed = await _asked(address, selected)
            except TimeoutError:
                _log.warning("%s: the arbiter of %s does not answer", self._name, id)
            except FederationError as error:
                _log.warning("%s: the arbiter of %s refuses: %s", self._name, id, error)
        with seated.lock:
            seated.desk.learn(id, is_confirmed=is_confirmed)
        seated.asking.discard(id)

    def _stop(self, order: twin_pb2.Order, by: str) -> Receipt:
        if not order.request:
            raise ScenarioError(Reason.REQUEST_DIFFERS, "a request has an id")
        if order.WhichOneof("what") == "halt":
            if not order.halt.reason:
                raise ScenarioError(Reason.SCENARIO_INVALID, "a stop has a reason")
            stop = Stop(order.request, by, order.halt.reason)
            self.standing.halt(stop)
            change: Callable[[Desk], None] = lambda desk: desk.halt(stop)  # noqa: E731
        else:
            ids = tuple(order.lift.stops)
            self.standing.lift(ids)
            change = lambda desk: desk.lift(ids)  # noqa: E731
        for seated in list(self._desks.values()):
            with seated.lock:
                change(seated.desk)
        return Receipt("", 0)

    def _find(self, run: str, member: str) -> SeatedDesk:
        seated = self._desks.get((run, member)) if run else None
        if seated is None:
            raise ScenarioError(
                Reason.NOT_LIVE,
                f"{self._name} has no session of {member} in {run or 'no run'} to act on",
                {"run": run, "member": member},
            )
        if seated.is_behind:
            raise ScenarioError(
                Reason.NOT_LIVE,
                f"{member} is being brought back; ask again when it has come to where it was",
                {"run": run, "member": member},
            )
        return seated

    def _check_epoch(self, seated: SeatedDesk, epoch: int) -> None:
        present = max(seated.epoch, seated.desk.epoch)
        if epoch < present:
            raise ScenarioError(
                Reason.STALE_EPOCH,
                f"epoch {epoch} is over; {seated.desk.member} is at {present}",
                {"epoch": str(present)},
            )
        seated.desk.epoch = epoch


async def _asked(address: str, selected: bytes) -> bool:
    """What the arbiter says, asked again while it is not there."""
    request = twin_pb2.DecideRequest(selected=twin_pb2.Signed.FromString(selected))
    arbiter = footing.expected(Part.TWIN)
    async with secure.channel(address, arbiter, [("grpc.enable_http_proxy", 0)]) as channel:
        stub: twin_pb2_grpc.TwinAsyncStub = twin_pb2_grpc.TwinStub(channel)
        while True:
            try:
                return (await stub.Decide(request)).is_confirmed
            except grpc.aio.AioRpcError as failure:
                error = status.from_rpc(failure, f"the arbiter at {address}")
                if error.reason not in (Reason.UNREACHABLE, Reason.NOT_LIVE):
                    raise error from None
            await asyncio.sleep(_AGAIN_S)


def _content(order: twin_pb2.Order) -> str:
    """What tells an order from another one under its id; not under which epoch it was repeated."""
    said = twin_pb2.Order()
    said.CopyFrom(order)
    said.ClearField("epoch")
    return hashlib.sha256(said.SerializeToString(deterministic=True)).hexdigest()


def _token(signed: twin_pb2.Signed, address: str) -> str:
    proof = base64.b64encode(signed.SerializeToString(deterministic=True)).decode()
    return f"{address} {proof}" if address else ""


def _read_token(token: str) -> tuple[str, bytes]:
    address, _, proof = token.partition(" ")
    return address, base64.b64decode(proof)


def _write_view(view: twin_pb2.DeskView, seated: SeatedDesk) -> None:
    desk = seated.desk
    view.run, view.member, view.time_ns = desk.run, desk.member, desk.now_ns
    view.epoch = max(seated.epoch, desk.epoch)
    for each in desk.in_force():
        message = view.in_force.add(
            actuator=each.actuator,
            entity=each.entity,
            value=each.value,
            priority=int(each.priority),
            owner=each.owner,
            signer=each.signer,
            bundle=each.bundle,
        )
        if each.since_ns is not None:
            message.since_ns = each.since_ns
            if each.until_ns < NEVER:
                message.until_ns = each.until_ns
    for held in desk.bundles():
        view.bundles.add(bundle=held.bundle.id, phase=held.phase, why=held.why)


def encode_receipt(receipt: Receipt) -> twin_pb2.Receipt:
    until_ns = receipt.until_ns if receipt.until_ns < NEVER else None
    return twin_pb2.Receipt(phase=receipt.phase, time_ns=receipt.time_ns, until_ns=until_ns)


def decode_receipt(message: twin_pb2.Receipt) -> Receipt:
    until_ns = message.until_ns if message.HasField("until_ns") else NEVER
    return Receipt(message.phase, message.time_ns, until_ns)


def _denied(message: str) -> ScenarioError:
    return ScenarioError(Reason.NOT_AUTHORISED, message)
