"""Says who may act on a twin: identities with keys, what they may do, and what they have signed.

Only a guard may let anything autonomous happen, and an optimiser may do nothing but look; so
whoever computes what would be best can't bring it about. A person acts as an operator, in the
domains that the keyring names for them.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from federation.core.bundle import Priority
from federation.errors import Reason, ScenarioError
from federation.v1 import twin_pb2

_CONTEXT = twin_pb2.Order.DESCRIPTOR.full_name.encode() + b"\0"
"""Stands before what is signed, so that no signature of anything else is one of an order."""

_STATEMENT = b"multitwin.federation.v1.Statement\0"
"""Stands before all else that is signed."""

ANY = "*"
"""All domains."""


class Role(StrEnum):
    """What an identity may do by its signature.

    `Part` in `federation.wire.party` has the same words for what a process may call.
    """

    GUARD = "guard"
    OPERATOR = "operator"
    OPTIMISER = "optimiser"
    OBSERVER = "observer"
    PEER = "peer"
    """Another city, which signs what it promises; it acts on nothing here."""

    @classmethod
    def _missing_(cls, value: object) -> Role | None:
        """A keyring may call an optimiser what a certificate calls it."""
        return cls.OPTIMISER if value == "planner" else None


@dataclass(frozen=True, slots=True)
class Known:
    """An identity as a keyring has it."""

    name: str
    key: Ed25519PublicKey
    roles: frozenset[Role]
    domains: frozenset[str]

    def is_of(self, domain: str) -> bool:
        return ANY in self.domains or domain in self.domains


@dataclass(frozen=True, slots=True)
class Identity:
    """An identity that this process acts under."""

    name: str
    key: Ed25519PrivateKey

    @classmethod
    def generate(cls, name: str) -> Identity:
        return cls(name, Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, name: str, file: Path) -> Identity:
        """Read the private key of `name` from a PEM file. Fails with MISSING_FILE."""
        if not file.is_file():
            raise ScenarioError(
                Reason.MISSING_FILE,
                f"there is no key in {file}; make one with: multitwin keys new {name}",
                {"file": str(file)},
            )
        try:
            key = serialization.load_pem_private_key(file.read_bytes(), None)
        except (ValueError, TypeError) as error:
            raise ScenarioError(
                Reason.MISSING_FILE, f"{file} holds no private key: {error}", {"file": str(file)}
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ScenarioError(
                Reason.MISSING_FILE, f"the key in {file} is not of Ed25519", {"file": str(file)}
            )
        return cls(name, key)

    def save(self, file: Path) -> None:
        """Write the private key where only this user can read it; a file that is there stays.

        Fails with SCENARIO_INVALID when there is one.
        """
        data = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ScenarioError(
                Reason.SCENARIO_INVALID, f"{file} is there already", {"file": str(file)}
            ) from None
        with os.fdopen(handle, "wb") as out:
            out.write(data)

    @property
    def public_key(self) -> str:
        """The public key's 32 bytes in base64, as a keyring has it."""
        return base64.b64encode(self.key.public_key().public_bytes_raw()).decode()

    def attest(self, message: bytes) -> bytes:
        """A signature of what is no order: a plan that is submitted, an answer to a proposal."""
        return self.key.sign(_STATEMENT + message)

    def sign(self, order: twin_pb2.Order) -> twin_pb2.Signed:
        data = order.SerializeToString(deterministic=True)
        return twin_pb2.Signed(
            identity=self.name, order=data, signature=self.key.sign(_CONTEXT + data)
        )


class Keyring:
    """Whom a process believes, and what each may do. An empty one believes nobody."""

    def __init__(self, identities: Iterable[Known] = ()) -> None:
        self._known: dict[str, Known] = {}
        for known in identities:
            if known.name in self._known:
                raise _invalid(f"the identity {known.name} stands there twice")
            if Role.GUARD in known.roles and Role.OPTIMISER in known.roles:
                raise _invalid(
                    f"{known.name} is a guard and an optimiser: who decides what would be best "
                    "must not be who lets it happen"
                )
            self._known[known.name] = known

    @classmethod
    def of(cls, *identities: tuple[Identity, Role, Iterable[str]]) -> Keyring:
        """A keyring of identities that are at hand, each with one role and its domains."""
        return cls(
            Known(who.name, who.key.public_key(), frozenset({role}), frozenset(domains))
            for who, role, domains in identities
        )

    @classmethod
    def load(cls, file: Path) -> Keyring:
        """Read a keyring: YAML with `identities`, each with `name`, `public_key` (the 32 bytes in
        base64), `roles` and `domains` ("*" for all). Fails with MISSING_FILE, SCENARIO_INVALID.
        """
        if not file.is_file():
            raise ScenarioError(
                Reason.MISSING_FILE, f"there is no keyring {file}", {"file": str(file)}
            )
        try:
            document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            return cls(map(_known, document.get("identities") or ()))
        except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise _invalid(f"{file} is no keyring: {error!r}") from error
        except RecursionError:
            raise _invalid(f"{file} is nested too deeply") from None

    def proves(self, name: str, role: Role, message: bytes, signature: bytes) -> bool:
        """Whether an identity that has this role has attested this message."""
        known = self._known.get(name)
        if known is None or role not in known.roles:
            return False
        try:
            known.key.verify(signature, _STATEMENT + message)
        except InvalidSignature:
            return False
        return True

    def check(self, signed: twin_pb2.Signed) -> tuple[Known, twin_pb2.Order]:
        """Who signed an order, and the order. Fails with NOT_AUTHORISED."""
        known = self._known.get(signed.identity)
        if known is None:
            why = "it knows nobody" if not self._known else "it does not know this identity"
            raise _denied(f"{signed.identity or 'nobody'} may not act here: {why}", signed.identity)
        try:
            known.key.verify(signed.signature, _CONTEXT + signed.order)
            return known, twin_pb2.Order.FromString(signed.order)
        except InvalidSignature:
            raise _denied(f"this was not signed with the key of {known.name}", known.name) from None
        except DecodeError as error:
            raise _denied(
                f"{known.name} has signed what is no order: {error}", known.name
            ) from None


def permit(known: Known, what: str, domain: str, priority: Priority | None = None) -> None:
    """Refuse, with NOT_AUTHORISED, what an identity may not do at a twin of `domain`.

    `what` is the kind of the order, `priority` that of the bundle that it is about. Looking is
    free to everybody who is known.
    """
    if what == "look":
        return
    if not known.is_of(domain):
        raise _denied(
            f"{known.name} has authority in {', '.join(sorted(known.domains)) or 'no domain'}, "
            f"and not in {domain or 'this one'}",
            known.name,
        )
    if what == "lift" or priority in (Priority.OPERATOR, Priority.LIFE_SAFETY):
        allowed = {Role.OPERATOR}
    elif what in ("release", "halt") or priority is None:  # towards safety, or about nothing
        allowed = {Role.GUARD, Role.OPERATOR}
    else:
        allowed = {Role.GUARD}
    if not known.roles & allowed:
        raise _denied(
            f"{known.name} is {' and '.join(sorted(known.roles)) or 'nothing'}; to {what} "
            f"{'' if priority is None else f'at {priority.name} '}"
            f"takes {' or '.join(sorted(allowed))}",
            known.name,
        )


def _known(plain: Mapping[str, object]) -> Known:
    roles, domains = plain.get("roles") or (), plain.get("domains") or ()
    if not isinstance(roles, list | tuple) or not isinstance(domains, list | tuple):
        raise ValueError("roles and domains are lists")
    key = base64.b64decode(str(plain["public_key"]), validate=True)
    return Known(
        str(plain["name"]),
        Ed25519PublicKey.from_public_bytes(key),
        frozenset(Role(str(role)) for role in roles),
        frozenset(str(domain) for domain in domains),
    )


def _invalid(message: str) -> ScenarioError:
    return ScenarioError(Reason.SCENARIO_INVALID, message)


def _denied(message: str, identity: str) -> ScenarioError:
    return ScenarioError(Reason.NOT_AUTHORISED, message, {"identity": identity})
