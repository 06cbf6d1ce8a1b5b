"""Names those who speak to each other: a process of a city, and the part that it plays."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_CITY = re.compile(r"[a-z][a-z0-9_-]{0,62}(\.[a-z0-9][a-z0-9_-]{0,62})*")


class Part(StrEnum):
    """The part that a process plays, as its certificate says; what it may do stands in `access`.

    A keyring has the same words for those who sign: the signature on an order says whose will it
    is, the certificate says who brings it. What a keyring calls an optimiser is a planner.
    """

    BROKER = "broker"
    TWIN = "twin"
    GUARD = "guard"
    OPERATOR = "operator"
    PLANNER = "planner"
    OBSERVER = "observer"
    PEER = "peer"
    """The broker of another city. Its certificate says `broker`, and that city."""


class Party(NamedTuple):
    """Somebody as a certificate names them. Without a name it is anybody who plays the part."""

    city: str
    part: Part
    name: str = ""

    @classmethod
    def of(cls, city: str, part: str, name: str) -> Party:
        """Fails with ValueError when this is nobody."""
        first = city.partition(".")[0]
        if not _CITY.fullmatch(city) or len(city) > 200 or first in Part.__members__.values():
            raise ValueError(
                f"{city!r} is no city: it takes lower-case letters, digits, -, _ and dots, and "
                "begins with no part that somebody plays"
            )
        if not _LABEL.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name: it takes a lower-case letter and then up to 62 of a-z, "
                "0-9, - and _"
            )
        if part not in Part.__members__.values() or part == Part.PEER:
            raise ValueError(
                f"{part!r} is no part that a certificate gives: "
                + ", ".join(part for part in Part if part != Part.PEER)
            )
        return cls(city, Part(part), name)

    @classmethod
    def read(cls, uri: str) -> Party:
        """Whom a SPIFFE id names. Fails with ValueError when it names nobody."""
        scheme, _, rest = uri.partition("://")
        words = rest.split("/")
        if scheme != "spiffe" or len(words) != 3:
            raise ValueError(f"{uri!r} is not of the form spiffe://CITY/PART/NAME")
        return cls.of(*words)

    @property
    def uri(self) -> str:
        """The SPIFFE id, which is whose certificate it is."""
        return f"spiffe://{self.city}/{self.part}/{self.name or '*'}"

    @property
    def host(self) -> str:
        """The name that a client of gRPC looks for among the DNS names of a certificate.

        gRPC compares no URIs, so a certificate says the same once more in this form: under the
        own name, and under that of the part alone, for callers who know no more.
        """
        return f"{self.name}.{self.part}.{self.city}" if self.name else f"{self.part}.{self.city}"

    @property
    def hosts(self) -> tuple[str, str]:
        """The DNS names that its certificate has."""
        return self.host, self._replace(name="").host

    def is_met_by(self, other: Party) -> bool:
        """Whether the other is who this says."""
        return other[:2] == self[:2] and self.name in ("", other.name)

    def __str__(self) -> str:
        return self.uri
