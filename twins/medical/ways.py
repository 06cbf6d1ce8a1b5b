"""Knows how long each way takes now, and what made it slow."""

from __future__ import annotations

import numpy as np

from federation.twin import Vector
from twins.medical.records import Records

NO_WAY_MIN = 600.0
"""A route this long or longer counts as closed."""
SLOW = 1.5
"""A route is slow, and its cause a cause of delay, above this multiple of its usual time."""
SLOW_MIN = 3.0


class Ways:
    """Minutes from bases to scenes, and from scenes and hospitals to hospitals.

    `scene_min[scene][base]` ends at the road node of the scene; `hospital_min[origin][hospital]`
    includes the last stretch to the hospital's door. The `access` minutes are that stretch.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        layout, p = records.layout, records.p
        speed = p["access_speed_kmh"] / 60.0
        detour = p["access_detour"]
        self.zone_access_min = [km * detour / speed for km in layout.zone_access_km]
        self.hospital_access_min = [site.access_km * detour / speed for site in layout.hospitals]
        self.scene_min: list[list[float]] = []
        self.usual_scene_min: list[list[float]] = []
        self.hospital_min: list[list[float]] = []
        self.usual_hospital_min: list[list[float]] = []
        self.leads_nowhere: list[bool] = []
        """Per origin whether no hospital can be reached from it."""
        self._nearest_base: dict[int, int] = {}
        self.set_scene_times(np.full(layout.bases * layout.scenes, 8.0))
        self.set_hospital_times(np.full(layout.origins * layout.columns, 10.0))

    def set_scene_times(self, minutes: Vector, usual: bool = False) -> None:
        """Times from bases to scenes; `usual` ones become the measure of what is slow."""
        layout = self.records.layout
        table = minutes.reshape(layout.bases, layout.scenes).T.tolist()
        self.scene_min = table
        self._nearest_base.clear()
        if usual or not self.usual_scene_min:
            self.usual_scene_min = table

    def set_hospital_times(self, minutes: Vector, usual: bool = False) -> None:
        """Times from scenes and hospitals to hospital nodes, here with the last stretch."""
        layout = self.records.layout
        columns = [site.column for site in layout.hospitals]
        table = minutes.reshape(layout.origins, layout.columns)[:, columns]
        found = table + np.array(self.hospital_access_min)
        rows = found.tolist()
        self.hospital_min = rows
        self.leads_nowhere = (found.min(axis=1, initial=NO_WAY_MIN) >= NO_WAY_MIN).tolist()
        if usual or not self.usual_hospital_min:
            self.usual_hospital_min = rows

    def nearest_base(self, scene: int) -> int:
        base = self._nearest_base.get(scene)
        if base is None:
            minutes = self.scene_min[scene]
            base = min(range(len(minutes)), key=minutes.__getitem__)
            self._nearest_base[scene] = base
        return base

    def mostly_open(self, hospital: int) -> bool:
        """Whether at least half of the scenes have a passable way to a hospital."""
        scenes = self.records.layout.scenes
        usable = sum(
            self.hospital_min[o][hospital] < 3.0 * self.usual_hospital_min[o][hospital] + SLOW_MIN
            for o in range(scenes)
        )
        return 2 * usable >= scenes

    def note_delay_to_scene(self, patient: int, base: int, scene: int) -> None:
        """Blame the way from a base to a patient if it is slow."""
        if self.scene_min[scene][base] > SLOW * self.usual_scene_min[scene][base] + SLOW_MIN:
            route = base * self.records.layout.scenes + scene
            self.records.note_delay(patient, self.records.causes("scene_time", route))

    def note_delay_to_hospital(self, patient: int, origin: int, hospital: int) -> None:
        """Blame the way of a patient to a hospital if it is slow."""
        usual = self.usual_hospital_min[origin][hospital]
        if self.hospital_min[origin][hospital] > SLOW * usual + SLOW_MIN:
            layout = self.records.layout
            route = origin * layout.columns + layout.hospitals[hospital].column
            self.records.note_delay(patient, self.records.causes("hospital_time", route))
