"""Stories about the report: what a planner reads, and what the page must never do."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from federation.__main__ import main
from federation.errors import Reason, ScenarioError
from federation.scenario.atlas import Halfway, pack
from federation.scenario.report import Study, more_is_better, number, signed, write_report
from federation.twin import (
    HOUR_NS,
    MINUTE_NS,
    SYSTEM,
    Actuator,
    Causality,
    Description,
    Entity,
    Parameter,
    Step,
    TimePolicy,
    Twin,
    Variable,
)
from twins.repair import Repairs

RUNS, HOURS = 4, 24
HOSTILE = "</script><script>window.broken=1</script> & Sons <b>Clinic</b>"

# a small valley: four towns on a line of road, three power lines between them

TOWNS = {"T1": (-90.0, 35.0), "T2": (-89.9, 35.02), "T3": (-89.8, 35.05), "T4": (-89.7, 35.0)}
WIRES = {"W1": ("T1", "T2"), "W2": ("T2", "T3"), "W3": ("T3", "T4")}


def out(
    name: str, kind: str, unit: str = "1", high: float = np.inf, initial: float = 0.0
) -> Variable:
    return Variable(name, kind, unit, Causality.OUTPUT, initial, 0.0, high)


def inp(name: str, kind: str, unit: str = "1", initial: float = 0.0) -> Variable:
    return Variable(name, kind, unit, Causality.INPUT, initial)


def towns() -> tuple[Entity, ...]:
    return tuple(Entity(id_, "town", "", *place) for id_, place in TOWNS.items())


def wires() -> tuple[Entity, ...]:
    middles = {w: (np.array(TOWNS[a]) + TOWNS[b]) / 2 for w, (a, b) in WIRES.items()}
    return tuple(Entity(w, "wire", "", float(m[0]), float(m[1])) for w, m in middles.items())


def clinic() -> tuple[Entity, ...]:
    return (
        Entity("C1", "clinic", HOSTILE, -89.75, 35.03),
        Entity("C2", "clinic", "", -90.02, 35.1),
    )


class Storm(Twin):
    """Breaks wires an hour after the start; how badly is a matter of chance."""

    def describe(self) -> Description:
        return Description(
            "storm", "1", "disaster", wires(),
            (out("work", "wire", "h"), out("damage", "wire", high=4.0)), TimePolicy(),
        )  # fmt: skip

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.work_h = np.random.default_rng([seed, 5]).uniform(2.0, 9.0, len(WIRES))

    def advance(self, step: Step) -> None:
        if step.time_ns == 0:
            step.publish("work", np.zeros(len(WIRES)))
            step.wake_at(HOUR_NS)
            return
        storm = step.emit("storm", SYSTEM, "gusts of 40 m/s over the valley")
        broken = {
            i: step.emit("wire_broken", name, f"wire {name} lies on the ground", [storm])
            for i, name in enumerate(WIRES)
        }
        step.publish("work", self.work_h, broken)
        step.publish("damage", np.ceil(self.work_h / 3), broken)


class Grid(Twin):
    """Feeds the towns from T1 along the wires; crews mend what is broken."""

    def describe(self) -> Description:
        return Description(
            "grid", "2", "energy", (*towns(), *wires()),
            (
                inp("work", "wire", "h"),
                out("supplied", "town", high=1.0, initial=1.0),
                out("remaining_work", "wire", "h"), out("crew_busy", "wire"),
                out("travel", "wire", "min"), out("people_without_power", SYSTEM, "persons"),
                out("unserved_energy_mwh", SYSTEM, "MW*h"), out("served_towns_treated", SYSTEM),
            ),
            TimePolicy(30 * MINUTE_NS),
            (Parameter("pace", "1", 1.0, 0.5, 3.0, "how fast crews work", "assumption"),),
            (Actuator("assign_crew", "wire", "1", 0.0, 3.0, 0.0),),
            ("unserved_energy_mwh",), data_hash="c0ffee",
        )  # fmt: skip

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.repairs = Repairs(len(WIRES))
        self.pace = parameters["pace"]
        self.lost = 0.0
        self.event: dict[int, str] = {}
        self.dark: dict[int, str] = {}

    def advance(self, step: Step) -> None:
        for index, _ in self.repairs.progress(step.last_ns, step.time_ns):
            wire = list(WIRES)[index]
            reasons = [self.event[index]]
            self.event[index] = step.emit("component_repaired", wire, f"{wire} is mended", reasons)
        for action in step.actions:
            index = list(WIRES).index(action.entity)
            self.repairs.assign(index, round(action.value), step.time_ns, 0.5)
            self.event[index] = step.emit("crew_assigned", action.entity, "a crew", [action.cause])
        for index in self.repairs.damage(step["work"] / self.pace):
            causes = step.cause("work", int(index))
            wire = list(WIRES)[index]
            self.event[int(index)] = step.emit("wire_out", wire, f"{wire} is out", causes)
        whole = self.repairs.remaining_h <= 0
        fed = np.array([1.0, *np.cumprod(whole)])
        self.lost += 10.0 * float((1 - fed).sum()) * step.span_h
        for town in np.flatnonzero(fed < 1):
            if int(town) not in self.dark:
                name, cause = list(TOWNS)[town], self.event[int(np.argmin(whole))]
                self.dark[int(town)] = step.emit("town_dark", name, f"{name} is dark", [cause])
        for town in np.flatnonzero(fed):
            self.dark.pop(int(town), None)
        step.publish("supplied", fed, dict(self.dark))
        step.publish("remaining_work", self.repairs.remaining_h, dict(self.event))
        step.publish("crew_busy", self.repairs.crews)
        step.publish("travel", np.full(len(WIRES), 30.0))
        step.publish("people_without_power", 1000.0 * (1 - fed).sum())
        step.publish("unserved_energy_mwh", self.lost)
        step.publish("served_towns_treated", fed.sum())


class Clinics(Twin):
    """Loses a patient for every hour without power."""

    def describe(self) -> Description:
        return Description(
            "clinics", "3", "medical", clinic(),
            (inp("power", "clinic", initial=1.0), out("beds", "clinic"),
             out("deaths", SYSTEM, "persons")),
            TimePolicy(HOUR_NS), kpis=("deaths",),
        )  # fmt: skip

    def open(self, seed: int, parameters: Mapping[str, float]) -> None:
        self.deaths = 0

    def advance(self, step: Step) -> None:
        if step["power"][0] < 0.5:
            self.deaths += 1
            step.emit("patient_died", "C1", f"no light at {HOSTILE}", step.cause("power", 0))
        step.publish("beds", 20.0 * step["power"])
        step.publish("deaths", self.deaths)


SCENARIO = f"""
name: storm-in-the-valley
region: valley
seed: 3
horizon_h: {HOURS}
members:
  storm: {{class: "tests.test_report:Storm"}}
  grid: {{class: "tests.test_report:Grid"}}
  clinics: {{class: "tests.test_report:Clinics"}}
couplings:
  - {{from: storm.work, to: grid.work}}
  - {{from: grid.supplied, to: clinics.power,
     map: {{file: clinics.csv, source: town, target: clinic}}}}
repairs:
  crews: 2
  decide_every_min: 60
  work:
    - {{actuator: grid.assign_crew, remaining: grid.remaining_work, busy: grid.crew_busy,
       travel: grid.travel}}
measures:
  none: {{crews: none}}
  nearest: {{crews: nearest}}
  plan: {{crews: nearest, parameters: {{grid.pace: 2.0}}}}
kpis: [grid.unserved_energy_mwh, grid.served_towns_treated, clinics.deaths]
"""

SENSITIVITY = {
    "measure": "plan",
    "runs": 2,
    "assumptions": {
        "grid.pace": {
            "low": 0.5,
            "high": 3.0,
            "kpis": {"deaths": {"base": -9.0, "low": -2.0, "high": -11.0}},
        }
    },
}


def run_study(folder: Path, *options: str) -> Path:
    (folder / "valley.yaml").write_text(SCENARIO, encoding="utf-8")
    (folder / "clinics.csv").write_text("town,clinic\nT4,C1\nT1,C2\n", encoding="utf-8")
    out_ = folder / "out"
    assert main(["run", str(folder / "valley.yaml"), "--out", str(out_), *options]) == 0
    return out_


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with everything that a report can show."""
    folder = run_study(tmp_path_factory.mktemp("study"), "--runs", str(RUNS))
    (folder / "sensitivity.json").write_text(json.dumps(SENSITIVITY), encoding="utf-8")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def summary(study: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((study / "summary.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1280,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.get("about:blank")
    yield chrome
    chrome.quit()


def log(chromium: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    """What the browser has logged since the last call."""
    found: list[dict[str, Any]] = chromium.get_log(kind)  # type: ignore[no-untyped-call]
    return found


@pytest.fixture
def page(chromium: webdriver.Chrome, study: Path) -> webdriver.Chrome:
    log(chromium, "performance")
    log(chromium, "browser")
    chromium.get((study / "report.html").as_uri())
    return chromium


def picture(page: webdriver.Chrome) -> str:
    found: str = page.execute_script("return document.getElementById('map-canvas').toDataURL()")
    return found


# -- in the browser --------------------------------------------------------------------


def test_page_opens_without_complaint_and_asks_the_network_for_nothing(
    page: webdriver.Chrome, study: Path
) -> None:
    assert page.execute_script("return document.documentElement.dataset.ready") == "yes"
    assert log(page, "browser") == []
    messages = [json.loads(row["message"])["message"] for row in log(page, "performance")]
    urls = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    outside = [url for url in urls if not url.startswith(("chrome://", "data:"))]
    assert outside == [(study / "report.html").as_uri()]


def test_every_section_has_its_heading_and_something_drawn(page: webdriver.Chrome) -> None:
    drawn = {
        "answer": ".card", "map": "#map-canvas", "figures": "#kpi-table tbody tr",
        "time": ".plot .main-svg", "cascade": "#tree details", "crews": ".main-svg",
        "sensitivity": ".main-svg", "provenance": "#members tbody tr",
    }  # fmt: skip
    for section, selector in drawn.items():
        assert page.find_element(By.CSS_SELECTOR, f"#{section} h2").text
        assert page.find_elements(By.CSS_SELECTOR, f"#{section} {selector}"), section


def test_table_says_what_the_summary_says(page: webdriver.Chrome, summary: dict[str, Any]) -> None:
    rows = page.find_elements(By.CSS_SELECTOR, "#kpi-table tbody tr")
    assert {row.get_attribute("data-kpi") for row in rows} == set(summary["measures"]["none"])
    for row in rows:
        kpi = str(row.get_attribute("data-kpi"))
        for role, section in (("measure", "measures"), ("paired", "paired")):
            for measure, figures in summary[section].items():
                cell = row.find_element(By.CSS_SELECTOR, f"td[data-{role}='{measure}']")
                data = cell.find_elements(By.CSS_SELECTOR, "data")
                expected = [figures[kpi]["mean"], *figures[kpi]["ci95"]]
                assert [float(str(d.get_attribute("value"))) for d in data] == expected
                for shown, value in zip(data, expected, strict=True):
                    text = shown.text.replace(",", "").replace("\N{MINUS SIGN}", "-")
                    assert float(text) == pytest.approx(value, abs=0.06, rel=0.005)


def test_slider_moves_the_map_by_keyboard(page: webdriver.Chrome) -> None:
    slider = page.find_element(By.ID, "map-hour")
    clock = page.find_element(By.ID, "map-clock")
    slider.send_keys(Keys.HOME)
    assert clock.text.startswith(f"Hour 0 of {HOURS}")
    before = picture(page)
    slider.send_keys(*[Keys.ARROW_RIGHT] * 2)
    assert clock.text == f"Hour 2 of {HOURS}, 1 h after the shock"
    assert picture(page) != before
    state = page.find_element(By.ID, "map-state").text
    assert "Town: 3 of 4 at half or less" in state


def test_measures_differ_on_the_map_and_in_the_cascade(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "map-hour").send_keys(Keys.END)
    measure = Select(page.find_element(By.ID, "map-measure"))
    pictures = {}
    for name in ("none", "plan"):
        measure.select_by_value(name)
        pictures[name] = picture(page)
    assert pictures["none"] != pictures["plan"]
    tally = page.find_element(By.ID, "cascade-tally")
    cascade = Select(page.find_element(By.ID, "cascade-measure"))
    cascade.select_by_value("none")
    without = tally.text
    cascade.select_by_value("plan")
    assert tally.text != without
    assert "planner" in page.find_element(By.ID, "domain-legend").text


def test_a_layer_can_be_hidden_and_shown_again(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "map-hour").send_keys(Keys.END)
    before = picture(page)
    box = page.find_element(By.CSS_SELECTOR, "#map-layers input")
    box.click()
    assert picture(page) != before
    box.click()
    assert picture(page) == before


def test_pointing_at_a_place_names_it_and_its_values(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "map-hour").send_keys(Keys.END)
    Select(page.find_element(By.ID, "map-measure")).select_by_value("none")
    found = page.execute_script("""
      const canvas = document.getElementById('map-canvas'), told = new Set();
      for (let x = 0; x < canvas.clientWidth; x += 8) for (let y = 0; y < canvas.clientHeight; y += 8) {
        const box = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + x, clientY: box.top + y}));
        const tip = document.getElementById('map-tip');
        if (!tip.hidden) told.add(tip.innerText);
      }
      return [...told];
    """)  # noqa: E501
    assert any(text.startswith("W2\nWire") and "Repair work left" in text for text in found)
    assert any(text.startswith("T4\nTown") and "Supplied" in text for text in found)


def test_names_from_a_study_stay_text(page: webdriver.Chrome) -> None:
    assert page.execute_script("return window.broken") is None
    assert HOSTILE in page.find_element(By.ID, "chain-telling").text


def test_single_run_of_a_single_measure_still_makes_a_sound_page(
    chromium: webdriver.Chrome, tmp_path: Path
) -> None:
    folder = run_study(tmp_path, "--measures", "nearest")
    log(chromium, "browser")
    chromium.get(write_report(folder).as_uri())
    assert log(chromium, "browser") == []
    assert "single run" in chromium.find_element(By.ID, "answer").text
    assert not chromium.find_elements(By.ID, "sensitivity")


# -- what the page says ----------------------------------------------------------------


def test_report_of_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        write_report(tmp_path)
    assert caught.value.reason == Reason.RUN_NOT_FOUND


def test_page_is_written_the_same_twice(study: Path) -> None:
    first = (study / "report.html").read_bytes()
    assert write_report(study).read_bytes() == first
    assert len(first) < 12_000_000


def test_verdict_follows_the_interval_and_the_direction_of_the_figure(study: Path) -> None:
    told = Study(study)
    fewer, more, unsure = [-4.0, -1.0], [1.0, 4.0], [-1.0, 2.0]
    assert told.mark("deaths", {"mean": -2.0, "ci95": fewer}) == "better"
    assert told.mark("deaths", {"mean": 2.0, "ci95": more}) == "worse"
    assert told.mark("deaths", {"mean": 0.5, "ci95": unsure}) == "no clear difference"
    assert told.mark("patients_treated", {"mean": 2.0, "ci95": more}) == "better"
    assert told.mark("deaths", {"mean": 0.0, "ci95": [0.0, 0.0]}) == "no difference"
    assert not more_is_better("unserved_energy_mwh")
    assert not more_is_better("untreated_after_6h")


def test_answer_names_cause_effect_and_interval(study: Path, summary: dict[str, Any]) -> None:
    answer = Study(study).answer()
    assert answer["lead"].startswith("After 1 hour of normal service: storm, gusts of 40 m/s")
    text = " ".join(answer["sentences"])
    low, high = summary["paired"]["plan"]["deaths"]["ci95"]
    assert high < 0, "in the valley, faster crews save lives in every run"
    assert f"deaths down by {number(-summary['paired']['plan']['deaths']['mean'], low)}" in text
    assert f"(95\N{NO-BREAK SPACE}%: {number(-high, low)} to {number(-low, low)})" in text


def test_plan_is_also_measured_against_the_simple_rule(study: Path) -> None:
    told = Study(study)
    runs = told.runs.to_pylist()
    deaths = {(r["run"], r["measure"]): r["kpi.deaths"] for r in runs}
    expected = np.mean([deaths[i, "plan"] - deaths[i, "nearest"] for i in range(RUNS)])
    rival = told.rival("deaths")
    assert rival is not None
    assert rival["mean"] == pytest.approx(expected)


def test_crews_in_one_row_never_overlap_and_end_with_the_repair(study: Path) -> None:
    told = Study(study)
    assert told.assignments("none") == []
    bars = told.assignments("nearest")
    assert {b["component"] for b in bars} == set(WIRES)
    mended = {
        r.event.entity: r.time_ns / HOUR_NS
        for r in told.events["nearest"]
        if r.event.kind == "component_repaired"
    }
    for bar in bars:
        assert bar["end"] == pytest.approx(mended[bar["component"]], abs=1e-3)
    for row in {b["row"] for b in bars}:
        mine = sorted((b["start"], b["end"]) for b in bars if b["row"] == row)
        assert all(a[1] <= b[0] for a, b in pairwise(mine))
    assert {b["row"] for b in bars} == {0, 1}, "two crews, two rows"


def test_bands_enclose_their_median(study: Path) -> None:
    bands = {band["name"]: band for band in Study(study).bands()}
    assert bands["grid.people_without_power"]["label"] == "People without power"
    for band in bands.values():
        for low, middle, high in band["measures"].values():
            assert len(middle) == HOURS + 1
            assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))


# -- numbers and shapes ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567.8, "1,234,568"),
        (71.04, "71.0"),
        (0.254, "0.25"),
        (0.0, "0"),
        (-3.26, "\N{MINUS SIGN}3.3"),
    ],
)
def test_figures_have_as_many_decimals_as_they_deserve(value: float, text: str) -> None:
    assert number(value) == text


def test_signs_are_shown_but_never_on_nought() -> None:
    assert signed(2.0) == "+2.0"
    assert signed(-2.0) == "\N{MINUS SIGN}2.0"
    assert signed(-0.0001, 100.0) == "0"
    assert signed(0.0001, 100.0) == "0"


@settings(max_examples=60)
@given(
    arrays(np.float64, (5, 3), elements=st.floats(-1e6, 1e6, width=32)),
    st.lists(st.integers(0, 9), min_size=5, max_size=5, unique=True).map(sorted),
)
def test_packed_frames_keep_every_value_to_half_a_step(
    values: np.ndarray, hours: list[int]
) -> None:
    hours[0] = 0
    values[1, 2] = np.nan
    packed = pack({"m": list(zip(hours, values, strict=True))}, 10)
    kind = "<u1" if packed["bits"] == 8 else "<u2"
    codes = np.frombuffer(base64.b64decode(packed["rows"]), kind).reshape(-1, 3)
    none = 255 if packed["bits"] == 8 else 65_535
    held = values[0]
    for hour in range(11):
        if hour in hours:
            held = values[hours.index(hour)]
        code = codes[packed["frames"]["m"][hour]]
        found = np.where(code == none, np.nan, packed["low"] + packed["step"] * code)
        slack = packed["step"] * 0.501 + 1e-9
        np.testing.assert_allclose(found, held, rtol=0, atol=slack, equal_nan=True)


def test_a_frame_that_comes_back_is_kept_once() -> None:
    on, off = np.array([1.0, 1.0]), np.array([0.0, 1.0])
    packed = pack({"a": [(0, on), (2, off), (4, on)], "b": [(0, on)]}, 5)
    assert packed["frames"] == {"a": [0, 0, 1, 1, 0, 0], "b": [0] * 6}
    assert len(base64.b64decode(packed["rows"])) == 4


def test_what_lies_halfway_between_two_places_is_a_line_and_all_else_a_point() -> None:
    ends = np.array(list(TOWNS.values()))
    middles = np.array([[w.lon_deg, w.lat_deg] for w in wires()])
    found = Halfway(ends).lines(np.vstack([middles, [[-89.0, 35.5]]]))
    for line, (a, b) in zip(found[:3], WIRES.values(), strict=True):
        assert line is not None
        assert {tuple(line[:2]), tuple(line[2:])} == {TOWNS[a], TOWNS[b]}
    assert found[3] is None
