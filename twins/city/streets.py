"""Plays the roads' part of a step: damage, signals, traffic, journeys, and what caused them."""

from __future__ import annotations

import numpy as np

from federation.twin import HOUR_NS, Vector
from twins.city.desk import NEVER, Codes, Desk, RoadKey, hours_text
from twins.city.layout import Journeys, period_of
from twins.city.roads import CUT_MIN, Equilibrium, blame, hold_routes, pair_total

SLOWER = 1.2
"""A journey that takes more than this times its usual time is explained by a cause."""

NAMED_CLOSURES = 5
"""Diverted traffic is blamed on the closures that carried most of it before."""


class Streets(Desk):
    """The roads in one step."""

    def pass_time(self) -> None:
        for name, per_h in self.state.rates.items():
            self.state.totals[name] += per_h * self.step.span_h

    def finish_repairs(self) -> None:
        state, step, layout = self.state, self.step, self.layout
        for index, time_ns in state.road_repairs.progress(step.last_ns, step.time_ns):
            road = layout.roads[index]
            done = self.emit(
                "component_repaired", road, f"road {road} repaired after {hours_text(time_ns)}",
                [state.road_crew_event[index], state.road_note[index]],
            )  # fmt: skip
            if state.road_state[index] >= self.known["road_closed_from_state"]:
                done = self.emit("road_reopened", road, f"road {road} open again", [done])
            state.restored_road = state.road_note[index] = done
            state.road_state[index] = 0
            state.road_event[index] = 0
            state.road_crew_event[index] = 0

    def note_damage(self) -> None:
        state, step, layout = self.state, self.step, self.layout
        hit = state.road_repairs.damage(step["road_repair_work"])
        if hit.size:
            closed_from = self.known["road_closed_from_state"]
            slight: dict[tuple[str, ...], list[int]] = {}
            for index in hit:
                was = state.road_state[index]
                state.road_state[index] = max(int(step["road_damage_state"][index]), 1)
                causes = step.cause("road_damage_state", int(index)) or step.cause(
                    "road_repair_work", int(index)
                )
                if state.road_state[index] < closed_from:
                    slight.setdefault(causes, []).append(int(index))
                elif was < closed_from:
                    road = layout.roads[index]
                    state.road_event[index] = self.emit(
                        "road_closed", road, f"road {road} closed by damage", causes
                    )
            for causes, places in slight.items():
                code = self.emit(
                    "roads_narrowed", layout.roads[places[0]],
                    f"{len(places)} roads slightly damaged, with less capacity", causes,
                )  # fmt: skip
                state.road_event[places] = code
            state.road_note[hit] = state.road_event[hit]
            if state.shocked_ns == NEVER:
                state.shocked_ns = step.time_ns

    def drive(self, held: Equilibrium | None) -> Equilibrium:
        """Find the traffic, publish journeys and roads, send crews; `held` is the last answer."""
        state, layout = self.state, self.layout
        before = state.present
        traffic = self._find_traffic(held)
        if state.present is not before or not state.shown:
            self._publish_journeys(traffic)
        self.send_crews(
            [a for a in self.step.actions if a.actuator == "assign_crew_road"],
            layout.roads, state.road_repairs, state.road_crew_event, state.road_note,
            state.shown["crew_travel_road"],
        )  # fmt: skip
        closed = state.road_state >= self.known["road_closed_from_state"]
        self.publish("road_open", np.where(closed, 0.0, 1.0), self.noted(state.road_note))
        self.publish_repairs("road", state.road_repairs, state.road_crew_event, state.road_note)
        flow = np.bincount(layout.link_road, traffic.flow, len(layout.roads))
        self.publish("link_flow", flow.astype(np.float64))
        self.publish("traffic_gap", [traffic.gap])
        self.publish("signals_out", [float(state.dark.sum())])
        return traffic

    def _signals(self) -> None:
        state, step, layout = self.state, self.step, self.layout
        lost = (step["signal_power"] < 0.5) & layout.signal
        state.signal_lost_ns[~lost] = NEVER
        state.signal_lost_ns[lost & (state.signal_lost_ns == NEVER)] = step.time_ns
        backup_ns = round(self.known["signal_backup_h"] * HOUR_NS)
        dark = lost & (step.time_ns - state.signal_lost_ns >= backup_ns)
        for nodes, kind, word in (
            (np.flatnonzero(dark & ~state.dark), "signals_dark", "without power"),
            (np.flatnonzero(state.dark & ~dark), "signals_restored", "with power again"),
        ):
            groups: dict[tuple[str, ...], list[int]] = {}
            for node in nodes:
                causes = step.cause("signal_power", int(node))
                own = state.events[state.dark_event[node]]
                groups.setdefault(causes or (own,), []).append(int(node))
            for causes, members in groups.items():
                first = layout.nodes[members[0]]
                code = self.emit(
                    kind, first, f"signals {word} at {len(members)} junctions around {first}",
                    causes,
                )  # fmt: skip
                if kind == "signals_dark":
                    state.dark_event[members] = code
                else:
                    state.dark_event[members] = 0
                    state.restored_road = code
        state.dark = dark

    def _key(self) -> RoadKey:
        state, layout = self.state, self.layout
        period = period_of(self.hour % 24.0)
        settled = state.settled
        shocked = state.shocked_ns != NEVER
        if settled is None or period != settled.period or state.shocked_ns == self.step.time_ns:
            since_h = (self.step.time_ns - state.shocked_ns) / HOUR_NS if shocked else 0.0
            missing = 1.0 - self.known["traffic_after_shock"]
            recovery = np.exp(-max(since_h - 24.0, 0.0) / self.known["traffic_recovery_h"])
            factor = self.known["trips_scale"] * float(1.0 - missing * recovery * shocked)
        else:
            factor = settled.factor
        closed = state.road_state >= self.known["road_closed_from_state"]
        narrowed = np.where(state.road_state > 0, self.known["damaged_road_capacity"], 1.0)
        share = np.where(closed, 0.0, narrowed)[layout.link_road]
        slowed = state.dark[layout.traffic.network.head] & layout.link_signal
        return RoadKey(
            period,
            factor,
            share,
            np.where(slowed, self.known["signal_dark_capacity"], 1.0),
            np.where(slowed, self.known["signal_dark_wait_min"], 0.0),
        )

    def _find_traffic(self, held: Equilibrium | None) -> Equilibrium:
        """Drivers settle anew when the period changes or a road does; to signals within the hour.

        Until then they keep to their paths and only their times change.
        """
        self._signals()
        state, traffic, gap = self.state, self.layout.traffic, self.known["assignment_gap"]
        key = self._key()
        settled = state.settled
        if settled is not None and not _same(key, settled):
            roads_differ = (
                key.period != settled.period
                or key.factor != settled.factor
                or not np.array_equal(key.capacity_share, settled.capacity_share)
            )
            if roads_differ or self.step.time_ns % HOUR_NS == 0:
                settled = key
        elif settled is None:
            settled = key
        if state.present is None or not _same(key, state.present) or settled is not state.settled:
            state.present, held = key, None
        state.settled = settled
        if held is not None:
            return held
        present = state.present
        found = traffic.dark(settled.period, settled.factor, gap, *settled[2:])
        if not _same(present, settled):
            share = present.capacity_share * present.signal_share
            found = hold_routes(traffic.network, found, share, present.wait_min)
        self._set_rates(found, present)
        return found

    def _set_rates(self, found: Equilibrium, key: RoadKey) -> None:
        traffic, gap = self.layout.traffic, self.known["assignment_gap"]
        usual = traffic.undamaged(key.period, key.factor, gap)
        usual_least = pair_total(usual.assigned, usual.pair_min)
        same_trips = pair_total(found.assigned, usual.pair_min)
        # undamaged, the two totals are the same number and the delay exactly 0
        usual_min = usual.total_min * (same_trips / usual_least if usual_least > 0.0 else 1.0)
        assigned = float(found.assigned.sum())
        demanded = float(traffic.trips_per_h(key.period, key.factor).sum())
        self.state.rates = {
            "vehicles_demanded": demanded,
            "vehicles_assigned": assigned,
            "vehicles_stranded": found.stranded_per_h,
            "vehicle_hours_delay": (found.total_min - usual_min) / 60.0
            + found.stranded_per_h * self.known["stranded_trip_delay_h"],
        }

    def _publish_journeys(self, now: Equilibrium) -> None:
        state, layout = self.state, self.layout
        key, gap = state.present, self.known["assignment_gap"]
        assert key is not None
        network, traffic = layout.traffic.network, layout.traffic
        usual = traffic.undamaged(key.period, key.factor, gap)
        last = traffic.usual_paths(key.period, key.factor, gap)
        own = state.road_event[layout.link_road]
        own = np.where(
            own > 0, own, np.where(layout.link_signal, state.dark_event[network.head], 0)
        )
        rise = np.where(own > 0, np.minimum(now.time_min, CUT_MIN) - usual.time_min, 0.0)

        def explain(
            name: str, codes: Codes, start: Codes, end: Codes, minutes: Vector, usually: Vector
        ) -> None:
            slower = minutes > SLOWER * usually
            link = blame(network, last, start, end, rise)
            new = np.where(slower, np.where(link >= 0, own[link], -1), 0)
            if (new < 0).any():
                new[new < 0] = self._diverted(usual)
            self.explain(name, minutes, codes, new, state.restored_road)

        light = self.known["emergency_speed_factor"]
        for name, codes, start, end in (
            ("scene_time", state.scene_event, layout.scene_from, layout.scene_to),
            ("hospital_time", state.hospital_event, layout.hospital_from, layout.hospital_to),
        ):
            minutes = np.minimum(now.pair_min[start, end] / light, CUT_MIN)
            explain(name, codes, start, end, minutes, usual.pair_min[start, end] / light)
        for name, journeys in (
            ("crew_travel_power", layout.crew_power),
            ("crew_travel_water", layout.crew_water),
            ("crew_travel_road", layout.crew_road),
        ):
            minutes, _, _ = self._crew_min(journeys, now)
            usually, depot, node = self._crew_min(journeys, usual)
            explain(name, state.crew_events[name], depot, node, minutes, usually)

    def _crew_min(self, journeys: Journeys, at: Equilibrium) -> tuple[Vector, Codes, Codes]:
        """Minutes from the soonest depot, with that depot and the road node where it leaves."""
        access = (
            journeys.access_km * self.known["access_detour"] / self.known["access_speed_kmh"] * 60.0
        )
        depots = self.layout.depots
        drive = at.pair_min[depots[:, None, None], journeys.node[None]]
        total = np.minimum(drive, CUT_MIN) + access[None]
        flat = total.transpose(1, 0, 2).reshape(len(journeys.node), -1)
        best = flat.argmin(axis=1)
        row = np.arange(best.size)
        depot, way = np.divmod(best, journeys.node.shape[1])
        minutes = flat[row, best] + self.known["crew_mobilise_min"]
        return minutes, depots[depot], journeys.node[row, way]

    def _diverted(self, usual: Equilibrium) -> int:
        """The event for journeys slowed by others who go round: one per set of closures."""
        state, layout = self.state, self.layout
        per_road = np.bincount(layout.link_road, usual.flow, len(layout.roads))
        closed = np.flatnonzero(state.road_event > 0)
        most = closed[np.argsort(-per_road[closed], kind="stable")[:NAMED_CLOSURES]]
        causes = [int(code) for code in state.road_event[most]]
        if not causes:
            causes = [int(c) for c in np.unique(state.dark_event[state.dark_event > 0])]
        if not causes and state.restored_road:
            causes = [state.restored_road]
        chosen = tuple(dict.fromkeys(causes))
        if not state.diverted or chosen != state.diverted_by:
            state.diverted = self.emit(
                "traffic_diverted",
                layout.roads[most[0]] if most.size else layout.nodes[int(state.dark.argmax())],
                "traffic that goes round closed roads or dark signals slows other journeys",
                chosen,
            )  # fmt: skip
            state.diverted_by = chosen
        return state.diverted


def _same(one: RoadKey, other: RoadKey) -> bool:
    return one[:2] == other[:2] and all(
        np.array_equal(a, b) for a, b in zip(one[2:], other[2:], strict=True)
    )
