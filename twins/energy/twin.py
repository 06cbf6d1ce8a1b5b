"""The power grid as a twin: it takes damage, sheds, sends crews and says who has power."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation.errors import Reason, TwinError
from federation.snapshot import Snapshots
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    NOTHING,
    SYSTEM,
    Action,
    Actuator,
    Causality,
    Description,
    Entity,
    Fidelity,
    LinearBlock,
    Parameter,
    Risk,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.energy import ties
from twins.energy.demand import Day, FeederDemand, Supplied, feeder_demand, supplied
from twins.energy.flexibility import transport_block
from twins.energy.network import PowerNet, power_net
from twins.energy.operation import (
    COLLAPSE,
    LOW_VOLTAGE,
    SCARCE,
    ControlRoom,
    Limits,
    Operation,
)
from twins.energy.powerflow import trusted_newton
from twins.energy.shortage import LEASE_NS, Orders, Rationed, ration
from twins.energy.weather import (
    COOLING,
    COOLING_PARAMETERS,
    METERED_ABOVE_C,
    UNTOLD_C,
    Prospect,
    Told,
    prospect,
    warm_factor,
)
from twins.regions import assumptions, data_hash, optional_rows, region_rows
from twins.regions.weather import forecast_entities
from twins.repair import MOST_CREWS, Repairs, not_believed

PERIOD_NS = 5 * MINUTE_NS
OUT_OF_SERVICE = 2
"""The damage state from which a component is out until repaired. Hazus (Earthquake Model
Technical Manual, power system facilities) calls slight damage still functional; moderate
damage disables circuits or the component itself."""
FULL, PART, NONE = 0, 1, 2
NOTICED = 1e-3
"""A load point that lacks less than this part of its demand counts as served."""
MOST_CAUSES = 8

_OWN_PARAMETERS = (
    Parameter(
        "start_hour",
        "h",
        8.0,
        0.0,
        24.0,
        "local hour of day at the start of the run",
        "assumption: a working-day morning",
    ),
    Parameter(
        "shock_h",
        "h",
        1.0,
        0.0,
        72.0,
        "when the mainshock comes; hours_to_90pct_power counts from it",
        "assumption: as the disaster twin",
    ),
    Parameter(
        "demand_factor",
        "1",
        0.75,
        0.3,
        1.2,
        "demand at the peak of the day relative to the record peak",
        "assumption: a warm working day",
    ),
    Parameter(
        "load_night_ratio",
        "1",
        0.62,
        0.5,
        0.85,
        "lowest over highest hourly demand of the day",
        "assumption: summer days of southern US utilities",
    ),
    Parameter(
        "load_peak_hour",
        "h",
        17.0,
        14.0,
        19.0,
        "hour of the highest demand",
        "assumption: late afternoon cooling",
    ),
    Parameter(
        "emergency_rating",
        "1",
        1.2,
        1.0,
        1.5,
        "current that lines and transformers may carry, relative to their rating",
        "assumption: usual emergency ratings are 10 to 30 per cent above normal ones",
    ),
    Parameter(
        "voltage_min",
        "1",
        0.9,
        0.8,
        0.95,
        "voltage per unit below which load is shed",
        "ANSI C84.1, lower limit of range B at the customer, rounded",
    ),
    Parameter(
        "restart_delay_min",
        "min",
        30.0,
        0.0,
        240.0,
        "from the repair of a component to its return to service",
        "assumption: tests and switching",
    ),
    Parameter(
        "critical_feeders_last",
        "1",
        1.0,
        0.0,
        1.0,
        "1: feeders of hospitals and water pumps are shed last; 0: all feeders alike",
        "assumption: rotating outages spare critical circuits, as utilities' plans do",
    ),
    Parameter(
        "tie_lines_on",
        "1",
        0.0,
        0.0,
        1.0,
        "1: neighbours can be helped and help over tie lines; 0: as if there were none",
        "by choice",
    ),
    Parameter(
        "value_unserved_mwh",
        "USD/MWh",
        9000.0,
        1500.0,
        35685.0,
        "what a megawatt-hour not served costs",
        "ERCOT: 9000 until 2022, 5000 since, 35685 by the survey of 2024 (Brattle for PUCT)",
    ),
    *COOLING_PARAMETERS,
)


@lru_cache(maxsize=4)
def _control_room(region: str) -> ControlRoom:
    """One per region for all sessions: its answers depend on what it is asked only."""
    net = power_net(region)
    heaviest = np.argsort(-np.abs(net.grid.branch_flow_mva(net.grid.voltage)[0]), kind="stable")
    lines = [int(b) for b in heaviest if b in set(net.component_branch.tolist())]
    cases: list[tuple[list[int], list[int]]] = [([], []), ([lines[0]], [])]
    if net.grid.infeed_node.size > 1:
        cases.append(([], [0]))
        cases.append((lines[10:20:3], [net.grid.infeed_node.size - 1]))
    hospitals = net.load_node[net.hospital_load_point[net.hospital_load_point >= 0]]
    vital = np.unique(np.concatenate([hospitals, net.pump_node]))
    return ControlRoom(net.grid, trusted_newton(net.net, net.grid, cases), vital.tolist())


@dataclass
class _State:
    """Everything that a session knows; plain data, so that a snapshot is all of it."""

    repairs: Repairs
    severity: Vector
    told_state: Vector
    out_event: list[str]
    last_event: list[str]
    crew_event: list[str]
    branch_on: NDArray[np.bool_]
    infeed_on: NDArray[np.bool_]
    out: NDArray[np.bool_]
    back_ns: NDArray[np.int64]
    condition: NDArray[np.int64]
    condition_event: list[str]
    orders: Orders
    demand: FeederDemand | None = None
    limit_mw: float = -1.0
    agreed: bytes = b""
    """What is agreed with neighbours, as the present operation has it."""
    tie_order_mw: Vector = field(default_factory=lambda: np.zeros(0))
    tie_until_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    tie_agreed_until_h: Vector = field(default_factory=lambda: np.zeros(0))
    """Hours of the run at which what was agreed ends, whatever is ordered; 0: nothing is said."""
    tie_event: list[str] = field(default_factory=list)
    tie_cause: list[str] = field(default_factory=list)
    """Per tie line the event behind the order that holds."""
    ordered: bytes = b""
    """The orders that the present operation follows."""
    rationed: Rationed | None = None
    """How a limited supply is shared; None as long as nobody limits it or gives an order."""
    person_h: float = 0.0
    told: Told = field(default_factory=Told)
    metered_per_c: float | None = None
    """By how much demand was seen to grow with the heat; None before a warm hour."""
    stepped_ns: int = 0
    operation: Operation | None = None
    supplied: Supplied | None = None
    unserved_mwh: float = 0.0
    below_until_ns: int = 0
    published: dict[str, Vector] = field(default_factory=dict)


STATES = Snapshots(_State, Repairs, Orders, FeederDemand, Rationed, Operation, Supplied, Told)


class EnergyTwin(Twin):
    """AC power flow of a damaged grid every five minutes, with shedding and repair crews.

    Within a step crews travel and work exactly; switching takes effect at its end. Demand
    follows an hourly profile, so that between whole hours only new damage, finished
    repairs, hospitals and pumps change the power flow.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.net: PowerNet = power_net(region)
        self.room = _control_room(region)
        self._description = _describe(region)
        point_of_node = {int(node): point for point, node in enumerate(self.net.load_node)}
        self._pump_point = np.array([point_of_node.get(int(n), -1) for n in self.net.pump_node])
        self._parameters = {p.name: p.default for p in self._description.parameters}
        self._state = self._fresh()
        self._now_ns = 0

    def describe(self) -> Description:
        return self._description

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        """The grid draws no lots: `seed` changes nothing."""
        self._parameters = dict(parameters)
        self._state = self._fresh()
        self._now_ns = 0

    def _fresh(self) -> _State:
        size, points = len(self.net.components), len(self.net.load_points)
        return _State(
            repairs=Repairs(size),
            severity=np.zeros(size),
            told_state=np.zeros(size),
            out_event=[""] * size,
            last_event=[""] * size,
            crew_event=[""] * size,
            branch_on=np.ones(self.net.grid.branches, dtype=bool),
            infeed_on=np.ones(self.net.grid.infeed_node.size, dtype=bool),
            out=np.zeros(size, dtype=bool),
            back_ns=np.zeros(size, dtype=np.int64),
            condition=np.zeros(points, dtype=np.int64),
            condition_event=[""] * points,
            orders=Orders.none(points, self._parameters["response_store_mwh"]),
            tie_order_mw=np.zeros(len(self.net.tie_lines)),
            tie_until_ns=np.zeros(len(self.net.tie_lines), dtype=np.int64),
            tie_agreed_until_h=np.zeros(len(self.net.tie_lines)),
            tie_event=[""] * len(self.net.tie_lines),
            tie_cause=[""] * len(self.net.tie_lines),
        )

    def snapshot(self) -> bytes:
        return STATES.pack((self._state, self._now_ns))

    def restore(self, state: bytes) -> None:
        self._state, self._now_ns = STATES.unpack(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> None:
        """The grid draws no lots: only parameters and the believed `remaining_work` count.

        By how much demand grows with the heat is known once warm hours have been metered: what is
        served and what is shed at a temperature tell it.
        """
        metered = self._state.metered_per_c
        seen = {} if metered is None else {"cooling_per_c": metered}
        self._parameters = {**parameters, **seen}
        self._now_ns = time_ns
        for name, work_h in believed.items():
            if name != "remaining_work":
                raise not_believed("energy", name)
            self._state.repairs.believe(work_h)

    def flexibility(self, periods_ns: tuple[int, ...]) -> LinearBlock:
        p = self._parameters
        return transport_block(
            self.net,
            periods_ns,
            self._now_ns,
            day=self._day,
            emergency_rating=p["emergency_rating"],
            critical_feeders_last=p["critical_feeders_last"] >= 0.5,
            value_of_lost_load_usd_per_mwh=p["value_unserved_mwh"],
            prospect=self._prospect(periods_ns),
        )

    def _prospect(self, periods_ns: tuple[int, ...]) -> Prospect | None:
        state = self._state
        orders = state.orders
        since_h = (self._now_ns - state.stepped_ns) / HOUR_NS
        soon_mwh = min(orders.response_mw * since_h, orders.left_mwh)
        return prospect(
            self._parameters,
            self._day,
            periods_ns,
            self._now_ns,
            float(self.net.load_base_mw.sum()),
            state.told,
            orders.left_mwh - soon_mwh,
            orders.used_mwh + soon_mwh,
        )

    # --- one step -----------------------------------------------------------------------

    def advance(self, step: Step) -> None:
        state = self._state
        if state.supplied is not None:
            # what was switched at the last step held until now
            state.unserved_mwh += state.supplied.shed_mw * step.span_h
            state.person_h += float(self.net.people @ (1 - state.supplied.load_point)) * step.span_h
            if state.supplied.served_mw < 0.9 * state.supplied.demand_mw:
                state.below_until_ns = step.time_ns
        self._finish_repairs(step)
        self._take_damage(step)
        state.orders.pass_time(step.last_ns, step.time_ns)
        state.tie_order_mw[state.tie_until_ns <= step.time_ns] = 0.0
        self._take_orders(step)
        self._now_ns = state.stepped_ns = step.time_ns
        self._take_forecasts(step)
        demand = self._demand(step)
        limit_mw = float(step["supply_limit"][0])
        ordered = state.orders.limit.tobytes() + np.float64(state.orders.response_mw).tobytes()
        out = (state.severity >= OUT_OF_SERVICE) | (state.back_ns > step.time_ns)
        exchange = self._exchange(step)
        if (
            state.operation is None
            or (out != state.out).any()
            or demand != state.demand
            or limit_mw != state.limit_mw
            or ordered != state.ordered
            or (exchange is not None and exchange.agreed_mw.tobytes() != state.agreed)
        ):
            state.limit_mw, state.ordered = limit_mw, ordered
            back = np.flatnonzero(state.out & ~out)
            state.out = out
            self._operate(demand, exchange)
            begun = self._tell_tie_lines(step)
            repaired = {int(index): state.last_event[index] for index in back}
            self._tell_load_points(step, repaired, begun)
        self._publish(step)

    def _exchange(self, step: Step) -> ties.Exchange | None:
        """What is agreed with neighbours, if the run has any."""
        net = self.net
        if not net.tie_lines or self._parameters["tie_lines_on"] < 0.5:
            return None
        told_mw = np.maximum(step["tie_offered"], 0.0) - np.maximum(step["tie_asked"], 0.0)
        until_h = self._state.tie_agreed_until_h
        is_over = (until_h > 0.0) & (step.time_ns >= np.rint(until_h * HOUR_NS))
        agreed_mw = told_mw + np.where(is_over, 0.0, self._state.tie_order_mw)
        return ties.Exchange(net.tie_node, agreed_mw, net.tie_rating_mw)

    def _demand(self, step: Step) -> FeederDemand:
        share = self._day.share(step.time_ns)
        share *= warm_factor(self._parameters, float(step["ambient_temperature"][0]))
        return feeder_demand(self.net, share, step["hospital_load"], step["pump_load"])

    @property
    def _day(self) -> Day:
        p = self._parameters
        return Day(p["start_hour"], p["load_peak_hour"], p["load_night_ratio"], p["demand_factor"])

    def _finish_repairs(self, step: Step) -> None:
        state = self._state
        delay_min = self._parameters["restart_delay_min"]
        for index, done_ns in state.repairs.progress(step.last_ns, step.time_ns):
            name = self.net.components[index]
            text = f"{name} is repaired at {done_ns / HOUR_NS:.3f} h"
            if state.severity[index] >= OUT_OF_SERVICE:
                state.back_ns[index] = done_ns + round(delay_min * MINUTE_NS)
                text += f" and back in service in {delay_min:.0f} min"
            repaired = step.emit("component_repaired", name, text, [state.crew_event[index]])
            state.severity[index] = 0.0
            state.last_event[index] = repaired
            state.crew_event[index] = ""

    def _take_damage(self, step: Step) -> None:
        state = self._state
        told, work = step["damage_state"], step["repair_work"]
        was_damaged = state.repairs.remaining_h > 0.0
        worked = np.zeros(told.size, dtype=bool)
        worked[state.repairs.damage(work)] = True
        before = state.severity.copy()
        # new work on a whole component is its new state; on a damaged one the worse counts
        fresh = worked & ~was_damaged
        state.severity[fresh] = told[fresh]
        again = worked & was_damaged
        state.severity[again] = np.maximum(state.severity, told)[again]
        # a state without work holds until the state itself is taken back
        moved = ~worked & (told != state.told_state)
        state.severity[moved] = np.maximum(state.severity, told)[moved]
        lifted = moved & (state.repairs.remaining_h <= 0.0)
        state.severity[lifted] = told[lifted]
        state.told_state = told.copy()
        out_before, out = before >= OUT_OF_SERVICE, state.severity >= OUT_OF_SERVICE
        for index in np.flatnonzero(state.severity != before):
            causes = step.cause("damage_state", int(index)) or step.cause("repair_work", int(index))
            if out[index] and not out_before[index]:
                name = self.net.components[index]
                state.out_event[index] = step.emit(
                    "component_out",
                    name,
                    f"{name} is out of service: damage state {state.severity[index]:.0f}, "
                    f"{state.repairs.remaining_h[index]:.1f} crew-hours to repair",
                    causes,
                )
            elif not out[index] and not out_before[index]:
                state.out_event[index] = causes[0] if causes else ""
            state.last_event[index] = state.out_event[index]

    def _take_forecasts(self, step: Step) -> None:
        """Keep what is told of the hours to come; that demand grows with the heat is metered."""
        forecast_c, deviation_c = step["forecast_temperature"], step["forecast_deviation"]
        outdoor_c, limit_mw = float(step["ambient_temperature"][0]), step["forecast_supply_limit"]
        if outdoor_c > self._parameters["cooling_base_c"] + METERED_ABOVE_C:
            self._state.metered_per_c = self._parameters["cooling_per_c"]
        self._state.told = Told(
            forecast_c if forecast_c[0] > UNTOLD_C else None,
            deviation_c if deviation_c[0] >= 0.0 else None,
            limit_mw if limit_mw[0] >= 0.0 else None,
            outdoor_c,
            self._state.metered_per_c is not None,
        )

    def _take_orders(self, step: Step) -> None:
        """Let operators set what load points may serve and what customers do without."""
        if not step.actions:
            return
        state = self._state
        orders = state.orders
        components = {name: index for index, name in enumerate(self.net.components)}
        points = {name: index for index, name in enumerate(self.net.load_points)}
        lines = {name: index for index, name in enumerate(self.net.tie_lines)}
        places = {
            "assign_crew": components,
            "serve_limit": points,
            "demand_response": {SYSTEM: 0},
            "tie_exchange": lines,
            "tie_agreed_until": lines,
        }
        for action in step.actions:
            place = places.get(action.actuator, {})
            if action.entity not in place:
                raise TwinError(
                    Reason.UNKNOWN_ENTITY,
                    f"energy has no actuator {action.actuator!r} at {action.entity!r}",
                    {"actuator": action.actuator, "entity": action.entity},
                )
            index = place[action.entity]
            if action.actuator == "assign_crew":
                self._send_crews(step, action, index)
            elif action.actuator == "tie_agreed_until":
                state.tie_agreed_until_h[index] = max(action.value, 0.0)
            elif action.actuator == "tie_exchange":
                most_mw = float(self.net.tie_rating_mw[index])
                state.tie_order_mw[index] = min(max(action.value, -most_mw), most_mw)
                state.tie_until_ns[index] = step.time_ns + ties.LEASE_NS
                state.tie_cause[index] = action.cause
            elif action.actuator == "serve_limit":
                value = min(max(action.value, 0.0), 1.0)
                if value != orders.limit[index]:
                    orders.limit_event[index] = step.emit(
                        "serve_limit",
                        action.entity,
                        f"{action.entity} may serve {100 * value:.0f} % of its feeders at once",
                        [action.cause],
                    )
                orders.limit[index] = value
                orders.limit_until_ns[index] = step.time_ns + LEASE_NS
            else:
                value = min(max(action.value, 0.0), self._parameters["response_most_mw"])
                value = value if orders.left_mwh > 0.0 else 0.0
                if value != orders.response_mw:
                    orders.response_event = step.emit(
                        "demand_response",
                        SYSTEM,
                        f"customers under contract use {value:.0f} MW less",
                        [action.cause],
                    )
                orders.response_mw = value
                orders.response_until_ns = step.time_ns + LEASE_NS

    def _send_crews(self, step: Step, action: Action, index: int) -> None:
        state = self._state
        travel_min = max(float(step["crew_travel"][index]), 0.0)
        crews = int(np.clip(np.rint(action.value), 0, MOST_CREWS))
        change = state.repairs.assign(index, crews, step.time_ns, travel_min / 60.0)
        causes = [action.cause, state.out_event[index], *step.cause("crew_travel", index)]
        if change > 0:
            state.crew_event[index] = step.emit(
                "crew_assigned",
                action.entity,
                f"{change} crew(s) sent to {action.entity}, {travel_min:.0f} min away",
                causes,
            )
        elif change < 0:
            step.emit(
                "crew_recalled",
                action.entity,
                f"{-change} crew(s) recalled from {action.entity}",
                [action.cause, state.crew_event[index]],
            )
        elif crews > 0 and state.repairs.remaining_h[index] <= 0.0:
            step.emit(
                "crew_not_needed",
                action.entity,
                f"{action.entity} has no damage to repair",
                [action.cause],
            )

    def _operate(self, demand: FeederDemand, exchange: ties.Exchange | None) -> None:
        state, p = self._state, self._parameters
        out = state.out
        branch, infeed = self.net.component_branch, self.net.component_infeed
        state.branch_on[:] = True
        state.infeed_on[:] = True
        state.branch_on[branch[out & (branch >= 0)]] = False
        state.infeed_on[infeed[out & (infeed >= 0)]] = False
        critical_last = p["critical_feeders_last"] >= 0.5
        limits = Limits(p["emergency_rating"], p["voltage_min"], critical_last)

        def operate(wanted: FeederDemand) -> Operation:
            node_mva = wanted.node_mva(self.net)
            on = (state.branch_on, state.infeed_on)
            if exchange is None:
                return self.room.operate(*on, node_mva, limits)
            return ties.operate(self.room, *on, node_mva, limits, exchange)

        state.demand = demand
        state.agreed = b"" if exchange is None else exchange.agreed_mw.tobytes()
        orders = state.orders
        free = state.limit_mw < 0.0 and orders.response_mw == 0.0 and (orders.limit == 1.0).all()
        if free and state.rationed is None:
            state.operation = operate(demand)
            state.supplied = supplied(self.net, demand, state.operation.share, critical_last)
            return
        state.rationed = ration(
            self.net,
            demand,
            orders,
            state.limit_mw,
            p["relay_block"],
            critical_last,
            operate,
        )
        state.operation, state.supplied = state.rationed.operation, state.rationed.served

    # --- what is told -------------------------------------------------------------------

    def _tell_tie_lines(self, step: Step) -> dict[int, str]:
        """Emit an event when power begins or ceases to flow over a tie line, or turns; the events
        by line of what comes from now on."""
        state, net = self._state, self.net
        begun: dict[int, str] = {}
        assert state.operation is not None
        before = state.published.get("tie_flow", np.zeros(len(net.tie_lines)))
        for index, now_mw in enumerate(state.operation.tie_mw):
            way, was = np.sign(np.rint(now_mw)), np.sign(np.rint(before[index]))
            if way == was:
                continue
            name = net.tie_lines[index]
            kind, text = {
                1.0: ("tie_imports", f"{now_mw:.0f} MW come over {name}"),
                -1.0: ("tie_exports", f"{-now_mw:.0f} MW go over {name}"),
                0.0: ("tie_idle", f"nothing flows over {name} any more"),
            }[float(way)]
            causes = [*step.cause("tie_offered", index), *step.cause("tie_asked", index)]
            causes += [state.tie_cause[index]] * bool(state.tie_cause[index])
            state.tie_event[index] = step.emit(kind, name, text, causes)
            if way > 0.0:
                begun[index] = state.tie_event[index]
        return begun

    def _tell_load_points(
        self, step: Step, repaired: Mapping[int, str], begun: Mapping[int, str]
    ) -> None:
        """Emit an event for every load point whose condition changed."""
        state = self._state
        assert state.supplied is not None
        assert state.operation is not None
        fraction = state.supplied.load_point
        condition = np.where(fraction < NOTICED, NONE, np.where(fraction < 1 - NOTICED, PART, FULL))
        for index in np.flatnonzero(condition != state.condition):
            name, now = self.net.load_points[index], condition[index]
            better = now < state.condition[index]
            back = self._repairs_near(int(index), repaired) if better else []
            back += self._ties_near(int(index), begun) if better else []
            if now == FULL:
                kind, text, causes = "load_point_restored", f"{name} is fully served again", back
                if not back:
                    causes = [state.condition_event[index]]
                    text += " as demand fell"
            elif now == PART:
                text = f"{name} is served to {100 * fraction[index]:.0f} %: "
                kind, text = "load_shed", text + self._why(int(index))
                causes = back + self._outages_around(int(index)) + self._rationing(step, int(index))
            elif state.operation.share[self.net.load_node[index]] > 0.0 and self._rationing(
                step, int(index)
            ):
                kind, text = "load_point_dark", f"{name} has no power: {self._why(int(index))}"
                causes = self._rationing(step, int(index))
            else:
                energised = state.operation.share[self.net.load_node[index]] > 0.0
                kind = "load_point_dark"
                text = f"{name} has no power: " + (
                    self._why(int(index)) if energised else "nothing feeds its part of the grid"
                )
                causes = self._outages_around(int(index))
            state.condition_event[index] = step.emit(kind, name, text, causes)
        state.condition = condition

    def _rationing(self, step: Step, load_point: int) -> list[str]:
        """The orders and the shortage that a load point goes without for."""
        state = self._state
        if state.rationed is None:
            return []
        causes: list[str] = []
        if state.orders.limit[load_point] < 1.0:
            causes.append(state.orders.limit_event[load_point])
        if state.rationed.kept_out[load_point] > 0.0:
            causes += [*step.cause("supply_limit", 0), *step.cause("ambient_temperature", 0)]
        return [cause for cause in causes if cause]

    def _why(self, load_point: int) -> str:
        assert self._state.operation is not None
        rationed = self._state.rationed
        if rationed is not None and rationed.kept_out[load_point] > 0.0:
            return f"relays keep out {100 * rationed.kept_out[load_point]:.0f} % for want of supply"
        if self._state.orders.limit[load_point] < 1.0:
            return "its feeders take turns by order of the operator"
        reason = int(self._state.operation.reason[self.net.load_node[load_point]])
        if reason >= 0:
            return f"{self.net.branch_names[reason]} is at its rating"
        if reason == LOW_VOLTAGE:
            return "the voltage would be too low"
        if reason == COLLAPSE:
            return "the voltage would collapse"
        if reason == SCARCE:
            return "no more comes over the tie line that alone feeds it"
        return "nothing feeds it"

    def _ends(self, component: int) -> tuple[int, ...]:
        """The parts of the grid that a component touches."""
        assert self._state.operation is not None
        part, grid = self._state.operation.part, self.net.grid
        branch = int(self.net.component_branch[component])
        if branch >= 0:
            return int(part[grid.from_node[branch]]), int(part[grid.to_node[branch]])
        return (int(part[grid.infeed_node[self.net.component_infeed[component]]]),)

    def _outages_around(self, load_point: int) -> list[str]:
        """The outages that touch the part of the grid that a load point is in.

        In a dark part those on its border and its own infeeds: any of them would feed it.
        In a live part those through which most of the power went before, as they are what
        loads the rest.
        """
        state = self._state
        assert state.operation is not None
        mine = int(state.operation.part[self.net.load_node[load_point]])
        dark = state.operation.share[self.net.load_node[load_point]] <= 0.0
        found = []
        for component in np.flatnonzero(state.out):
            ends = self._ends(int(component))
            if mine in ends and (len(set(ends)) == len(ends) or not dark):
                found.append((-self._base_flow_mw(int(component)), int(component)))
        return [state.out_event[component] for _, component in sorted(found)[:MOST_CAUSES]]

    def _repairs_near(self, load_point: int, repaired: Mapping[int, str]) -> list[str]:
        assert self._state.operation is not None
        mine = int(self._state.operation.part[self.net.load_node[load_point]])
        return [event for component, event in repaired.items() if mine in self._ends(component)]

    def _ties_near(self, load_point: int, begun: Mapping[int, str]) -> list[str]:
        assert self._state.operation is not None
        part = self._state.operation.part
        mine = part[self.net.load_node[load_point]]
        return [event for tie, event in begun.items() if part[self.net.tie_node[tie]] == mine]

    def _base_flow_mw(self, component: int) -> float:
        """Power through a component of the undamaged grid at peak."""
        return float(_base_flows(self.region)[component])

    def _publish(self, step: Step) -> None:
        state, net = self._state, self.net
        assert state.supplied is not None
        assert state.operation is not None
        now = state.supplied
        shock_ns = round(self._parameters["shock_h"] * HOUR_NS)
        below_h = max(state.below_until_ns - shock_ns, 0) / HOUR_NS
        whole = (state.repairs.remaining_h <= 0.0) & (state.severity < 1.0)
        no_cause = [""]
        rationed: tuple[tuple[str, Vector | float, list[str]], ...] = ()
        if state.rationed is not None:
            rationed = (
                ("kept_out", state.rationed.kept_out, state.condition_event),
                ("rotating_demand", self._rotating_mw(), no_cause * len(net.load_points)),
                ("lacking", state.rationed.lacking_mw, no_cause),
                ("response_left_mwh", state.orders.left_mwh, no_cause),
                ("response_used_mwh", state.orders.used_mwh, no_cause),
                ("person_hours_unserved", state.person_h, no_cause),
            )
        tied: tuple[tuple[str, Vector | float, list[str]], ...] = ()
        if state.operation.tie_mw.size:
            tied = (
                ("tie_flow", state.operation.tie_mw, state.tie_event),
                ("tie_sent", np.maximum(-state.operation.tie_mw, 0.0), state.tie_event),
                ("tie_need", state.operation.tie_need_mw, [""] * len(net.tie_lines)),
                ("tie_spare", state.operation.tie_spare_mw, [""] * len(net.tie_lines)),
            )
        for name, values, events in (
            ("supplied_fraction", now.load_point, state.condition_event),
            ("pump_supplied", now.pump, state.condition_event),
            ("hospital_supplied", now.hospital, state.condition_event),
            ("intact", whole, state.last_event),
            ("remaining_work", state.repairs.remaining_h, state.last_event),
            ("crew_busy", state.repairs.crews, state.crew_event),
            ("served", now.served_mw, no_cause),
            ("shed", now.shed_mw, no_cause),
            ("losses", state.operation.losses_mw, no_cause),
            ("supply", state.operation.supply_mw, no_cause),
            ("unserved_energy_mwh", state.unserved_mwh, no_cause),
            ("hours_to_90pct_power", below_h, no_cause),
            ("people_without_power", net.people @ (1.0 - now.load_point), no_cause),
            *rationed,
            *tied,
        ):
            vector = np.array(values, dtype=np.float64, ndmin=1)
            before = state.published.get(name)
            if before is not None and (before == vector).all():
                continue
            changed = np.arange(vector.size) if before is None else np.flatnonzero(before != vector)
            # which entry of `events` explains each entry that changed
            explained = changed
            if name == "pump_supplied":
                explained = self._pump_point[changed]
            elif name == "hospital_supplied":
                explained = net.hospital_load_point[changed]
            causes = {
                int(index): events[place]
                for index, place in zip(changed, explained, strict=True)
                if place >= 0 and events[place]
            }
            step.publish(name, vector, causes)
            state.published[name] = vector

    def _rotating_mw(self) -> Vector:
        """What a load point's ordinary feeders want: what an order can take off."""
        assert self._state.demand is not None
        return self._state.demand.ordinary_mw


@lru_cache(maxsize=4)
def _base_flows(region: str) -> Vector:
    """Power in MW through every component in the undamaged grid with the stored loads."""
    net = power_net(region)
    at_from, at_to = net.grid.branch_flow_mva(net.grid.voltage)
    through = np.maximum(np.abs(at_from.real), np.abs(at_to.real))
    flows = np.zeros(len(net.components))
    for index in range(flows.size):
        branch, infeed = int(net.component_branch[index]), int(net.component_infeed[index])
        if branch >= 0:
            flows[index] = through[branch]
        else:
            node = net.grid.infeed_node[infeed]
            at_node = (net.grid.from_node == node) | (net.grid.to_node == node)
            flows[index] = through[at_node].sum()
    return flows


@lru_cache(maxsize=4)
def _describe(region: str) -> Description:
    net = power_net(region)
    declared = assumptions(region)
    inputs: tuple[Variable, ...] = (
        Variable(
            "damage_state",
            "power_component",
            "1",
            Causality.INPUT,
            0.0,
            0.0,
            4.0,
            "Hazus damage state; from 2 (moderate) a component is out of service until repaired",
        ),
        Variable(
            "repair_work",
            "power_component",
            "h",
            Causality.INPUT,
            0.0,
            0.0,
            doc="crew-hours of repair caused since the start; only its growth counts",
        ),
        Variable(
            "crew_travel",
            "power_component",
            "min",
            Causality.INPUT,
            30.0,
            0.0,
            doc="time that a crew sent now would be on the way; 30 until somebody says",
        ),
        Variable(
            "hospital_load",
            "hospital",
            "MW",
            Causality.INPUT,
            -1.0,
            0.0,
            doc="what a hospital wants of the grid; below 0: not said, its usual load is taken",
        ),
        Variable(
            "pump_load",
            "pump",
            "MW",
            Causality.INPUT,
            -1.0,
            0.0,
            doc="what a water pump wants of the grid; below 0: not said, its rated load is taken",
        ),
        Variable(
            "ambient_temperature",
            SYSTEM,
            "degC",
            Causality.INPUT,
            doc="outdoors; demand rises by cooling_per_c for each degree above cooling_base_c",
        ),
        Variable(
            "supply_limit",
            SYSTEM,
            "MW",
            Causality.INPUT,
            -1.0,
            doc="what the transmission grid gives at most; below 0: as much as is wanted",
        ),
        Variable(
            "forecast_temperature",
            "hour",
            "degC",
            Causality.INPUT,
            UNTOLD_C,
            doc="by hour of the run, for plans; until told, the outlook of the parameters",
        ),
        Variable(
            "forecast_deviation",
            "hour",
            "degC",
            Causality.INPUT,
            -1.0,
            doc="of the error of that forecast, by hour of the run; below 0: not told",
        ),
        Variable(
            "forecast_supply_limit",
            "hour",
            "MW",
            Causality.INPUT,
            -1.0,
            doc="by hour of the run, for plans; below 0: not told, forecast_limit_mw is taken",
        ),
    )

    if net.tie_lines:
        inputs += (
            Variable(
                "tie_offered",
                "tie_line",
                "MW",
                Causality.INPUT,
                0.0,
                0.0,
                doc="what the neighbour sends over a tie line; at most its rating counts",
            ),
            Variable(
                "tie_asked",
                "tie_line",
                "MW",
                Causality.INPUT,
                0.0,
                0.0,
                doc="what the neighbour asks for; given as far as own loads allow",
            ),
        )

    def output(name: str, kind: str, unit: str, doc: str, initial: float = 0.0) -> Variable:
        high = 1.0 if unit == "1" and kind != SYSTEM else float("inf")
        return Variable(name, kind, unit, Causality.OUTPUT, initial, 0.0, high, doc)

    outputs: tuple[Variable, ...] = (
        output("supplied_fraction", "load_point", "1", "served share of the demand", 1.0),
        output("pump_supplied", "pump", "1", "served share of the pump's feeder", 1.0),
        output("hospital_supplied", "hospital", "1", "served share of the hospital's feeder", 1.0),
        output("intact", "power_component", "1", "1: no damage left", 1.0),
        output("remaining_work", "power_component", "h", "crew-hours of repair still to do"),
        output("crew_busy", "power_component", "1", "crews on the way or at work"),
        output("served", SYSTEM, "MW", "demand that is served"),
        output("shed", SYSTEM, "MW", "demand that is not served"),
        output("losses", SYSTEM, "MW", "losses of lines and transformers"),
        output("supply", SYSTEM, "MW", "drawn from the infeeds: served + losses"),
        output("unserved_energy_mwh", SYSTEM, "MW*h", "demand not served since the start"),
        output(
            "hours_to_90pct_power",
            SYSTEM,
            "h",
            "from the mainshock to when 90 % of demand was served for good, as known so far",
        ),
        output("people_without_power", SYSTEM, "1", "people times the unserved share"),
        # the rest is told from the first limit of supply or order of an operator on
        output("kept_out", "load_point", "1", "share of the demand that relays keep out"),
        output("rotating_demand", "load_point", "MW", "what orders can take off in turns"),
        output("lacking", SYSTEM, "MW", "what was wanted less what the transmission grid gives"),
        output("response_left_mwh", SYSTEM, "MW*h", "that customers may still be asked for"),
        output("response_used_mwh", SYSTEM, "MW*h", "that customers did without by contract"),
        output("person_hours_unserved", SYSTEM, "h", "people times hours without power"),
    )
    if net.tie_lines:
        lowest = -float(net.tie_rating_mw.max())
        outputs += (
            Variable(
                "tie_flow",
                "tie_line",
                "MW",
                Causality.OUTPUT,
                0.0,
                lowest,
                doc="what comes over a tie line (negative: goes), told if tie_lines_on",
            ),
            output("tie_sent", "tie_line", "MW", "what goes over it to the neighbour"),
            output("tie_need", "tie_line", "MW", "what its part of the grid would take of it"),
            output(
                "tie_spare", "tie_line", "MW", "what it could give, own loads and reserve first"
            ),
        )
    actuator = Actuator(
        "assign_crew",
        "power_component",
        "1",
        0.0,
        float(MOST_CREWS),
        0.0,
        Risk.LOW,
        0,
        "send 0: the crew returns, the work that it did stays done",
        "crews at a component; each does a crew-hour of repair per hour after its journey",
    )
    limit = Actuator(
        "serve_limit",
        "load_point",
        "1",
        0.0,
        1.0,
        1.0,
        Risk.MEDIUM,
        LEASE_NS,
        "set 1: all feeders are served again",
        "share of its ordinary feeders that a load point serves at once; the others take turns",
    )
    response = Actuator(
        "demand_response",
        SYSTEM,
        "MW",
        0.0,
        declared.get("response_most_mw", COOLING["response_most_mw"]).default,
        0.0,
        Risk.LOW,
        LEASE_NS,
        "set 0: customers use what they want; the energy that was asked for is spent",
        "what customers under contract use less, as long as their store of energy lasts",
    )
    exchanges: tuple[Actuator, ...] = ()
    if net.tie_lines:
        exchanges = (
            Actuator(
                "tie_exchange",
                "tie_line",
                "MW",
                -float(net.tie_rating_mw.max()),
                float(net.tie_rating_mw.max()),
                0.0,
                Risk.MEDIUM,
                ties.LEASE_NS,
                "set 0: nothing is exchanged over the line",
                "what was agreed with the neighbour: comes (negative: goes), with tie_lines_on",
            ),
            Actuator(
                "tie_agreed_until",
                "tie_line",
                "h",
                0.0,
                1e6,
                0.0,
                Risk.LOW,
                0,
                "set 0: only the lease of tie_exchange ends it",
                "hour of the run at which what was agreed ends, whatever is ordered by then",
            ),
        )
    entities = [Entity(SYSTEM, SYSTEM)]
    for kind, file, key, label in (
        ("power_component", "power_components.csv", "component_id", "component_id"),
        ("load_point", "load_points.csv", "load_point", "load_point"),
        ("pump", "pumps.csv", "pump", "pump"),
        ("hospital", "hospitals.csv", "hospital", "name"),
    ):
        for row in region_rows(region, file):
            place = (float(row["lon_deg"]), float(row["lat_deg"]))
            entities.append(Entity(row[key], kind, row[label], *place))
    entities += forecast_entities()
    entities += [
        Entity(
            row["tie_line"], "tie_line", row["name"], float(row["lon_deg"]), float(row["lat_deg"])
        )
        for row in optional_rows(region, "tie_lines.csv")
    ]
    entities += [Entity(name, "bus", name, lon, lat) for name, lon, lat in net.line_ends]
    return Description(
        model="energy",
        version="1",
        domain="energy",
        entities=tuple(entities),
        variables=inputs + outputs,
        time=TimePolicy(period_ns=PERIOD_NS),
        fidelity=Fidelity.DETAILED,
        parameters=tuple(declared.get(p.name, p) for p in _OWN_PARAMETERS),
        actuators=(actuator, limit, response, *exchanges),
        kpis=("unserved_energy_mwh", "hours_to_90pct_power"),
        doc=f"AC power flow of {net.grid.nodes} nodes with load shedding and repair crews",
        data_hash=data_hash(region),
    )
