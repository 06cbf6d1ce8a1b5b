"""Plays the water's part of a step: damage, pumps, service, and what caused its failing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from federation.twin import Step, Vector
from twins.city.desk import NEVER, Codes, Desk, State, hours_text
from twins.city.layout import CityLayout
from twins.city.water import ORIFICE, WEIGHT_MW, Flows, Hydraulics, WaterState, pass_time

SHORT, DRY, RESTORED = 0.99, 0.5, 0.9
"""Service below which a junction is short of water, is dry, and from which it is well again."""


class Mains(Desk):
    """The water network in one step."""

    def __init__(
        self, layout: CityLayout, state: State, step: Step, hydraulics: Hydraulics
    ) -> None:
        super().__init__(layout, state, step)
        self.hydraulics = hydraulics

    def pass_time(self) -> None:
        if self.step.span_h <= 0.0:
            return
        state, totals = self.state, self.state.totals
        span = pass_time(self.hydraulics, state.water, self.step.span_h)
        state.water = replace(state.water, level=span.level)
        totals["unserved_water_m3"] += span.required - span.delivered
        totals["water_delivered_m3"] += span.delivered
        totals["water_leaked_m3"] += span.leaked
        totals["water_pumped_m3"] += span.pumped

    def finish_repairs(self) -> None:
        state, step, layout = self.state, self.step, self.layout
        for index, time_ns in state.water_repairs.progress(step.last_ns, step.time_ns):
            part = layout.components[index]
            state.restored_water = self.emit(
                "component_repaired", part, f"{part} repaired after {hours_text(time_ns)}",
                [state.water_crew_event[index], state.water_note[index]],
            )  # fmt: skip
            state.water_note[index] = state.restored_water
            state.water_state[index] = 0
            state.water_event[index] = 0
            state.water_crew_event[index] = 0

    def note_damage(self) -> None:
        state, step, layout = self.state, self.step, self.layout
        parts = state.water_repairs.damage(step["water_repair_work"])
        for index in parts:
            was = state.water_state[index]
            now = max(int(step["water_damage_state"][index]), 1)
            state.water_state[index] = now
            causes = step.cause("water_damage_state", int(index)) or step.cause(
                "water_repair_work", int(index)
            )
            part = layout.components[index]
            if not state.water_event[index]:
                state.water_note[index] = state.remember(causes[0]) if causes else 0
            if layout.component_main[index] >= 0:
                if now >= 2 and was < 2:
                    kind, text = "main_broken", f"main {part} broken and shut off"
                elif was < 1 and now == 1:
                    kind, text = "main_leaking", f"main {part} leaks"
                else:
                    continue
            elif now >= 2 and was < 2:
                if layout.component_pump[index] >= 0:
                    kind, text = "pump_stopped", f"pump {part} stopped by damage"
                else:
                    kind, text = "tank_out", f"tank {part} shut off, damaged"
            else:
                continue
            state.water_event[index] = self.emit(kind, part, text, causes)
            state.water_note[index] = state.water_event[index]
        if state.shocked_ns == NEVER and parts.size:
            state.shocked_ns = step.time_ns

    def flow(self) -> None:
        """Send crews, find pressures and flows, publish service; say what failed and why."""
        state, layout, step, known = self.state, self.layout, self.step, self.known
        self.send_crews(
            [a for a in step.actions if a.actuator == "assign_crew_water"],
            layout.components, state.water_repairs, state.water_crew_event, state.water_note,
            state.shown["crew_travel_water"],
        )  # fmt: skip
        self.publish_repairs("water", state.water_repairs, state.water_crew_event, state.water_note)
        out = state.water_state >= 2
        broken = _members(layout.component_pump, out, len(layout.pumps))
        powered = step["pump_power"] >= known["pump_power_needed"]
        restarted = self._pump_events(~broken & powered, broken)
        pipe_open = np.ones(len(layout.water.pipes), np.bool_)
        pipe_open[layout.component_main[(layout.component_main >= 0) & out]] = False
        lost_tanks = _members(layout.component_tank, out, len(layout.water.tanks))
        for tank in np.flatnonzero(lost_tanks):
            pipe_open[layout.water.pipes.index(layout.water.tank_pipe[tank])] = False
        leak = np.zeros(len(layout.junctions))
        for index in np.flatnonzero((layout.component_main >= 0) & (state.water_state == 1)):
            main = layout.component_main[index]
            area = known["leak_area_share"] * layout.water.pipe_area_m2[main]
            for end in layout.water.pipe_ends[main]:
                if end in layout.water.junctions:
                    leak[layout.water.junctions.index(end)] += ORIFICE * area / 2.0
        demand = layout.water.demand(self.hour % 24.0) * known["water_demand_factor"]
        need, joined = step["hospital_water_need"], layout.hospital_junction >= 0
        for hospital in np.flatnonzero(joined & (need >= 0.0)):
            junction = layout.hospital_junction[hospital]
            usual = layout.hospital_base_m3_h[hospital]
            demand[junction] = max(demand[junction] - usual, 0.0) + need[hospital]
        state.water = WaterState(demand, state.water.level, state.pump_on, pipe_open, leak)
        flows = self.hydraulics.solve(state.water)
        lifted = WEIGHT_MW * flows.pump_flow * flows.lift / known["pump_efficiency"]
        drawn = np.maximum(lifted, 0.0)
        state.pump_wanted_mw = np.where(state.pump_on, drawn, state.pump_wanted_mw)
        service = self._service(flows)
        because = self._junction_events(service)
        load = np.where(broken, 0.0, state.pump_wanted_mw)
        self.publish("pump_load", load, self.noted(state.pump_event) | restarted)
        hospital_service = np.ones(len(layout.hospitals))
        hospital_service[joined] = service[layout.hospital_junction[joined]]
        causes = {
            int(h): because[int(layout.hospital_junction[h])]
            for h in np.flatnonzero(joined)
            if int(layout.hospital_junction[h]) in because
        }
        self.publish("hospital_water", hospital_service, causes)
        missing = float((layout.junction_people * (1.0 - service)).sum())
        self.publish("people_without_water", [round(missing, 6)])
        network = layout.water
        stored = float(((state.water.level - network.tank_low) * network.tank_area_m2).sum())
        self.publish("water_stored_m3", [stored])

    def _service(self, flows: Flows) -> Vector:
        """Delivered over required; 1 where nothing is required."""
        demand = self.state.water.demand
        required = np.where(demand > 0.0, demand, 1.0)
        service = np.where(demand > 0.0, flows.delivered / required, 1.0)
        service = np.round(np.clip(service, 0.0, 1.0), 6)
        return np.where(service > 1.0 - 1e-4, 1.0, service)

    def _pump_events(self, on: NDArray[np.bool_], broken: NDArray[np.bool_]) -> dict[int, str]:
        """Stop and start pumps; the event of each that starts."""
        restarted = {}
        state, step, layout = self.state, self.step, self.layout
        place = {int(p): i for i, p in enumerate(layout.component_pump) if p >= 0}
        for pump in np.flatnonzero(on != state.pump_on):
            name = layout.pumps[pump]
            causes = step.cause("pump_power", int(pump))
            if on[pump]:
                text = f"pump {name} runs again"
                before = [state.events[state.pump_event[pump]]]
                if state.restored_water and not causes:
                    before = [state.events[state.restored_water]]
                state.restored_water = self.emit("pump_restarted", name, text, causes or before)
                state.pump_event[pump] = 0
                restarted[int(pump)] = state.events[state.restored_water]
            elif broken[pump]:
                state.pump_event[pump] = state.water_event[place[int(pump)]]
            else:
                text = f"pump {name} stopped without power"
                state.pump_event[pump] = self.emit("pump_stopped", name, text, causes)
        state.pump_on = on
        return restarted

    def _junction_events(self, service: Vector) -> dict[int, str]:
        """Publish the service of the junctions; what explains it where it is not as usual."""
        state, layout = self.state, self.layout
        short = service < SHORT
        dry = np.where(state.dry, service < RESTORED, service < DRY)
        new = np.flatnonzero((short & ~state.short) | (dry & ~state.dry))
        if new.size:
            state.junction_event[new] = self._water_causes(new)
        for junction in np.flatnonzero(dry & ~state.dry):
            name = layout.junctions[junction]
            state.junction_event[junction] = self.emit(
                "junction_dry", name, f"{name} gets {service[junction]:.0%} of its water",
                [state.junction_event[junction]],
            )  # fmt: skip
        back = np.flatnonzero(state.dry & ~dry)
        for junction in back:
            name = layout.junctions[junction]
            state.junction_event[junction] = self.emit(
                "water_restored", name, f"{name} has water again",
                [state.restored_water or state.junction_event[junction]],
            )  # fmt: skip
        codes = np.where(short | dry, state.junction_event, 0)
        causes = {int(j): state.events[codes[j]] for j in np.flatnonzero(codes)}
        well = np.flatnonzero(state.short & ~short)
        for junction in well:
            code = state.junction_event[junction] if junction in back else state.restored_water
            if code:
                causes[int(junction)] = state.events[code]
            state.junction_event[junction] = 0 if not dry[junction] else code
        state.short, state.dry = short, dry
        self.publish("junction_service", service, causes)
        return causes

    def _water_causes(self, junctions: Codes) -> Codes:
        """For each junction the event of the outage whose repair alone would help it most.

        Where no single repair helps, all outages of a sort are undone together, and the
        nearest of the sort that helps most is named. Found by solving the network anew.
        """
        state, layout = self.state, self.layout
        actual = self._service(self.hydraulics.solve(state.water))[junctions]
        sorts: dict[str, list[tuple[int, WaterState]]] = {"pump": [], "main": [], "leak": []}
        whole = dict.fromkeys(sorts, state.water)
        for pump in np.flatnonzero(state.pump_event):
            for target in ("one", "all"):
                base = state.water if target == "one" else whole["pump"]
                on = base.pump_open.copy()
                on[pump] = True
                better = replace(base, pump_open=on)
                if target == "one":
                    sorts["pump"].append((int(state.pump_event[pump]), better))
                else:
                    whole["pump"] = better
        for index in np.flatnonzero(state.water_event):
            pipe = layout.component_main[index]
            if layout.component_tank[index] >= 0:
                name = layout.water.tank_pipe[layout.component_tank[index]]
                pipe = layout.water.pipes.index(name)
            if pipe < 0:
                continue
            code = int(state.water_event[index])
            if state.water_state[index] >= 2:
                is_open = state.water.pipe_open.copy()
                is_open[pipe] = True
                sorts["main"].append((code, replace(state.water, pipe_open=is_open)))
                all_open = whole["main"].pipe_open.copy()
                all_open[pipe] = True
                whole["main"] = replace(whole["main"], pipe_open=all_open)
            else:
                leak = state.water.leak.copy()
                ends = layout.water.pipe_ends[pipe]
                area = self.known["leak_area_share"] * layout.water.pipe_area_m2[pipe]
                for end in ends:
                    if end in layout.water.junctions:
                        place = layout.water.junctions.index(end)
                        leak[place] = max(leak[place] - ORIFICE * area / 2.0, 0.0)
                sorts["leak"].append((code, replace(state.water, leak=leak)))
                whole["leak"] = replace(whole["leak"], leak=np.zeros_like(leak))
        best_gain = np.full(junctions.size, 0.01)
        best = np.zeros(junctions.size, np.int64)
        for candidates in sorts.values():
            for code, better in candidates:
                gain = self._service(self.hydraulics.solve(better))[junctions] - actual
                best = np.where(gain > best_gain, code, best)
                best_gain = np.maximum(gain, best_gain)
        if (best == 0).any():
            for sort, candidates in sorts.items():
                if not candidates:
                    continue
                gain = self._service(self.hydraulics.solve(whole[sort]))[junctions] - actual
                nearest = self._nearest(junctions, [code for code, _ in candidates])
                best = np.where(gain > best_gain, nearest, best)
                best_gain = np.maximum(gain, best_gain)
            everything = [code for candidates in sorts.values() for code, _ in candidates]
            if everything:
                best = np.where(best == 0, self._nearest(junctions, everything), best)
        self.hydraulics.solve(state.water)
        return best

    def _nearest(self, junctions: Codes, codes: list[int]) -> Codes:
        """Of some outages, the code of the one nearest to each junction."""
        state, layout = self.state, self.layout
        where = []
        for code in codes:
            component = np.flatnonzero(state.water_event == code)
            if component.size == 0:
                pump = int(np.flatnonzero(state.pump_event == code)[0])
                component = np.flatnonzero(layout.component_pump == pump)
            where.append(layout.component_xy_km[component[0]])
        away = np.linalg.norm(
            layout.junction_xy_km[junctions][:, None] - np.array(where)[None], axis=2
        )
        nearest: Codes = np.array(codes, np.int64)[away.argmin(axis=1)]
        return nearest


def _members(index: Codes, chosen: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    member = np.zeros(size, np.bool_)
    member[index[(index >= 0) & chosen]] = True
    return member
