"""Shakes a region: publishes what each shock breaks, what that costs in work, whom it hurts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from federation.errors import Reason, ScenarioError, TwinError
from federation.snapshot import Snapshots
from federation.twin import (
    HOUR_NS,
    NOTHING,
    SYSTEM,
    Causality,
    Description,
    Entity,
    Fidelity,
    Parameter,
    Step,
    TimePolicy,
    Twin,
    Variable,
    Vector,
)
from twins.disaster import casualties, fragility, ground
from twins.disaster.aftershocks import AftershockLaw
from twins.disaster.damage import (
    DIVERGED_STREAM,
    Damage,
    narrowed,
    strengths,
    whole_range,
    within,
)
from twins.disaster.parameters import PARAMETERS
from twins.disaster.sites import (
    NETWORKS,
    Design,
    Sites,
    correlation_factor,
    design,
    pipe_law,
    read_sites,
)
from twins.regions import assumptions, data_hash

KIND = {"power": "power_component", "water": "water_component", "road": "road"}
STATE_NAMES = ("no", "slight", "moderate", "extensive", "complete")
SEQUENCE_DAYS = 3.0
"""How long after the mainshock aftershocks are sampled: the horizon of a run."""

# one stream of random numbers per purpose (see also damage.py): a change of one leaves the
# others as they are
FIELD_STREAM, AFTERSHOCK_STREAM, SHOCK_STREAM = 11, 12, 14


@dataclass(slots=True)
class Run:
    """All that changes in a run; plain data, so that a snapshot is all of it.

    No generator of random numbers is kept: each shock draws from a stream that its own
    number names, in blocks of fixed size. So what one component draws depends on nothing
    that happens elsewhere.
    """

    seed: int
    parameters: dict[str, float]
    field_index: int
    shocks: list[tuple[int, float]]
    """Instant (ns) and magnitude of the mainshock and its aftershocks."""
    networks: dict[str, Damage]
    hospital_state: NDArray[np.int64]
    reached: NDArray[np.float64]
    """Share of the buildings of each zone and type in at least each state 1..4."""
    injured: NDArray[np.float64]
    peak_pga_g: Vector
    hospital_strength: Vector
    hospital_bounds: Vector
    """The least and the greatest strength that shocks and states so far allow."""
    struck: int = 0
    shock_ids: list[str] = field(default_factory=list)


STATES = Snapshots(Run, Damage)


class DisasterTwin(Twin):
    """An earthquake near a region, with aftershocks.

    In each shock every site gets the median of the chosen field, scaled to the shock's
    magnitude, times a spatially correlated lognormal residual. Components fall into Hazus'
    states of damage by one uniform number each, their strength; mains leak and break in
    Poisson numbers; buildings hurt their occupants at Hazus' rates. Ground failure breaks
    roads and mains only.
    """

    def __init__(self, region: str = "shelby") -> None:
        self.region = region
        self.run: Run | None = None

    def describe(self) -> Description:
        sites = read_sites(self.region)
        names = {"power": "component_id", "water": "component_id"}
        entities = [Entity(SYSTEM, SYSTEM)]
        for kind, rows in sites.rows.items():
            key = names.get(kind, kind)
            entities += [
                Entity(
                    row[key],
                    KIND.get(kind, kind),
                    row.get("name", ""),
                    float(row["lon_deg"]),
                    float(row["lat_deg"]),
                )
                for row in rows
            ]
        variables = []
        for network in NETWORKS:
            kind = KIND[network]
            variables += [
                Variable(
                    f"{network}_intact",
                    kind,
                    "1",
                    Causality.INPUT,
                    1.0,
                    0.0,
                    1.0,
                    "1 when no damage is left: what an aftershock hits",
                ),
                _output(f"{network}_damage_state", kind, "1", 4.0, "0 none to 4 complete"),
                _output(
                    f"{network}_repair_work",
                    kind,
                    "h",
                    np.inf,
                    "crew-hours of repair caused so far, never falling",
                ),
            ]
        variables += [
            _output("hospital_damage_state", "hospital", "1", 4.0, "0 none to 4 complete"),
            *(
                _output(
                    f"injured_severity{s}",
                    "zone",
                    "persons",
                    np.inf,
                    f"people hurt so far, Hazus severity {s}{' (dead at once)' * (s == 4)}",
                )
                for s in range(1, casualties.SEVERITIES + 1)
            ),
            _output("magnitude", SYSTEM, "1", 10.0, "moment magnitude of the last shock"),
            _output("pga", "zone", "1", 3.0, "highest peak ground acceleration so far, g"),
        ]
        given = assumptions(self.region)
        slope = Parameter(
            "aftershock_pga_per_magnitude",
            "1",
            round(sites.motion.pga_per_magnitude, 3),
            0.5,
            1.5,
            "Growth of ln PGA per unit of magnitude at an unchanged distance, by which the field "
            "of the mainshock becomes that of an aftershock.",
            "fitted to the fields of one source and several magnitudes; assumed to hold below",
        )
        return Description(
            model="earthquake",
            version="1.0",
            domain="disaster",
            entities=tuple(entities),
            variables=tuple(variables),
            time=TimePolicy(),
            fidelity=Fidelity.REDUCED,
            parameters=tuple(given.get(p.name, p) for p in (*PARAMETERS, slope)),
            doc=self.__doc__ or "",
            data_hash=data_hash(self.region),
        )

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        sites = read_sites(self.region)
        chosen = int(parameters["field"])
        fields = len(sites.motion.names)
        if not -1 <= chosen < fields:
            raise ScenarioError(
                Reason.SCENARIO_INVALID,
                f"field {chosen} is not one of 0..{fields - 1}, nor -1 to sample one",
                {"parameter": "field"},
            )
        if chosen < 0:
            chosen = sites.motion.choose_field(
                float(np.random.default_rng([seed, FIELD_STREAM]).random())
            )
        magnitude = float(sites.motion.magnitudes[chosen])
        first_ns = round(parameters["shock_h"] * HOUR_NS)
        shocks = [(first_ns, magnitude), *_aftershocks(seed, parameters, first_ns, magnitude)]
        zones = sites.size("zone")
        self.run = Run(
            seed,
            dict(parameters),
            chosen,
            shocks,
            {n: Damage.none(seed, n, sites.size(n)) for n in NETWORKS},
            np.zeros(sites.size("hospital"), dtype=np.int64),
            np.zeros((zones, len(sites.stock.buildings), fragility.STATES)),
            np.zeros((zones, casualties.SEVERITIES)),
            np.zeros(zones),
            strengths(seed, "hospital", 0, sites.size("hospital")),
            whole_range(sites.size("hospital")),
        )

    def advance(self, step: Step) -> None:
        run = self._opened()
        while run.struck < len(run.shocks):
            at_ns, magnitude = run.shocks[run.struck]
            if at_ns > step.time_ns:
                step.wake_at(at_ns)
                return
            self._strike(step, run, magnitude)
            run.struck += 1

    def snapshot(self) -> bytes:
        return STATES.pack(self._opened())

    def restore(self, state: bytes) -> None:
        self.run = STATES.unpack(state)

    def diverge(
        self,
        time_ns: int,
        seed: int,
        parameters: Mapping[str, float],
        believed: Mapping[str, Vector] = NOTHING,
    ) -> int | None:
        """Shocks that have struck stay, with what they broke and the field that they had.

        Aftershocks are a Poisson process: those from `time_ns` on do not depend on those before,
        given the mainshock. A strength is drawn anew between the bounds that what stood and what
        fell so far put to it.
        """
        if believed:
            raise TwinError(
                Reason.UNKNOWN_VARIABLE, "what an earthquake has done is no matter of belief"
            )
        run = self._opened()
        if (run.seed, run.parameters) != (seed, dict(parameters)):
            if run.struck == 0:
                self.open(seed, parameters)
                run = self._opened()
                run.shocks = [(max(at_ns, time_ns), size) for at_ns, size in run.shocks]
            else:
                main_ns, magnitude = run.shocks[0]
                ahead = _aftershocks(seed, parameters, main_ns, magnitude)
                run.shocks = run.shocks[: run.struck] + [s for s in ahead if s[0] >= time_ns]
                run.seed, run.parameters = seed, dict(parameters)
                for damage in run.networks.values():
                    damage.diverge(seed)
                draws = np.random.default_rng([seed, DIVERGED_STREAM, len(NETWORKS)])
                run.hospital_strength = within(
                    run.hospital_bounds, draws.random(len(run.hospital_strength))
                )
        return run.shocks[run.struck][0] if run.struck < len(run.shocks) else None

    def _opened(self) -> Run:
        if self.run is None:
            raise RuntimeError("the twin has not been opened")
        return self.run

    def _strike(self, step: Step, run: Run, magnitude: float) -> None:
        """One shock: draw, shake, damage, hurt; publish what changed."""
        sites = read_sites(self.region)
        given = run.parameters
        within, between = given["within_event_sigma"], given["between_event_sigma"]
        curves = design(self.region, given)
        draws = np.random.default_rng([run.seed, SHOCK_STREAM, run.struck])
        events = draws.standard_normal(2)
        normals = draws.standard_normal((2, len(sites.places)))
        main_luck = draws.random((2, len(sites.mains)))
        person_luck = draws.random((sites.size("zone"), casualties.SEVERITIES))

        residual_pga, residual_pgv = ground.residuals(
            correlation_factor(self.region, given["correlation_range_km"]),
            normals,
            events,
            within,
            between,
        )
        shaking = sites.motion.shake(
            run.field_index,
            magnitude,
            given["ground_motion_factor"],
            residual_pga[sites.place],
            residual_pgv[sites.place],
            given["aftershock_pga_per_magnitude"],
            given["groundwater_depth_ft"],
            given["liquefaction_factor"],
        )
        shock = self._announce(step, run, sites, shaking)
        for network in NETWORKS:
            self._network(step, run, sites, curves, network, shaking, main_luck, shock)
        self._hospitals(step, run, sites, curves, shaking, shock)
        self._people(step, run, sites, curves, shaking, person_luck, shock)

    def _announce(self, step: Step, run: Run, sites: Sites, shaking: ground.Shaking) -> str:
        pga = shaking.pga_g[sites.part["zone"]]
        main = run.struck == 0
        shock = step.emit(
            "mainshock" if main else "aftershock",
            SYSTEM,
            f"magnitude {shaking.magnitude:.1f}, peak acceleration {pga.min():.2f} to "
            f"{pga.max():.2f} g in the zones"
            + (f" (field {sites.motion.names[run.field_index]})" if main else ""),
            () if main else run.shock_ids[:1],
        )
        run.shock_ids.append(shock)
        step.publish("magnitude", [shaking.magnitude], {0: shock})
        stronger = np.flatnonzero(pga > run.peak_pga_g)
        if stronger.size:
            run.peak_pga_g = np.maximum(run.peak_pga_g, pga)
            step.publish("pga", run.peak_pga_g, {int(i): shock for i in stronger})
        return shock

    def _component_states(
        self,
        run: Run,
        sites: Sites,
        curves: Design,
        network: str,
        shaking: ground.Shaking,
        main_luck: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], Vector]:
        """The state that a shock alone would leave each component in, and its crew-hours."""
        given = run.parameters
        damage = run.networks[network]
        part = sites.part[network]
        if network == "road":
            # the curve holds where the ground fails, and it fails in a share of places
            reached = curves.components[network].reached(shaking.pgd_in[part])
            reached = reached * shaking.liquefied[part, None]
        else:
            reached = curves.components[network].reached(shaking.pga_g[part])
        state = fragility.states(reached, damage.strength)
        damage.bounds = narrowed(damage.bounds, reached, state)
        days = curves.repairs[network].days(state, damage.patience)
        work_h = np.minimum(days, given["repair_days_cap"]) * given["repair_hours_per_day"]
        if network == "water":
            here = part.start + sites.mains
            leak_rate, break_rate = pipe_law(given, curves.ductile_mains).leaks_and_breaks_per_km(
                shaking.pgv_cm_s[here], shaking.pgd_in[here], shaking.liquefied[here]
            )
            leaks = fragility.poisson_counts(leak_rate * sites.main_km, main_luck[0])
            breaks = fragility.poisson_counts(break_rate * sites.main_km, main_luck[1])
            # mains have no curve: their repairs are counted
            state[sites.mains] = fragility.main_states(leaks, breaks)
            work_h[sites.mains] = np.where(
                breaks > 0, (leaks + breaks) * given["main_repair_hours"], 0.0
            )
        return state, work_h

    def _network(
        self,
        step: Step,
        run: Run,
        sites: Sites,
        curves: Design,
        network: str,
        shaking: ground.Shaking,
        main_luck: NDArray[np.float64],
        shock: str,
    ) -> None:
        """Add a shock's damage to one network, with an event for all that fails or worsens."""
        damage = run.networks[network]
        intact_variable = f"{network}_intact"
        repaired = damage.repaired(step[intact_variable], step.time_ns)
        if repaired.any():
            damage.rebuild(repaired)
        state, work_h = self._component_states(run, sites, curves, network, shaking, main_luck)
        worse, more = damage.strike(state, work_h, step.time_ns)
        if not worse.size and not repaired.any():
            return
        rows = sites.rows[network]
        explained: dict[int, str] = {}
        for i in np.flatnonzero(repaired).tolist():
            explained[i] = next(iter(step.cause(intact_variable, i)), shock)
        failed: dict[int, str] = {}
        for i in worse.tolist():
            explained[i] = shock
            if damage.state[i] >= fragility.OUT_OF_SERVICE:
                row = rows[i]
                site = sites.part[network].start + i
                name = row["road" if network == "road" else "component_id"]
                explained[i] = failed[i] = step.emit(
                    "component_damaged",
                    name,
                    f"{row.get('component_class', 'road')} {name}: "
                    f"{STATE_NAMES[damage.state[i]]} damage at {shaking.pga_g[site]:.2f} g, "
                    f"{damage.present_h[i]:.0f} crew-hours to repair",
                    (shock,),
                )
        step.publish(f"{network}_damage_state", damage.state, explained)
        if more.size:
            step.publish(
                f"{network}_repair_work", damage.caused_h, {i: failed[i] for i in more.tolist()}
            )

    def _hospitals(
        self,
        step: Step,
        run: Run,
        sites: Sites,
        curves: Design,
        shaking: ground.Shaking,
        shock: str,
    ) -> None:
        pga = shaking.pga_g[sites.part["hospital"]]
        reached = curves.hospitals.reached(pga)
        state = fragility.states(reached, run.hospital_strength)
        run.hospital_bounds = narrowed(run.hospital_bounds, reached, state)
        worse = np.flatnonzero(state > run.hospital_state).tolist()
        if not worse:
            return
        run.hospital_state = np.maximum(run.hospital_state, state)
        causes = {}
        for i in worse:
            row = sites.rows["hospital"][i]
            causes[i] = step.emit(
                "hospital_damaged",
                row["hospital"],
                f"{row['name']}: {STATE_NAMES[state[i]]} damage at {pga[i]:.2f} g",
                (shock,),
            )
        step.publish("hospital_damage_state", run.hospital_state, causes)

    def _people(
        self,
        step: Step,
        run: Run,
        sites: Sites,
        curves: Design,
        shaking: ground.Shaking,
        luck: NDArray[np.float64],
        shock: str,
    ) -> None:
        pga = shaking.pga_g[sites.part["zone"]]
        types = len(sites.stock.buildings)
        reached = curves.buildings.reached(np.repeat(pga[:, None], types, axis=1))
        now = np.maximum(run.reached, reached)
        newly = casualties.newly_damaged(run.reached, now)
        run.reached = now
        if not newly.any():
            return
        given = run.parameters
        period = _period((given["start_hour"] + step.time_ns / HOUR_NS) % 24)
        indoors = given[f"indoor_share_{period}"]
        home_share = min(given[f"occupancy_residential_{period}"] / indoors, 1.0)
        unhurt = np.maximum(np.floor(sites.population * indoors) - run.injured.sum(axis=1), 0.0)
        hurt = casualties.sample_injured(
            unhurt, casualties.injury_chances(sites.stock, newly, home_share), luck
        )
        run.injured = run.injured + hurt
        grave = hurt[:, 2] + hurt[:, 3]
        causes: dict[int, str] = {}
        for i in np.flatnonzero(hurt.sum(axis=1)).tolist():
            causes[i] = shock
            if grave[i] > 0:
                causes[i] = step.emit(
                    "casualties",
                    sites.rows["zone"][i]["zone"],
                    f"{hurt[i].sum():.0f} people hurt at {pga[i]:.2f} g, of whom "
                    f"{hurt[i, 3]:.0f} dead at once and {hurt[i, 2]:.0f} in danger of life",
                    (shock,),
                )
        for severity in range(casualties.SEVERITIES):
            hit = np.flatnonzero(hurt[:, severity]).tolist()
            if hit:
                step.publish(
                    f"injured_severity{severity + 1}",
                    run.injured[:, severity],
                    {i: causes[i] for i in hit},
                )


def _aftershocks(
    seed: int, parameters: Mapping[str, float], first_ns: int, magnitude: float
) -> list[tuple[int, float]]:
    """Instants and magnitudes of what follows a mainshock."""
    if parameters["aftershocks"] < 0.5:
        return []
    law = AftershockLaw(
        parameters["aftershock_a"],
        parameters["aftershock_b"],
        parameters["aftershock_c_day"],
        parameters["aftershock_p"],
        parameters["aftershock_magnitude_min"],
    )
    draws = np.random.default_rng([seed, AFTERSHOCK_STREAM])
    return [
        (first_ns + max(1, round(days * 24 * HOUR_NS)), float(size))
        for days, size in zip(*law.sample(draws, magnitude, SEQUENCE_DAYS), strict=True)
    ]


def _output(name: str, kind: str, unit: str, high: float, doc: str) -> Variable:
    return Variable(name, kind, unit, Causality.OUTPUT, 0.0, 0.0, high, doc)


def _period(hour: float) -> str:
    """Hazus' time of day: night, day or commute."""
    if 9 <= hour < 16:
        return "day"
    return "commute" if 6 <= hour < 20 else "night"
