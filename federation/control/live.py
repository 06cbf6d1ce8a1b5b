"""The closed loop over a live federation: a client of its broker and of its twins.

At each decision instant of the run it looks at a consistent cut, tries the measures of the
scenario in futures forked from it, and has the guard judge what the best one would do at once. At
level 3 that is advice, at level 4 a proposal for persons, at level 5 it acts. Then it holds what
came of it against what it had predicted, and how far it may go by itself follows from that.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from federation.control import actuation, audit
from federation.control.actuation import Ended, FileJournal, Stage, Task
from federation.control.autonomy import (
    Breached,
    Compared,
    Ladder,
    Moved,
    Scored,
    Set,
    Solved,
    Unusable,
)
from federation.control.autonomy import Event as LadderEvent
from federation.control.autonomy import Key as Grantee
from federation.control.guard import Guard
from federation.control.loop import IN_FORCE, Comparison, Decision, Loop, Rating
from federation.control.monitor import Monitor
from federation.control.proposal import (
    Alternative,
    Answer,
    Docket,
    Effect,
    Proposal,
    State,
    Told,
    affected_domains,
    reversal_of,
)
from federation.control.rules import Rules, load
from federation.control.situation import (
    Forecast,
    Mode,
    Place,
    Series,
    Situation,
    Submission,
    Verdict,
)
from federation.control.trials import Trial, Trials
from federation.control.view import Desks, LiveView, Observation, Variable
from federation.core.bundle import Bundle, Condition, Priority, Setpoint
from federation.errors import FederationError, Reason, ScenarioError
from federation.twin import HOUR_NS, MINUTE_NS, NOTHING, Planner, Vector
from federation.wire.credentials import Identity, Keyring, Role

_T = TypeVar("_T")

WATCH_S = 0.2
"""How often at most the guard looks at what is observed between decisions; wall time."""


@dataclass(frozen=True)
class Terms:
    """How a loop is run.

    It goes no further than `level`. It decides every `every_ns` of the run, looks `ahead_ns` ahead
    in so many `futures`, and has `within_s` of wall time for it. `measures` are what it tries
    besides what is in force; empty for all of the scenario that can be changed to. A value that an
    action needs may move by the share `moves_by` of itself before the action is void. `operator`
    is who is on duty. What it knows is kept in the folder `state`.
    """

    level: int
    rules: Path
    state: Path
    operator: str
    every_ns: int = HOUR_NS
    ahead_ns: int = 24 * HOUR_NS
    futures: int = 2
    within_s: float = 60.0
    measures: tuple[str, ...] = ()
    moves_by: float = 0.25
    window_ns: int = 30 * MINUTE_NS
    stage_within_s: float = actuation.STAGE_WITHIN_S


@dataclass(frozen=True)
class Keys:
    """Who the loop is: a guard that may act, an optimiser that may not, and whom it believes."""

    guard: Identity
    optimiser: Identity
    keyring: Keyring


@dataclass(frozen=True)
class Candidate:
    """A measure that was tried, and what it would have set at once."""

    name: str
    trials: tuple[Trial, ...]
    setpoints: tuple[Setpoint, ...]


@dataclass(frozen=True)
class Known:
    """What is known at a decision."""

    cut: Observation
    desks: Desks
    until_ns: int


@dataclass
class Made:
    """A decision on its way: what it would set, what was said of it, and what came of it."""

    id: str
    known: Known
    bundle: Bundle | None = None
    verdict: Verdict | None = None
    outcome: str = ""
    """`advised`, `proposed`, `committed`, `compensated`, `recovery`, `nothing`, ..."""
    chosen: str = IN_FORCE
    candidates: Mapping[str, Candidate] = field(default_factory=dict)
    ratings: tuple[Rating, ...] = ()
    is_shadow: bool = False
    """Nobody followed it, and it waits to be scored."""


@dataclass(frozen=True)
class LiveCut:
    """A cut of a live run (see `federation.twin.Cut`)."""

    observation: Observation
    view: LiveView

    @property
    def time_ns(self) -> int:
        return self.observation.time_ns

    @property
    def horizon_ns(self) -> int:
        return self.view.scenario.horizon_ns

    @property
    def digest(self) -> str:
        return self.observation.digest()

    @property
    def weights(self) -> Mapping[str, float]:
        return self.view.scenario.weighted

    @property
    def versions(self) -> Mapping[str, str]:
        return {n: f"{d.model} {d.version}" for n, d in self.view.descriptions.items()}

    def seen(self, member: str, output: str) -> Vector:
        return self.observation.readings[member, output].values

    def future(
        self,
        number: int,
        planner: Planner,
        until_ns: int,
        believed: Mapping[str, Mapping[str, Vector]] = NOTHING,
    ) -> Any:
        raise ScenarioError(
            Reason.UNSUPPORTED, "futures of a live run go on under a measure of its scenario"
        )


class LiveLoop:
    """One loop over one run, for as long as the context lasts.

    Fails as `LiveView` does, with RULES_INVALID, TRAIL_BROKEN, TRAIL_IN_USE, and SCENARIO_INVALID
    when there is nothing that it could try or weigh.
    """

    def __init__(
        self,
        broker: str,
        run: str,
        terms: Terms,
        keys: Keys,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.terms = terms
        self.keys = keys
        self.unix_s = unix_s
        self.view = LiveView(broker, run, keys.guard)
        self.rules: Rules = load(terms.rules)
        self.ladder = Ladder(self.rules)
        self.docket = Docket(self.rules.persons, self._is_said_by, self.rules.version)
        self.guard: Guard
        self.decisions: list[Made] = []
        self.trail: audit.Trail
        self.turn_s: list[float] = []
        """How long each decision took, wall time."""
        self._journal: FileJournal
        self._asked: set[str] = set()
        self._turn = asyncio.Lock()
        """Of what may act at a time there is one."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        terms = self.terms
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.view)
            scenario = self.view.scenario
            if not scenario.weighted:
                raise ScenarioError(
                    Reason.SCENARIO_INVALID,
                    "the scenario does not weigh its figures (`weighted`): nothing says what is "
                    "better",
                )
            self.measures = terms.measures or tuple(
                name
                for name, measure in scenario.measures.items()
                if name != self.view.measure and measure.crews != "level5"
            )
            self.weights: dict[Variable, float] = {
                _split(name): weight for name, weight in scenario.weighted.items()
            }
            nevers = [_split(never.variable) for never in self.rules.never]
            self.trials = Trials(self.view, self.weights, nevers)
            self.guard = Guard(
                self.rules, self.view.descriptions, self._is_proposed_by, self.keys.guard.name
            )
            self.monitor = Monitor(self.rules, self.view.descriptions)
            terms.state.mkdir(parents=True, exist_ok=True)
            self._restore()
            self.trail = stack.enter_context(
                audit.Trail(terms.state / "trail", self.keys.guard.attest)
            )
            self._journal = FileJournal(terms.state / "intents.jsonl")
            stack.callback(self._journal.close)
            for bundle, ended in await actuation.take_up(
                self._journal, self.keys.guard, within_s=terms.stage_within_s
            ):
                self._acted(bundle, ended, "ended after a restart")
            self.loop: Loop[Known, Candidate] = Loop(
                _Stages(self, asyncio.get_running_loop()), scenario.seed, time.perf_counter
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def go(self) -> None:
        """Decide until the run ends."""
        watching = asyncio.create_task(self._watch())
        try:
            while (cut := await self.view.cut(self.terms.every_ns)) is not None:
                await self.decide(cut)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def decide(self, cut: Observation) -> Decision | None:
        """One turn of the loop. What goes wrong in it is on record, and the loop goes on."""
        async with self._turn:
            self._reload_rules()
            began_s = time.perf_counter()
            await self.view.look_at_clocks({_split(name)[0] for name in self.rules.values})
            cut = self.view.timed(cut)
            decision: Decision | None = None
            why = ""
            turning = asyncio.ensure_future(
                asyncio.to_thread(self.loop.turn, LiveCut(cut, self.view))
            )
            try:
                async with asyncio.timeout(self.terms.within_s):
                    decision = await asyncio.shield(turning)
            except TimeoutError:
                why = f"no decision within {self.terms.within_s:g} s"
                self._stages.give_up()
                await asyncio.gather(turning, return_exceptions=True)
            except asyncio.CancelledError:
                self._stages.give_up(even_acts=True)
                await asyncio.gather(turning, return_exceptions=True)
                raise
            except FederationError as error:
                why = str(error)
            for key in self._keys():
                self._climb(Solved(key, in_time=not why))
            if why:
                await self._be_silent(cut, why)
            self.turn_s.append(time.perf_counter() - began_s)
            self._save()
            return decision

    @property
    def _stages(self) -> _Stages:
        found = self.loop.stages
        assert isinstance(found, _Stages)
        return found

    # -- observe, compare --------------------------------------------------------------------

    async def observe(self, cut: Observation) -> Known:
        desks = await self.view.desks()
        horizon_ns = self.view.scenario.horizon_ns
        return Known(cut, desks, min(cut.time_ns + self.terms.ahead_ns, horizon_ns))

    def weighted(self, cut: Observation) -> float:
        """The weighted figure as it stands; what was never told counts as nothing."""
        return sum(w * (cut.value(*variable) or 0.0) for variable, w in self.weights.items())

    async def compare(self, known: Known) -> None:
        """See whether what is known can be acted on, and hold the last decision to what came of
        it."""
        last = self.decisions[-1] if self.decisions else None
        situation = self.view.situation(known.cut, known.desks)
        for key in self._keys():
            for variable in self._needs(key):
                if self.monitor.value(situation, variable)[0] is None:
                    self._climb(Unusable(key, variable))
        if last is None or not last.ratings:
            return
        then, now_ns = last.known.cut, known.cut.time_ns
        grew = self.weighted(known.cut) - self.weighted(then)
        was_done = last.chosen if last.outcome in ("committed", "nothing") else IN_FORCE
        foreseen = [t.growth(self.weights, now_ns) for t in last.candidates[was_done].trials]
        predicted = float(np.mean(foreseen))
        spread = float(np.std(foreseen, ddof=1)) if len(foreseen) > 1 else 0.0
        sd = max(spread, 0.05 * abs(predicted), 1e-9)
        self._note(audit.Observed(last.id, now_ns, {"weighted": predicted}, {"weighted": grew}))
        for key in self._keys():
            self._climb(Compared(key, predicted, grew, sd))

    async def score(self, now_ns: int) -> None:
        """Score the decisions that nobody followed and whose time has passed: what they would have
        cost, in forks of what has been, beside what was done instead."""
        due = [made for made in self.decisions if made.is_shadow and made.known.until_ns <= now_ns]
        for made in due:
            made.is_shadow = False
            assert made.bundle is not None
            keys = [
                k for k in self.ladder.keys(made.bundle, self.terms.operator) if k in self._keys()
            ]
            if not any(self.ladder.standings[key].earned < 5 for key in keys):
                continue
            then, until_ns = made.known.cut, made.known.until_ns
            others = [r.name for r in made.ratings if r.name not in (IN_FORCE, made.chosen)]
            lived, *trials = await asyncio.gather(
                self.trials.lived(then, until_ns),
                *(self.trials.run(then, n, None, until_ns) for n in (made.chosen, *others[:1])),
            )
            cost, *rest = (t.growth(self.weights, until_ns) for t in trials)
            alternative = rest[0] if rest else None
            grew = lived.growth(self.weights, until_ns)
            is_good = made.verdict is not None and made.verdict.good
            for key in keys:
                self._climb(Scored(key, made.id, cost, grew, alternative, is_good))

    # -- forecast, plan, verify ----------------------------------------------------------------

    async def try_all(self, known: Known) -> dict[str, Candidate]:
        """Every measure and what is in force, in the same futures. A measure that can't be tried
        is left out; what is in force must be."""
        names = {IN_FORCE: self.view.measure, **{name: name for name in self.measures}}
        work = {
            name: asyncio.ensure_future(self._try(known, name, measure))
            for name, measure in names.items()
        }
        try:
            await asyncio.wait(work.values())
        finally:
            for task in work.values():
                task.cancel()
            await asyncio.gather(*work.values(), return_exceptions=True)
        found: dict[str, Candidate] = {}
        for name, task in work.items():
            error = task.exception()
            if error is None:
                found[name] = task.result()
            elif name == IN_FORCE or not isinstance(error, FederationError):
                raise error
            else:
                self._note(audit.Noted("not tried", {"measure": name, "why": str(error)}))
        return found

    async def _try(self, known: Known, name: str, measure: str) -> Candidate:
        trials = await asyncio.gather(
            *(
                self.trials.run(known.cut, measure, number, known.until_ns)
                for number in range(self.terms.futures)
            )
        )
        actions = () if name == IN_FORCE else trials[0].first(self.terms.every_ns)
        setpoints = tuple(
            Setpoint(a.member, a.actuator, a.entity, a.value, self._lease_ns(a.member, a.actuator))
            for a in actions
        )
        return Candidate(name, tuple(trials), setpoints)

    def rated(self, candidate: Candidate, known: Known) -> Rating:
        growth = [trial.growth(self.weights, known.until_ns) for trial in candidate.trials]
        figures = {
            ".".join(variable): float(
                np.mean([t.growth({variable: 1.0}, known.until_ns) for t in candidate.trials])
            )
            for variable in self.weights
        }
        return Rating(candidate.name, tuple(growth), figures)

    # -- what it would set ---------------------------------------------------------------------

    def bundle_of(self, made: Made, candidate: Candidate, basis: audit.Basis) -> Bundle | None:
        """What a candidate sets that is not so already, with what is held and would lapse."""
        known = made.known
        author = self.keys.optimiser.name
        wanted: dict[Place, Setpoint] = {}
        soon_ns = known.cut.time_ns + 2 * self.terms.every_ns
        for place, held in known.desks.holdings.items():
            is_mine = held.owner == author and held.priority is Priority.AUTONOMOUS
            if is_mine and held.until_ns < soon_ns:
                wanted[place] = Setpoint(*place, held.value, self._lease_ns(*place[:2]))
        for setpoint in candidate.setpoints:
            place = (setpoint.member, setpoint.actuator, setpoint.entity)
            there = known.desks.holdings.get(place)
            if there is None or there.value != setpoint.value or place in wanted:
                wanted[place] = setpoint
        if not wanted:
            return None
        setpoints = tuple(wanted[place] for place in sorted(wanted))
        return Bundle(
            id=f"{made.id}/{candidate.name}".replace(" ", "-"),
            run=self.view.run,
            setpoints=setpoints,
            priority=Priority.AUTONOMOUS,
            cut_ns=known.cut.time_ns,
            expires_ns=known.cut.time_ns + round(self.rules.life_min * MINUTE_NS),
            author=author,
            basis=basis.digest(),
            conditions=self._conditions(setpoints, known.cut),
        )

    def _conditions(self, setpoints: Sequence[Setpoint], cut: Observation) -> tuple[Condition, ...]:
        """What the setpoints need is still about as it was seen."""
        needed = {
            variable
            for s in setpoints
            if (rule := self.rules.actuators.get(f"{s.member}.{s.actuator}")) is not None
            for variable in rule.needs
        }
        found = []
        for name in sorted(needed):
            member, output = _split(name)
            reading = cut.readings.get((member, output))
            if reading is None:
                continue
            description = self.view.descriptions[member]
            known = next(v for v in description.outputs() if v.name == output)
            for entity, value in zip(
                description.ids(known.kind), reading.values.tolist(), strict=True
            ):
                band = self.terms.moves_by * max(abs(value), 1e-6)
                found.append(Condition(member, output, entity, value - band, value + band))
        return tuple(found)

    def _lease_ns(self, member: str, actuator: str) -> int:
        declared = next(
            a.lease_ns for a in self.view.descriptions[member].actuators if a.name == actuator
        )
        rule = self.rules.actuators.get(f"{member}.{actuator}")
        if rule is None:
            return declared
        allowed_ns = round(rule.lease_min * MINUTE_NS)
        return min(declared, allowed_ns) if declared else allowed_ns

    def forecast_of(self, bundle: Bundle, candidate: Candidate) -> Forecast:
        """What the forks expect of the outputs that must never be wrong for long: at each instant
        the worst of all futures."""
        found: dict[tuple[str, str], Series] = {}
        for never in self.rules.never:
            variable = _split(never.variable)
            all_series = [trial.series(variable) for trial in candidate.trials]
            times = sorted({t for series in all_series for t in series.times_ns})
            rows = np.array([[_at(series, t) for t in times] for series in all_series])
            low, high = rows.min(axis=0), rows.max(axis=0)
            worst = np.where(never.low - low > high - never.high, low, high)
            found[variable] = Series(tuple(times), worst)
        return Forecast(bundle.digest(), found)

    # -- guard, act ----------------------------------------------------------------------------

    def level_of(self, bundle: Bundle) -> int:
        """How far this may go by itself, now."""
        return min(self.terms.level, self.ladder.level_of(bundle, self.terms.operator))

    async def judge(self, bundle: Bundle, candidate: Candidate) -> Verdict:
        """What the guard says of a bundle as things stand now; below level 5 it only looks."""
        submission = self._submitted(bundle)
        situation = self.view.situation(self.view.now(), await self.view.desks())
        forecast = self.forecast_of(bundle, candidate)
        if self.level_of(bundle) < 5:
            return self._looked_at(submission, situation, forecast)
        return self.guard.judge(submission, situation, forecast)

    def _looked_at(
        self, submission: Submission, situation: Situation, forecast: Forecast
    ) -> Verdict:
        """What the guard would say, who then knows nothing of it."""
        guard = Guard(
            self.rules, self.view.descriptions, self._is_proposed_by, self.keys.guard.name
        )
        guard.restore(self.guard.snapshot())
        return guard.judge(submission, situation, forecast)

    async def act(self, made: Made, candidate: Candidate, why: str) -> str:
        """Do what the level allows with what was decided, after it is on record."""
        bundle, verdict = made.bundle, made.verdict
        self._note(self._decided(made, candidate, why))
        if verdict is not None:
            self._judged(made.id, verdict)
        if bundle is None:
            made.outcome = "nothing"
            return ""
        level = self.level_of(bundle)
        if verdict is not None and not verdict.passed:
            made.outcome = "refused"
            if level == 5:
                made.outcome = "recovery"
                await self._fall_back(made.id, verdict)
        elif level == 5:
            made.outcome = await self._carry_out(made.id, bundle)
        elif level == 4:
            made.outcome = self._propose(made, candidate)
        else:
            made.outcome = "advised"
        made.is_shadow = made.outcome != "committed" and made.chosen != IN_FORCE
        return bundle.digest()

    async def _carry_out(self, decision: str, bundle: Bundle) -> str:
        """Bring a bundle that passed into force; how it ended."""
        desks = await self.view.desks()
        members = {*bundle.members(), *(c.member for c in bundle.conditions)}
        missing = sorted(members - desks.seats.keys())
        if missing:
            self.guard.settle(bundle.id, None)
            why = desks.silent.get(missing[0], f"{missing[0]} has no desk")
            now_ns = self.view.settled_ns
            self._note(audit.Acted(decision, "compensated", now_ns, why))
            return "compensated"
        task = Task(bundle, desks.seats, self.terms.window_ns)
        ended = await actuation.carry_out(
            task, self.keys.guard, self._journal, within_s=self.terms.stage_within_s
        )
        self._acted(bundle, ended, "", decision)
        return ended.stage.value

    def _acted(self, bundle: Bundle, ended: Ended, detail: str, decision: str = "") -> None:
        in_force = ended.stage is Stage.COMMITTED
        now_ns = self.view.settled_ns
        self.guard.settle(bundle.id, now_ns if in_force else None)
        told = "; ".join(part for part in (detail, ended.why, *ended.unreached) if part)
        self._note(audit.Acted(decision or bundle.id, ended.stage.value, now_ns, told))

    async def _fall_back(self, decision: str, verdict: Verdict) -> None:
        """Put the recovery plan in the place of the loop."""
        for key in self._keys():
            for refusal in verdict.refusals:
                self._climb(Breached(key, refusal.rule))
        if verdict.fallback is None:
            return
        # what the loop holds passes to its recovery plan, and back
        await self._carry_out(decision, replace(verdict.fallback, author=self.keys.optimiser.name))

    async def _be_silent(self, cut: Observation, why: str) -> None:
        """No decision came; the guard says what stands meanwhile."""
        self._note(audit.Noted("no decision", {"why": why, "time_ns": cut.time_ns}))
        if not self._may_act():
            return
        situation = self.view.situation(self.view.now(), await self.view.desks())
        verdict = self.guard.silence(situation, why)
        self._judged(f"silence-{cut.time_ns}", verdict)
        if verdict.fallback is not None:
            await self._fall_back(f"silence-{cut.time_ns}", verdict)

    async def _watch(self) -> None:
        """Between decisions: switch to the recovery plan when something is wrong for too long, and
        act on what persons have confirmed."""
        while not self.view.has_ended:
            await self.view.changed()
            async with self._turn:
                self.pass_time()
                if self._may_act():
                    situation = self.view.situation(self.view.now(), await self.view.desks())
                    was = self.guard.mode
                    verdict = self.guard.watch(situation)
                    if verdict is not None and was is Mode.LOOP:
                        id_ = f"watch-{situation.time_ns}"
                        self._note(audit.Noted("switched", {"to": "recovery"}, id_))
                        self._judged(id_, verdict)
                        await self._fall_back(id_, verdict)
                        self._save()
            await asyncio.sleep(WATCH_S)

    def _may_act(self) -> bool:
        return self.terms.level == 5 and any(self.ladder.level(key) == 5 for key in self._keys())

    # -- persons -------------------------------------------------------------------------------

    def _propose(self, made: Made, candidate: Candidate) -> str:
        bundle = made.bundle
        assert bundle is not None
        fed: dict[str, tuple[str, ...]] = {}
        for coupling in self.view.scenario.couplings:
            source, target = _split(coupling.source)[0], _split(coupling.target)[0]
            fed[source] = (*fed.get(source, ()), target)
        domains = affected_domains(bundle, self.view.descriptions, fed)
        effects: dict[str, tuple[Effect, ...]] = dict.fromkeys(domains, ())
        idle = made.candidates[IN_FORCE].trials
        for variable in self.weights:
            member, output = variable
            description = self.view.descriptions[member]
            unit = next(v.unit for v in description.outputs() if v.name == output)
            ends = [trial.at(variable, made.known.until_ns) for trial in candidate.trials]
            low, high = np.quantile(ends, [0.05, 0.95])
            without = float(np.mean([t.at(variable, made.known.until_ns) for t in idle]))
            effect = Effect(
                ".".join(variable), unit, without, float(low), float(np.mean(ends)), float(high)
            )
            if description.domain in effects:
                effects[description.domain] = (*effects[description.domain], effect)
        autonomy = self.rules.autonomy
        assert autonomy is not None
        made_s = self.unix_s()
        proposal = Proposal(
            id=made.id,
            operator=self.terms.operator,
            bundle=bundle,
            rules_version=self.rules.version,
            effects=effects,
            alternatives=self._alternatives(made),
            limits=self._limits(made),
            reversal=reversal_of(bundle, self.view.descriptions),
            made_unix_s=made_s,
            expires_unix_s=made_s + 60.0 * autonomy.proposal_min,
        )
        told = self.docket.propose(proposal)
        self._told((told,))
        return "proposed" if told.state is State.OPEN else "void"

    def _alternatives(self, made: Made) -> tuple[Alternative, ...]:
        mine = next(r for r in made.ratings if r.name == made.chosen)
        return tuple(
            Alternative(r.name, r.mean - mine.mean) for r in made.ratings if r.name != made.chosen
        )

    async def answer(self, answer: Answer) -> Told:
        """Take a person's yes or no. What is confirmed by all acts before this returns."""
        async with self._turn:
            told = self.docket.answer(answer, self.unix_s())
            self._told((told,))
            if told.counts and told.state is State.CONFIRMED:
                await self._act_on(answer.proposal)
                self._save()
                return replace(
                    told,
                    state=self.docket.states[answer.proposal],
                    sentence=self.outcome(answer.proposal),
                )
            self._save()
            return told

    async def _act_on(self, proposal: str) -> None:
        """Act on what persons have confirmed, if it is still what they confirmed."""
        now = self.view.now()
        situation = self.view.situation(now, await self.view.desks())

        def value_of(member: str, variable: str, entity: str) -> float | None:
            return self.monitor.entity(situation, f"{member}.{variable}", entity)[0]

        made = next((m for m in self.decisions if m.id == proposal), None)
        bundle, told = self.docket.take(proposal, value_of, self.unix_s(), now.time_ns)
        self._told((told,))
        if bundle is None or made is None:
            return
        submission = self._submitted(bundle)
        forecast = self.forecast_of(bundle, made.candidates[made.chosen])
        # a person stands by: the switch to the recovery plan is for a loop that acts alone
        verdict = self._looked_at(submission, situation, forecast)
        if verdict.passed:
            verdict = self.guard.judge(submission, situation, forecast)
        self._judged(proposal, verdict)
        made.outcome = await self._carry_out(proposal, bundle) if verdict.passed else "refused"
        made.is_shadow = made.outcome != "committed"

    def _submitted(self, bundle: Bundle) -> Submission:
        """A bundle as the optimiser proposes it."""
        unsigned = Submission(bundle, self.rules.version)
        return replace(unsigned, signature=self.keys.optimiser.attest(unsigned.message()))

    def outcome(self, decision: str) -> str:
        """What became of a decision, in a word; empty when it is not known."""
        made = next((m for m in self.decisions if m.id == decision), None)
        return "" if made is None else made.outcome

    def pass_time(self) -> None:
        """Refuse what nobody has confirmed in time."""
        self._told(self.docket.pass_time(self.unix_s()))

    def set_level(self, key: Grantee, level: int, person: str) -> Moved:
        """A person sets a level; see `Ladder`. Who may do so is for the caller to have checked."""
        (moved,) = self.ladder.handle(Set(key, level, person))
        self._note(audit.Noted("level", _moved(moved)))
        self._save()
        return moved

    def _is_proposed_by(self, author: str, message: bytes, signature: bytes) -> bool:
        return self.keys.keyring.proves(author, Role.OPTIMISER, message, signature)

    def _is_said_by(self, person: str, message: bytes, signature: bytes) -> bool:
        return self.keys.keyring.proves(person, Role.OPERATOR, message, signature)

    # -- record --------------------------------------------------------------------------------

    def basis_of(self, known: Known) -> audit.Basis:
        terms = self.terms
        return audit.Basis(
            snapshot=known.cut.digest(),
            versions=LiveCut(known.cut, self.view).versions,
            seed=self.view.scenario.seed,
            rules_version=self.rules.version,
            inputs={
                "cut_ns": known.cut.time_ns,
                "until_ns": known.until_ns,
                "futures": terms.futures,
                "every_ns": terms.every_ns,
                "measures": [self.view.measure, *self.measures],
                "weights": {".".join(v): w for v, w in self.weights.items()},
                "moves_by": terms.moves_by,
                "held": [
                    [*place, held.value, held.owner, held.until_ns]
                    for place, held in sorted(known.desks.holdings.items())
                ],
            },
        )

    def _decided(self, made: Made, candidate: Candidate, why: str) -> audit.Decided:
        level = 3 if made.bundle is None else self.level_of(made.bundle)
        mine = next(r for r in made.ratings if r.name == made.chosen)
        return audit.decided(
            made.id,
            self.view.run,
            made.known.cut.time_ns,
            self.basis_of(made.known),
            made.bundle,
            limits=self._limits(made),
            alternatives=tuple(
                {"plan": r.name, "weighted": list(r.weighted)}
                for r in made.ratings
                if r.name != made.chosen
            ),
            predicted={"weighted": mine.mean, "deviation": mine.deviation, **mine.figures},
            level=level,
        )

    def _limits(self, made: Made) -> tuple[str, ...]:
        """The ends of ranges at which the bundle sets something."""
        if made.bundle is None:
            return ()
        found = []
        for s in made.bundle.setpoints:
            name = f"{s.member}.{s.actuator}"
            actuators = {a.name: a for a in self.view.descriptions[s.member].actuators}
            if name in self.rules.actuators:
                actuator = actuators[s.actuator]
                ends = (self.rules.low(name, actuator), self.rules.high(name, actuator))
                if s.value in ends:
                    found.append(f"range:{name}")
        return tuple(dict.fromkeys(found))

    def _judged(self, decision: str, verdict: Verdict) -> None:
        fallback = "" if verdict.fallback is None else verdict.fallback.id
        refusals = tuple((r.rule, r.sentence) for r in verdict.refusals)
        self._note(audit.Judged(decision, verdict.passed, verdict.mode.value, refusals, fallback))

    def _told(self, all_told: Sequence[Told]) -> None:
        for told in all_told:
            if not told.counts:
                detail = {"sentence": told.sentence, "person": told.person}
                self._note(audit.Noted("answer does not count", detail, told.proposal))
            elif told.state in (State.OPEN, State.CONFIRMED) and told.person:
                self._note(audit.Approved(told.proposal, told.person, told.domains))
            elif told.state in (State.REJECTED, State.EXPIRED, State.VOID):
                self._note(audit.Rejected(told.proposal, told.person, told.sentence))
                made = next((m for m in self.decisions if m.id == told.proposal), None)
                if made is not None:
                    made.outcome = told.state.value

    def _climb(self, event: LadderEvent) -> None:
        for moved in self.ladder.handle(event):
            self._note(audit.Noted("level", _moved(moved)))

    def _note(self, entry: audit.Entry) -> None:
        self.trail.append(entry, self.unix_s())

    def _keys(self) -> tuple[Grantee, ...]:
        return tuple(k for k in self.ladder.standings if k.operator == self.terms.operator)

    def _needs(self, key: Grantee) -> tuple[str, ...]:
        """The outputs that an action of this kind needs."""
        return tuple(
            dict.fromkeys(
                needed
                for name, rule in self.rules.actuators.items()
                if self.ladder.key(*_split(name), key.operator) == key
                for needed in rule.needs
            )
        )

    def _reload_rules(self) -> None:
        """Go by the rules as they stand in their file, if they are newer."""
        try:
            rules = load(self.terms.rules)
            if rules.version <= self.rules.version:
                return
            self.guard.change_rules(rules)
        except FederationError as error:
            self._note(audit.Noted("rules refused", {"why": str(error)}))
            return
        self.rules = rules
        self.monitor = Monitor(rules, self.view.descriptions)
        for moved in self.ladder.change_rules(rules):
            self._note(audit.Noted("level", _moved(moved)))
        self._told(self.docket.change_rules(rules.persons, rules.version))
        nevers = [_split(never.variable) for never in rules.never]
        self.trials = Trials(self.view, self.weights, nevers)
        self._note(audit.Noted("rules", {"version": rules.version}))

    def _save(self) -> None:
        plain = {
            "rules_version": self.rules.version,
            "run": self.view.run,
            "guard": self.guard.snapshot(),
            "ladder": self.ladder.snapshot(),
            "docket": self.docket.snapshot(),
            "asked": sorted(self._asked),
        }
        file = self.terms.state / "loop.json"
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(plain), encoding="utf-8")
        new.replace(file)

    def _restore(self) -> None:
        """Go on from what an earlier life of the loop has kept, under the rules of then."""
        file = self.terms.state / "loop.json"
        if not file.is_file():
            return
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain["run"] != self.view.run or plain["rules_version"] != self.rules.version:
            return
        self.guard.restore(plain["guard"])
        self.ladder.restore(plain["ladder"])
        self.docket.restore(plain["docket"])
        self._asked = set(plain["asked"])


class _Stages:
    """The stages of a live loop, for a turn that goes on in a thread of its own."""

    def __init__(self, live: LiveLoop, loop: asyncio.AbstractEventLoop) -> None:
        self._live = live
        self._loop = loop
        self._waits: asyncio.Task[Any] | None = None
        self._acts = self._is_given_up = False

    def give_up(self, *, even_acts: bool = False) -> None:
        """End what the turn waits for, unless it acts already; in the event loop."""
        if even_acts or not self._acts:
            self._is_given_up = True
            if self._waits is not None:
                self._waits.cancel()

    def observe(self, cut: Any) -> Known:
        self._acts = self._is_given_up = False
        known = self._wait(self._live.observe(cut.observation))
        # another loop over the run has its own
        self._made = Made(f"{self._live.keys.optimiser.name}-{cut.time_ns}", known)
        return known

    def observed(self, situation: Known) -> float:
        return self._live.weighted(situation.cut)

    def occasion(self, situation: Known, drift: Comparison | None) -> str:
        self._wait(self._live.compare(situation))
        self._wait(self._live.score(situation.cut.time_ns))
        return "" if situation.until_ns <= situation.cut.time_ns else "time to decide"

    def until_ns(self, situation: Known) -> int:
        return situation.until_ns

    def forecast(self, situation: Known) -> Rating:
        # all is tried at once: the twins take turns, and the broker between them
        self._made.candidates = self._wait(self._live.try_all(situation))
        return self._live.rated(self._made.candidates[IN_FORCE], situation)

    def plan(self, situation: Known) -> Mapping[str, Candidate]:
        return {n: c for n, c in self._made.candidates.items() if n != IN_FORCE}

    def verify(
        self, situation: Known, plans: Mapping[str, Candidate], in_force: Rating
    ) -> Sequence[Rating]:
        ratings = [in_force, *(self._live.rated(plan, situation) for plan in plans.values())]
        self._made.ratings = tuple(ratings)
        return ratings

    def guard(self, situation: Known, plan: Candidate) -> Sequence[str]:
        made, live = self._made, self._live
        if made.verdict is not None:
            return ("the guard has judged this decision already",)
        bundle = live.bundle_of(made, plan, live.basis_of(situation))
        if bundle is None:
            return ()
        verdict = self._wait(live.judge(bundle, plan))
        made.verdict, made.bundle, made.chosen = verdict, bundle, plan.name
        return tuple(f"{r.rule}: {r.sentence}" for r in verdict.refusals)

    def act(self, situation: Known, name: str, plan: Candidate | None) -> str:
        made, live = self._made, self._live
        if made.verdict is None:  # nothing was judged: what is in force goes on
            made.chosen = name
            candidate = made.candidates[name]
            made.bundle = live.bundle_of(made, candidate, live.basis_of(situation))
            if made.bundle is not None:
                made.verdict = self._wait(live.judge(made.bundle, candidate))
        live.decisions.append(made)
        self._acts = True
        return self._wait(live.act(made, made.candidates[made.chosen], ""))

    def binding(self, situation: Known, name: str) -> Sequence[str]:
        return self._live._limits(self._made)

    def record(self, decision: Decision) -> None:
        return None

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        async def noted() -> _T:
            self._waits = asyncio.current_task()
            try:
                if self._is_given_up:
                    work.close()
                    raise asyncio.CancelledError
                return await work
            finally:
                self._waits = None

        return asyncio.run_coroutine_threadsafe(noted(), self._loop).result()


def _split(name: str) -> Variable:
    member, _, variable = name.partition(".")
    return member, variable


def _at(series: Series, time_ns: int) -> Vector:
    found: Vector = series.values[0]
    for when_ns, value in zip(series.times_ns, series.values, strict=True):
        if when_ns > time_ns:
            break
        found = value
    return found


def _moved(moved: Moved) -> dict[str, Any]:
    return asdict(moved) | {"key": list(moved.key)}
