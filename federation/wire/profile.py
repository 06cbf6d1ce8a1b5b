"""What a twin is found by: its description in short, and whether it is what somebody looks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from federation.errors import Reason, ScenarioError
from federation.twin import Description, Fidelity, TimePolicy
from federation.v1 import broker_pb2
from federation.wire import codec

SCHEMA = 1
"""The version of the contract between twins and brokers that this code speaks."""


@dataclass(frozen=True, slots=True)
class Area:
    """A rectangle in WGS84 degrees; its sides belong to it. One over the date line is two."""

    west_deg: float
    south_deg: float
    east_deg: float
    north_deg: float

    def meets(self, other: Area) -> bool:
        return (
            self.west_deg <= other.east_deg
            and other.west_deg <= self.east_deg
            and self.south_deg <= other.north_deg
            and other.south_deg <= self.north_deg
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """What a twin tells of itself when it registers."""

    fidelity: Fidelity = Fidelity.UNSTATED
    time: TimePolicy | None = None
    features: tuple[str, ...] = ()
    area: Area | None = None


NOTHING_TOLD = Profile()


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for; what is not said is all the same."""

    domain: str = ""
    area: Area | None = None
    features: tuple[str, ...] = ()
    max_period_ns: int = 0

    def finds(self, domain: str, profile: Profile) -> bool:
        if self.domain and self.domain != domain:
            return False
        if self.area is not None and (profile.area is None or not self.area.meets(profile.area)):
            return False
        if self.max_period_ns and (
            profile.time is None or profile.time.period_ns > self.max_period_ns
        ):
            return False
        return set(self.features) <= set(profile.features)


def profile_of(description: Description) -> Profile:
    placed = [(e.lon_deg, e.lat_deg) for e in description.entities if not math.isnan(e.lon_deg)]
    area = None
    if placed:
        lons_deg, lats_deg = zip(*placed, strict=True)
        area = Area(min(lons_deg), min(lats_deg), max(lons_deg), max(lats_deg))
    return Profile(description.fidelity, description.time, tuple(_features(description)), area)


def _features(description: Description) -> Iterator[str]:
    yield from (f"variable:{variable.name}" for variable in description.variables)
    yield from (f"actuator:{actuator.name}" for actuator in description.actuators)
    yield from (f"kind:{kind}" for kind in sorted({e.kind for e in description.entities}))
    yield from (f"kpi:{name}" for name in description.kpis)


def check_schema(schema: int) -> None:
    """Fails with SCHEMA_INCOMPATIBLE on a twin that was written for another contract."""
    if schema not in (0, SCHEMA):
        raise _incompatible("schema", f"{schema}, and this broker speaks {SCHEMA}")


def encode_profile(profile: Profile) -> broker_pb2.Profile:
    message = broker_pb2.Profile(
        fidelity=codec.encode_fidelity(profile.fidelity), features=profile.features
    )
    if profile.time is not None:
        message.time.CopyFrom(codec.encode_time(profile.time))
    if profile.area is not None:
        message.area.CopyFrom(encode_area(profile.area))
    return message


def decode_profile(message: broker_pb2.Profile) -> Profile:
    """Fails with SCHEMA_INCOMPATIBLE, naming the field, on what contradicts itself."""
    time = codec.decode_time(message.time) if message.HasField("time") else None
    if time is not None and min(time.period_ns, time.offset_ns) < 0:
        raise _incompatible("profile.time", "a period or an offset below 0")
    area = None
    if message.HasField("area"):
        area = _area(message.area)
        if area is None:
            raise _incompatible("profile.area", _NO_AREA)
    if len(set(message.features)) < len(message.features):
        raise _incompatible("profile.features", "a feature twice")
    return Profile(codec.decode_fidelity(message.fidelity), time, tuple(message.features), area)


def encode_area(area: Area) -> broker_pb2.Area:
    return broker_pb2.Area(
        west_deg=area.west_deg,
        south_deg=area.south_deg,
        east_deg=area.east_deg,
        north_deg=area.north_deg,
    )


def decode_search(message: broker_pb2.ListMembersRequest) -> Search:
    """Fails with SCENARIO_INVALID on an area that is none."""
    area = _area(message.area) if message.HasField("area") else None
    if message.HasField("area") and area is None:
        raise ScenarioError(Reason.SCENARIO_INVALID, f"area: {_NO_AREA}", {"field": "area"})
    return Search(message.domain, area, tuple(message.features), message.max_period_ns)


_NO_AREA = (
    "it takes WGS84 degrees, from west to east within -180..180 and from south to north within "
    "-90..90"
)


def _area(message: broker_pb2.Area) -> Area | None:
    lons = -180 <= message.west_deg <= message.east_deg <= 180
    lats = -90 <= message.south_deg <= message.north_deg <= 90
    if not (lons and lats):
        return None
    return Area(message.west_deg, message.south_deg, message.east_deg, message.north_deg)


def _incompatible(field: str, why: str) -> ScenarioError:
    return ScenarioError(Reason.SCHEMA_INCOMPATIBLE, f"{field}: {why}", {"field": field})
