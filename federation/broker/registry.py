"""Who may be heard under which name, and until when; pure, the time is an argument.

The rules: a name has at most one holder. A lease that has ended, was given up or was replaced
never revives. Every lease has a higher epoch than all before it, of any name. Time is a
monotonic clock in nanoseconds that never runs backwards. Who missed two beats of its heart, each
a third of a lease, is not found any more, though nobody else gets its name yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from federation.errors import Reason, ScenarioError
from federation.wire.profile import NOTHING_TOLD, Profile, Search

DEFAULT_TTL_NS = 10_000_000_000

BEATS = 3
"""How often a lease is renewed in the time for which it holds."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_ADDRESS = re.compile(r"\S+:\d{1,5}")


@dataclass(frozen=True, slots=True)
class Member:
    """A twin as it registers. `incarnation` tells one life of its process from the next."""

    name: str
    address: str
    incarnation: str
    model: str = ""
    version: str = ""
    domain: str = ""
    profile: Profile = NOTHING_TOLD


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of `member` to be heard under its name, before `expires_ns`."""

    id: str
    member: Member
    epoch: int
    expires_ns: int


class Registry:
    """All leases of one life of a broker.

    `life` is a text that no other life of the broker has, so that a lease of an earlier one is
    not taken for ours. `last_epoch` is the highest epoch ever given, from the broker's store.
    """

    def __init__(self, life: str, ttl_ns: int = DEFAULT_TTL_NS, last_epoch: int = 0) -> None:
        self.life = life
        self.ttl_ns = ttl_ns
        self.last_epoch = last_epoch
        self._by_name: dict[str, Lease] = {}
        self._by_id: dict[str, Lease] = {}

    def register(self, member: Member, now_ns: int) -> Lease:
        """Grant a lease. The same incarnation may ask again: its lease before is void.

        Fails with NAME_LEASED while another incarnation holds the name.
        """
        if not _NAME.fullmatch(member.name):
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"{member.name!r} is no name: it takes a lower-case letter and then up to 62 "
                "of a-z, 0-9, - and _",
                {"name": member.name},
            )
        if not _ADDRESS.fullmatch(member.address):
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"{member.address!r} is no address of the form host:port",
                {"name": member.name, "address": member.address},
            )
        self.expire(now_ns)
        holder = self._by_name.get(member.name)
        if holder is not None:
            if holder.member.incarnation != member.incarnation:
                raise ScenarioError(
                    Reason.NAME_LEASED,
                    f"the name {member.name} is held by the twin at {holder.member.address}",
                    {
                        "name": member.name,
                        "address": holder.member.address,
                        "expires_in_ns": str(holder.expires_ns - now_ns),
                    },
                )
            self._remove(holder)
        self.last_epoch += 1
        lease = Lease(
            f"{self.life}.{self.last_epoch}", member, self.last_epoch, now_ns + self.ttl_ns
        )
        self._by_name[member.name] = self._by_id[lease.id] = lease
        return lease

    def find(self, lease_id: str) -> Lease | None:
        """A lease that was not left; it may be over."""
        return self._by_id.get(lease_id)

    def renew(self, lease_id: str, now_ns: int) -> Lease:
        """Prolong a lease to its full time from now. Fails with LEASE_UNKNOWN."""
        self.expire(now_ns)
        lease = self._by_id.get(lease_id)
        if lease is None:
            raise ScenarioError(
                Reason.LEASE_UNKNOWN,
                f"there is no lease {lease_id!r}, or it has ended; register again",
                {"lease": lease_id},
            )
        renewed = replace(lease, expires_ns=now_ns + self.ttl_ns)
        self._by_name[lease.member.name] = self._by_id[lease_id] = renewed
        return renewed

    def leave(self, lease_id: str) -> Lease | None:
        """Give a lease up; None when there is no such lease any more."""
        lease = self._by_id.get(lease_id)
        if lease is not None:
            self._remove(lease)
        return lease

    def expire(self, now_ns: int) -> tuple[Lease, ...]:
        """End and return all leases whose time is over, the earliest first."""
        over = sorted(
            (lease for lease in self._by_id.values() if lease.expires_ns <= now_ns),
            key=lambda lease: (lease.expires_ns, lease.epoch),
        )
        for lease in over:
            self._remove(lease)
        return tuple(over)

    def members(self, now_ns: int) -> tuple[Lease, ...]:
        """All leases that hold, by name."""
        return tuple(
            lease for _, lease in sorted(self._by_name.items()) if lease.expires_ns > now_ns
        )

    def found(self, search: Search, now_ns: int) -> tuple[Lease, ...]:
        """The leases of those who are heard of and are what is looked for, by name."""
        beat_ns = self.ttl_ns // BEATS
        return tuple(
            lease
            for lease in self.members(now_ns + beat_ns)
            if search.finds(lease.member.domain, lease.member.profile)
        )

    def _remove(self, lease: Lease) -> None:
        del self._by_name[lease.member.name], self._by_id[lease.id]
