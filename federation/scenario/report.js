/* Draws the map, charts, cascade and crews of one study from the JSON in the page. */
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key in node && key !== "list") node[key] = value; else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
};

/* Okabe-Ito and Tol colours: told apart with any common colour blindness. */
const MEASURE_COLOURS = ["#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#882255"];
const DASHES = ["dash", "dot", "solid", "dashdot", "longdash"];
const known = { none: 0, nearest: 1, plan: 2 };
const measureStyle = {};
data.measures.forEach((m, i) => {
  const at = known[m.name] ?? (3 + i) % 5;
  measureStyle[m.name] = { colour: MEASURE_COLOURS[at], dash: DASHES[at], label: m.label };
});
const DOMAIN_COLOURS = {
  disaster: "#882255", energy: "#8a6d00", city: "#332288", medical: "#117733", planner: "#5b6670",
};
const SPARE = ["#0072b2", "#a8320a", "#44755b", "#6a3d9a", "#00695c", "#7a4a1e"];
const colourOfDomain = (name) => {
  if (!(name in DOMAIN_COLOURS)) DOMAIN_COLOURS[name] = SPARE[Object.keys(DOMAIN_COLOURS).length % SPARE.length];
  return DOMAIN_COLOURS[name];
};
const FAMILY_COLOURS = { Power: "#e69f00", Water: "#0072b2", Road: "#7a5195" };
const kept = data.measures.filter((m) => m.kept);

const words = (name) => { const t = name.replaceAll("_", " ").replace(/\bicu\b/g, "intensive care").trim(); return t.charAt(0).toUpperCase() + t.slice(1); };
/* An event's sentence, led by its kind unless the sentence has a word of it already. */
const say = (c, e) => {
  const kind = words(c.kinds[e[2]]), text = e[4], plain = text.toLowerCase();
  return kind.toLowerCase().split(" ").some((w) => w.length > 2 && plain.includes(w.slice(0, 5))) ? text : `${kind}: ${text}`;
};
const tidy = (value) => {
  if (!Number.isFinite(value)) return "no value";
  const size = Math.abs(value);
  const digits = Number.isInteger(value) || size >= 100 ? 0 : size >= 10 ? 1 : 2;
  return value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "\u2212");
};
const clock = (minutes) => `${String(Math.floor(minutes / 60)).padStart(2, "0")}:${String(minutes % 60).padStart(2, "0")}`;
const chip = (domain) => {
  const node = make("span", { className: "chip" }, domain);
  node.style.background = colourOfDomain(domain);
  return node;
};

/* ---- map ------------------------------------------------------------------------- */

/* How a kind is called and drawn, and which of its variables a viewer meets first. */
const KINDS = {
  zone: ["Neighbourhoods", "disc", ["patients_waiting", "injured_severity2", "pga"], true],
  road: ["Roads", "line", ["road_open", "road_damage_state", "road_remaining_work"], true],
  water_component: ["Water mains, pumps and tanks", "diamond", ["water_remaining_work", "water_damage_state", "water_intact"], false],
  power_component: ["Power lines, transformers, infeeds", "triangle", ["remaining_work", "power_damage_state", "intact"], false],
  load_point: ["Power supply", "square", ["supplied_fraction"], true],
  junction: ["Water supply", "drop", ["junction_service"], true],
  pump: ["Water pumps", "triangle", ["pump_supplied", "pump_load"], false],
  hospital: ["Hospitals", "cross", ["functional_beds", "hospital_supplied", "hospital_water", "hospital_damage_state"], true],
};
const VARIABLES = {
  supplied_fraction: "Power delivered, share of demand", junction_service: "Water delivered, share of need",
  road_open: "Open to traffic", functional_beds: "Beds that can be used", hospital_supplied: "Grid power, share of need",
  hospital_water: "Water, share of need", patients_waiting: "Patients waiting to be picked up",
  injured_severity1: "Hurt: first aid", injured_severity2: "Hurt: need a hospital",
  injured_severity3: "Hurt: in danger of life", injured_severity4: "Dead at once",
  pga: "Strongest shaking (peak acceleration, g)", remaining_work: "Repair work left",
  road_remaining_work: "Repair work left", water_remaining_work: "Repair work left",
  power_damage_state: "Damage, 0 none to 4 complete", road_damage_state: "Damage, 0 none to 4 complete",
  water_damage_state: "Damage, 0 none to 4 complete", hospital_damage_state: "Damage, 0 none to 4 complete",
  intact: "Intact", road_intact: "Intact", water_intact: "Intact", link_flow: "Traffic",
  generator_on: "Runs on its generator", fuel_left: "Generator fuel left", queue: "Patients waiting for a bed",
  beds_occupied: "Beds occupied", icu_occupied: "Intensive care occupied", pump_supplied: "Power for the pump",
  crew_busy: "Crews at it", road_crew_busy: "Crews at it", water_crew_busy: "Crews at it",
  crew_travel_power: "Crew travel time", crew_travel_water: "Crew travel time", crew_travel_road: "Crew travel time",
};
/* Sentence for the list under the map: what a value that is bad by half or more means. */
const PLAIN = {
  supplied_fraction: "power supply points have lost half or more of their power",
  junction_service: "water junctions get half or less of their water",
  road_open: "road segments are closed", functional_beds: "hospitals have lost half or more of their beds",
  hospital_supplied: "hospitals have lost half or more of their grid power",
  hospital_water: "hospitals get half or less of their water", generator_on: "hospitals run on a generator",
};
const NEUTRAL = /busy|flow|load|need|occupied|travel|generator/;

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
class Values {
  constructor(spec, size) {
    Object.assign(this, spec);
    const raw = bytes(spec.rows);
    this.codes = spec.bits === 8 ? raw : new Uint16Array(raw.buffer);
    this.none = spec.bits === 8 ? 255 : 65535;
    this.size = size;
    this.label = VARIABLES[spec.name] ?? words(spec.name);
    this._look();
  }
  at(measure, hour, i) {
    const code = this.codes[this.frames[measure][hour] * this.size + i];
    return code === this.none ? NaN : this.low + this.step * code;
  }
  /* Whether departures from the start are falls, rises or both, over all measures and hours. */
  _look() {
    const first = Object.keys(this.frames)[0];
    this.start = Float64Array.from({ length: this.size }, (_, i) => first ? this.at(first, 0, i) : NaN);
    let up = 0, down = 0;
    const rows = this.codes.length / this.size || 0;
    for (let r = 0; r < rows; r++) for (let i = 0; i < this.size; i++) {
      const code = this.codes[r * this.size + i];
      if (code === this.none) continue;
      const d = this.low + this.step * code - this.start[i];
      if (d > up) up = d; else if (d < down) down = d;
    }
    this.way = NEUTRAL.test(this.name) ? "neutral" : -down > up ? "fall" : "rise";
    const [low, high] = this.bounds;
    this.whole = Number.isFinite(low) && Number.isFinite(high) && low !== null && high !== null && high - low <= 10;
    this.scale = this.whole ? [low, high] : [Math.min(0, this.range[0]), this.range[1]];
    if (this.name === "pga") this.scale = [0, this.range[1]];
  }
  /* 0 as before the shock, 1 the worst. A fall without a bound counts as share of the start. */
  badness(measure, hour, i) {
    const value = this.at(measure, hour, i);
    if (Number.isNaN(value)) return NaN;
    const [low, high] = this.scale;
    if (this.way === "fall") {
      const top = this.whole ? high : this.start[i];
      return top > low ? Math.min(1, Math.max(0, (top - value) / (top - low))) : 0;
    }
    return high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0;
  }
  ends() {
    if (this.way === "fall") return this.whole ? [tidy(this.scale[1]), tidy(this.scale[0])] : ["as at the start", "none"];
    return [tidy(this.scale[0]), tidy(this.scale[1])];
  }
}
const mix = (stops, t) => {
  const x = t * (stops.length - 1), k = Math.min(stops.length - 2, Math.floor(x)), f = x - k;
  const c = [0, 1, 2].map((j) => Math.round(stops[k][j] + f * (stops[k + 1][j] - stops[k][j])));
  return `rgb(${c[0]},${c[1]},${c[2]})`;
};
/* Lightness falls all the way, so that the order survives any colour blindness and print. */
const BAD = [[190, 206, 218], [240, 184, 60], [213, 84, 20], [110, 12, 26]];
const AMOUNT = [[214, 226, 238], [107, 163, 205], [8, 64, 129]];
const ramp = (values) => values.way === "neutral" ? AMOUNT : BAD;

const order = ["zone", "road", "water_component", "power_component", "junction", "load_point", "pump", "hospital"];
const rank = (kind) => { const k = order.indexOf(kind); return k < 0 ? 2.5 : k; };
const layers = data.layers.map((spec) => {
  const [label, shape, first, on] = KINDS[spec.kind] ?? [words(spec.kind), "disc", [], true];
  const variables = spec.variables.map((v) => new Values(v, spec.ids.length));
  variables.sort((a, b) => {
    const p = first.indexOf(a.name), q = first.indexOf(b.name);
    return (p < 0 ? 99 : p) - (q < 0 ? 99 : q);
  });
  return { ...spec, label, shape, on, variables, shown: variables[0] };
}).sort((a, b) => rank(a.kind) - rank(b.kind));

const canvas = $("map-canvas"), pen = canvas.getContext("2d");
const state = { measure: data.focus, hour: 0, zoom: 1, dx: 0, dy: 0, timer: 0 };
const all = layers.flatMap((l) => l.places);
/* A few places far outside must not make the rest small: the view is on nearly all of them. */
const sorted = [0, 1].map((k) => all.map((p) => p[k]).sort((a, b) => a - b));
const inner = (k, q) => sorted[k][Math.round(q * (sorted[k].length - 1))];
const box = [inner(0, .005), inner(1, .005), inner(0, .995), inner(1, .995)];
const outer = [inner(0, 0), inner(1, 0), inner(0, 1), inner(1, 1)];
const middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];
const squeeze = Math.cos(middle[1] * Math.PI / 180);
const KM_PER_DEGREE = 111.2;
let width = 0, height = 0, perDegree = 1;
const fit = () => {
  const ratio = window.devicePixelRatio || 1;
  width = canvas.clientWidth; height = canvas.clientHeight;
  canvas.width = width * ratio; canvas.height = height * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const wide = Math.max((box[2] - box[0]) * squeeze, 1e-4), tall = Math.max(box[3] - box[1], 1e-4);
  perDegree = Math.min((width - 60) / wide, (height - 70) / tall);
};
const toX = (lon) => width / 2 + state.dx + (lon - middle[0]) * squeeze * perDegree * state.zoom;
const toY = (lat) => height / 2 + state.dy - (lat - middle[1]) * perDegree * state.zoom;

const mark = (shape, x, y, r) => {
  pen.beginPath();
  if (shape === "square") pen.rect(x - r * .9, y - r * .9, r * 1.8, r * 1.8);
  else if (shape === "diamond") { pen.moveTo(x, y - r * 1.2); pen.lineTo(x + r * 1.2, y); pen.lineTo(x, y + r * 1.2); pen.lineTo(x - r * 1.2, y); pen.closePath(); }
  else if (shape === "triangle") { pen.moveTo(x, y - r * 1.2); pen.lineTo(x + r * 1.1, y + r * .8); pen.lineTo(x - r * 1.1, y + r * .8); pen.closePath(); }
  else if (shape === "drop") { pen.moveTo(x, y - r * 1.5); pen.quadraticCurveTo(x + r * 1.2, y, x + r * .8, y + r * .5); pen.arc(x, y + r * .3, r * .85, .2, Math.PI - .2); pen.quadraticCurveTo(x - r * 1.2, y, x, y - r * 1.5); }
  else if (shape === "cross") { const a = r * .45, b = r * 1.25; pen.moveTo(x - a, y - b); for (const [p, q] of [[a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]) pen.lineTo(x + p, y + q); pen.closePath(); }
  else pen.arc(x, y, r, 0, 2 * Math.PI);
};
const size = (layer, bad) => {
  const grow = Math.min(2, Math.sqrt(state.zoom));
  const base = { disc: 9, cross: 8, square: 6, drop: 5, diamond: 3.5, triangle: 4 }[layer.shape] ?? 4.5;
  return base * (layer.shape === "disc" ? 1 : .75 + .45 * bad) * grow;
};
const draw = () => {
  pen.clearRect(0, 0, width, height);
  for (const layer of layers) {
    if (!layer.on || !layer.shown) continue;
    const colours = ramp(layer.shown);
    const hasLines = layer.lines.length > 0;
    /* the worst last, so that it is never hidden */
    const bad = layer.ids.map((_, i) => layer.shown.badness(state.measure, state.hour, i));
    const turn = bad.map((b, i) => i).filter((i) => !Number.isNaN(bad[i])).sort((a, b) => bad[a] - bad[b]);
    pen.globalAlpha = layer.shape === "disc" ? .55 : 1;
    for (const i of turn) {
      const line = hasLines ? layer.lines[i] : null;
      if (line) {
        pen.strokeStyle = mix(colours, bad[i]);
        pen.lineWidth = (layer.shape === "line" ? 1.4 : 2.2) + 2.6 * bad[i];
        pen.setLineDash(layer.kind.startsWith("water") ? [6, 4] : []);
        pen.beginPath(); pen.moveTo(toX(line[0]), toY(line[1])); pen.lineTo(toX(line[2]), toY(line[3])); pen.stroke();
        pen.setLineDash([]);
      } else {
        mark(layer.shape === "line" ? "disc" : layer.shape, toX(layer.places[i][0]), toY(layer.places[i][1]), layer.shape === "line" ? 2.5 : size(layer, bad[i]));
        pen.fillStyle = mix(colours, bad[i]); pen.fill();
        if (layer.shape !== "disc") { pen.lineWidth = layer.shape === "cross" ? 1.4 : .8; pen.strokeStyle = layer.shape === "cross" ? "#16222e" : "rgba(22,34,46,.75)"; pen.stroke(); }
      }
    }
    pen.globalAlpha = 1;
    if (layer.ids.length <= 40 && state.zoom >= 1.8) label(layer);
  }
  scaleBar();
};
const label = (layer) => {
  pen.font = "12px sans-serif"; pen.textAlign = "left"; pen.lineWidth = 3;
  pen.strokeStyle = "rgba(255,255,255,.9)"; pen.fillStyle = "#1c2733";
  layer.names.forEach((name, i) => {
    if (!name || name === layer.ids[i]) return;
    const x = toX(layer.places[i][0]) + 14, y = toY(layer.places[i][1]) + 4;
    pen.strokeText(name, x, y); pen.fillText(name, x, y);
  });
};
const scaleBar = () => {
  const perKm = perDegree * state.zoom / KM_PER_DEGREE;
  const km = [.1, .2, .5, 1, 2, 5, 10, 20, 50, 100].filter((k) => k * perKm <= 160).pop() ?? .1;
  const y = height - 18, x = 16;
  pen.fillStyle = "rgba(255,255,255,.85)"; pen.fillRect(x - 8, y - 22, km * perKm + 16, 34);
  pen.strokeStyle = "#1c2733"; pen.lineWidth = 1.5; pen.beginPath();
  pen.moveTo(x, y - 5); pen.lineTo(x, y); pen.lineTo(x + km * perKm, y); pen.lineTo(x + km * perKm, y - 5); pen.stroke();
  pen.fillStyle = "#1c2733"; pen.font = "12px sans-serif"; pen.textAlign = "left";
  pen.fillText(km < 1 ? `${km * 1000} m` : `${km} km`, x + 4, y - 8);
};

const swatch = (layer) => {
  const c = make("canvas", { width: 44, height: 32 });
  c.style.cssText = "width:22px;height:16px"; c.setAttribute("aria-hidden", "true");
  const p = c.getContext("2d");
  p.setTransform(2, 0, 0, 2, 0, 0); p.fillStyle = p.strokeStyle = "#5b7083";
  if (layer.shape === "line" || layer.lines.length) { p.lineWidth = 2.5; p.setLineDash(layer.kind.startsWith("water") ? [5, 3] : []); p.beginPath(); p.moveTo(1, 13); p.lineTo(21, 3); p.stroke(); }
  else {
    const square = layer.shape;
    if (square === "square") p.fillRect(6, 3, 10, 10);
    else if (square === "cross") { p.fillRect(9, 2, 4, 12); p.fillRect(5, 6, 12, 4); }
    else { p.beginPath(); if (square === "triangle") { p.moveTo(11, 2); p.lineTo(17, 13); p.lineTo(5, 13); } else if (square === "diamond") { p.moveTo(11, 1); p.lineTo(17, 8); p.lineTo(11, 15); p.lineTo(5, 8); } else if (square === "drop") { p.moveTo(11, 1); p.quadraticCurveTo(17, 9, 15, 12); p.arc(11, 11, 4, 0, Math.PI); p.quadraticCurveTo(5, 9, 11, 1); } else p.arc(11, 8, 6, 0, 7); p.fill(); }
  }
  return c;
};
const legend = (layer, strip) => {
  strip.replaceChildren();
  if (!layer.shown) return;
  const [left, right] = layer.shown.ends();
  const bar = make("i");
  bar.style.background = `linear-gradient(90deg, ${[0, .25, .5, .75, 1].map((t) => mix(ramp(layer.shown), t)).join(",")})`;
  const unit = layer.shown.unit;
  strip.append(left, bar, right + (unit && right !== "none" ? " " + unit : ""));
};
/* Topmost layer first, as in every atlas. */
for (const layer of [...layers].reverse()) {
  const strip = make("div", { className: "ramp" });
  const pick = make("select", { "aria-label": `What is shown of: ${layer.label}` },
    ...layer.variables.map((v, i) => make("option", { value: i, title: v.doc }, v.label)));
  const row = make("div", { className: layer.on ? "layer" : "layer off" });
  const tick = make("input", { type: "checkbox", checked: layer.on });
  tick.addEventListener("change", () => { layer.on = tick.checked; row.classList.toggle("off", !layer.on); refresh(); });
  pick.addEventListener("change", () => { layer.shown = layer.variables[pick.value]; legend(layer, strip); refresh(); });
  row.append(make("label", {}, tick, swatch(layer), `${layer.label} (${layer.ids.length.toLocaleString("en-GB")})`), pick, strip);
  legend(layer, strip);
  $("map-layers").append(row);
}

const refresh = () => {
  draw();
  const since = data.shock_h === null ? null : state.hour - data.shock_h;
  const relation = since === null ? "" : since < 0 ? ", before the shock" : `, ${tidy(Math.round(since * 10) / 10)} h after the shock`;
  $("map-clock").textContent = `Hour ${state.hour} of ${data.hours}${relation}`;
  $("map-hour").setAttribute("aria-valuetext", $("map-clock").textContent);
  const lines = [];
  for (const layer of [...layers].reverse()) {
    if (!layer.on || !layer.shown) continue;
    const v = layer.shown;
    const bad = layer.ids.map((_, i) => v.badness(state.measure, state.hour, i)).filter((b) => !Number.isNaN(b));
    const values = layer.ids.map((_, i) => v.at(state.measure, state.hour, i)).filter((b) => !Number.isNaN(b));
    if (!values.length) continue;
    const half = bad.filter((b) => b >= .5 - 1e-9).length;
    const sum = values.reduce((a, b) => a + b, 0), top = Math.max(...values);
    const unit = v.unit ? " " + v.unit : "";
    lines.push(PLAIN[v.name] ? `${half} of ${values.length} ${PLAIN[v.name]}`
      : v.whole && v.way === "fall" ? `${layer.label}: ${half} of ${values.length} at half or less of \u201c${v.label.toLowerCase()}\u201d`
      : v.whole ? `${layer.label}: ${v.label.toLowerCase()}, highest ${tidy(top)}, mean ${tidy(sum / values.length)}`
      : `${layer.label}: ${v.label.toLowerCase()}, ${tidy(sum)}${unit} in all, highest ${tidy(top)}`);
  }
  $("map-state").replaceChildren(...lines.map((t) => make("li", {}, t)));
  happened();
};
const happened = () => {
  const c = data.cascade[state.measure];
  if (!c) return;
  const groups = new Map();
  for (const e of c.events) {
    if (state.hour === 0 ? e[0] > 0 : e[0] > state.hour * 60 || e[0] <= (state.hour - 1) * 60) continue;
    const key = `${e[1]}/${e[2]}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(e);
  }
  const rows = [...groups.values()].slice(0, 9).map((g) => {
    const e = g[0];
    const text = g.length === 1 ? say(c, e) : `${say(c, e)} (and ${g.length - 1} more: ${words(c.kinds[e[2]]).toLowerCase()})`;
    return make("li", {}, make("time", {}, clock(e[0])), " ", chip(c.domains[e[1]]), text);
  });
  const more = groups.size - rows.length;
  if (more > 0) rows.push(make("li", {}, `and ${more} more kinds of event`));
  if (!rows.length) rows.push(make("li", {}, "Nothing that a planner would name."));
  $("map-events").replaceChildren(...rows);
};

const near = (x, y) => {
  let best = null, least = 144;
  for (const layer of [...layers].reverse()) {
    if (!layer.on || !layer.shown) continue;
    layer.places.forEach(([lon, lat], i) => {
      const line = layer.lines.length ? layer.lines[i] : null;
      let d;
      if (line) {
        const [ax, ay, bx, by] = [toX(line[0]), toY(line[1]), toX(line[2]), toY(line[3])];
        const l = (bx - ax) ** 2 + (by - ay) ** 2, t = Math.max(0, Math.min(1, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / l));
        d = (x - ax - t * (bx - ax)) ** 2 + (y - ay - t * (by - ay)) ** 2 + 49; // where they meet, a point counts before a line
      } else d = (x - toX(lon)) ** 2 + (y - toY(lat)) ** 2 + (layer.shape === "disc" ? 36 : 0);
      if (d < least) { least = d; best = [layer, i]; }
    });
  }
  return best;
};
const tip = $("map-tip");
const tell = (x, y) => {
  const found = near(x, y);
  tip.hidden = !found;
  if (!found) return;
  const [layer, i] = found;
  const rows = layer.variables.slice(0, 12).map((v) => {
    const unit = v.unit;
    return make("tr", { className: v === layer.shown ? "shown" : "" }, make("td", {}, v.label), make("td", {}, tidy(v.at(state.measure, state.hour, i)) + (unit ? " " + unit : "")));
  });
  const name = layer.names[i] === layer.ids[i] ? "" : layer.names[i];
  tip.replaceChildren(make("strong", {}, name || layer.ids[i]), name ? `${layer.ids[i]}, ` : "", layer.label, make("table", {}, make("tbody", {}, ...rows)));
  tip.style.left = `${x + 16 + tip.offsetWidth > width ? Math.max(0, x - tip.offsetWidth - 12) : x + 16}px`;
  tip.style.top = `${Math.max(0, Math.min(y + 12, height - tip.offsetHeight - 4))}px`;
};
const zoomBy = (factor, x = width / 2, y = height / 2) => {
  const next = Math.min(40, Math.max(.2, state.zoom * factor)), real = next / state.zoom;
  state.dx = x - width / 2 - (x - width / 2 - state.dx) * real;
  state.dy = y - height / 2 - (y - height / 2 - state.dy) * real;
  state.zoom = next; draw();
};
let held = null;
canvas.addEventListener("pointerdown", (e) => { held = [e.clientX - state.dx, e.clientY - state.dy]; canvas.setPointerCapture(e.pointerId); canvas.classList.add("held"); });
canvas.addEventListener("pointerup", () => { held = null; canvas.classList.remove("held"); });
canvas.addEventListener("pointermove", (e) => {
  if (held) { state.dx = e.clientX - held[0]; state.dy = e.clientY - held[1]; tip.hidden = true; draw(); } else tell(e.offsetX, e.offsetY);
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("wheel", (e) => { if (e.ctrlKey || e.metaKey) { e.preventDefault(); zoomBy(e.deltaY < 0 ? 1.2 : 1 / 1.2, e.offsetX, e.offsetY); } }, { passive: false });
canvas.addEventListener("keydown", (e) => {
  const step = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[e.key];
  if (step) { state.dx += step[0]; state.dy += step[1]; draw(); e.preventDefault(); }
  else if (e.key === "+") zoomBy(1.4); else if (e.key === "-") zoomBy(1 / 1.4);
});
$("map-in").addEventListener("click", () => zoomBy(1.4));
$("map-out").addEventListener("click", () => zoomBy(1 / 1.4));
$("map-fit").addEventListener("click", () => { Object.assign(state, { zoom: 1, dx: 0, dy: 0 }); draw(); });
$("map-all").addEventListener("click", () => {
  Object.assign(state, { zoom: 1, dx: 0, dy: 0 });
  state.zoom = Math.min(1, (width - 60) / ((outer[2] - outer[0]) * squeeze * perDegree), (height - 70) / ((outer[3] - outer[1]) * perDegree));
  state.dx = width / 2 - (toX(outer[0]) + toX(outer[2])) / 2;
  state.dy = height / 2 - (toY(outer[1]) + toY(outer[3])) / 2;
  draw();
});

const options = (select, chosen) => {
  select.append(...kept.map((m) => make("option", { value: m.name }, m.label)));
  select.value = chosen;
};
const setHour = (hour) => { state.hour = hour; $("map-hour").value = hour; refresh(); };
const stop = () => { clearInterval(state.timer); state.timer = 0; $("map-play").textContent = "Play"; $("map-play").setAttribute("aria-pressed", "false"); };
options($("map-measure"), state.measure);
$("map-measure").addEventListener("change", () => { state.measure = $("map-measure").value; refresh(); });
$("map-hour").addEventListener("input", () => { stop(); setHour(Number($("map-hour").value)); });
$("map-play").addEventListener("click", () => {
  if (state.timer) { stop(); return; }
  if (state.hour >= data.hours) setHour(0);
  $("map-play").textContent = "Pause"; $("map-play").setAttribute("aria-pressed", "true");
  state.timer = setInterval(() => { if (state.hour >= data.hours) stop(); else setHour(state.hour + 1); }, 260);
});
if (kept.length && layers.length) {
  fit();
  new ResizeObserver(() => { fit(); draw(); }).observe(canvas);
  setHour(Math.min(data.hours, data.shock_h === null ? 0 : Math.ceil(data.shock_h) + 1));
} else {
  document.querySelector(".mapgrid").replaceChildren(make("p", {}, "No entity of this study has a place."));
}

/* ---- charts ---------------------------------------------------------------------- */

const FONT = { family: "Source Sans 3, Segoe UI, Noto Sans, Liberation Sans, Helvetica, Arial, sans-serif", size: 13, color: "#1c2733" };
const CONFIG = { displayModeBar: false, responsive: true };
const axis = (extra) => ({ gridcolor: "#e4e9ee", zerolinecolor: "#9fb0be", automargin: true, ...extra });
const layout = (extra) => ({
  font: FONT, margin: { l: 58, r: 12, t: 6, b: 38 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", showlegend: false,
  hoverlabel: { font: FONT, bgcolor: "#fff" }, separators: ".,", ...extra,
});
const shockLine = () => data.shock_h === null ? [] : [{ type: "line", x0: data.shock_h, x1: data.shock_h, yref: "paper", y0: 0, y1: 1, line: { color: "#52606d", width: 1.2, dash: "dot" } }];
const hours = Array.from({ length: data.hours + 1 }, (_, h) => h);
const band = (node, series) => {
  const plot = make("div", { className: "plot" });
  node.replaceChildren(make("h3", {}, series.label, make("span", { className: "unit" }, series.unit ? `, ${series.unit}` : "")), plot);
  const traces = [];
  for (const m of data.measures) {
    const lines = series.measures[m.name];
    if (!lines) continue;
    const { colour, dash, label } = measureStyle[m.name];
    if (data.runs > 1) traces.push({ x: [...hours, ...[...hours].reverse()], y: [...lines[2], ...[...lines[0]].reverse()], fill: "toself", fillcolor: colour + "26", line: { width: 0 }, mode: "lines", hoverinfo: "skip" });
    traces.push({ x: hours, y: lines[1], mode: "lines", line: { color: colour, width: 2.4, dash }, name: label, customdata: hours.map((h) => [lines[0][h], lines[2][h]]),
      hovertemplate: `%{y:,.4~g}${data.runs > 1 ? " (%{customdata[0]:,.4~g} to %{customdata[1]:,.4~g})" : ""}<extra>${label}</extra>` });
  }
  Plotly.newPlot(plot, traces, layout({ hovermode: "x unified", shapes: shockLine(), xaxis: axis({ title: { text: "hours from the start", standoff: 4 }, dtick: data.hours > 30 ? 12 : undefined, range: [0, data.hours] }), yaxis: axis({ rangemode: "tozero", tickformat: ",~g" }) }), CONFIG);
};
$("band-legend").append(...data.measures.map((m) => {
  const { colour, dash, label } = measureStyle[m.name];
  const line = make("i");
  line.style.borderTop = `3px ${{ dash: "dashed", dot: "dotted" }[dash] ?? "solid"} ${colour}`;
  return make("span", { className: "key" }, line, label);
}));
const bare = (name) => name.slice(name.indexOf(".") + 1);
const chosen = data.first_charts.map((n) => data.bands.find((s) => bare(s.name) === n)).filter(Boolean);
const fill = [...chosen, ...data.bands.filter((s) => !chosen.includes(s))].slice(0, Math.max(chosen.length, Math.min(4, data.bands.length)));
for (const series of fill) {
  const node = make("div", { className: "chart" });
  $("bands").append(node);
  band(node, series);
}
const rest = data.bands.filter((s) => !fill.includes(s));
$("band-more").append(...rest.map((s, i) => make("option", { value: i }, s.label)));
if (rest.length) {
  $("band-more").addEventListener("change", () => band($("band-other"), rest[$("band-more").value]));
  band($("band-other"), rest[0]);
} else $("band-more").closest(".controls").hidden = true;

/* ---- cascade --------------------------------------------------------------------- */

const channelText = (c, e) => e[6] < 0 ? "" : c.channels[e[6]];
const eventLine = (c, e) => [make("time", {}, clock(e[0])), chip(c.domains[e[1]]), say(c, e)];
const viaNode = (text) => make("span", { className: "via" }, "through ", make("code", {}, text.replace("->", "\u2192").replace("=>", "\u21d2")));
const chain = (node, c, ids) => {
  node.replaceChildren(...ids.map((id, step) => {
    const e = c.events[id], item = make("li");
    item.style.setProperty("--dot", colourOfDomain(c.domains[e[1]]));
    const previous = step ? ids[step - 1] : -1;
    if (step && e[5] === previous && e[6] >= 0) item.append(viaNode(channelText(c, e)));
    item.append(...eventLine(c, e));
    return item;
  }));
  if (!ids.length) node.append(make("li", {}, "No event led to another."));
};
const cascade = (measure) => {
  const c = data.cascade[measure];
  chain($("chain-longest"), c, c.chains.longest ?? []);
  chain($("chain-telling"), c, c.chains.telling ?? []);
  const same = JSON.stringify(c.chains.longest) === JSON.stringify(c.chains.telling);
  $("chain-telling").parentElement.hidden = same;
  const end = c.chains.telling?.at(-1);
  if (end !== undefined) $("telling-title").textContent = `The chain through most domains that ends in: ${words(c.kinds[c.events[end][2]]).toLowerCase()}`;
  $("cascade-tally").textContent = `${c.events.length.toLocaleString("en-GB")} events in ${c.domains.length} domains; the longest chain has ${(c.chains.longest ?? []).length} steps.` + (c.left_off ? ` The last ${c.left_off} events are not on this page.` : "");
  $("domain-legend").replaceChildren(...c.domains.map(chip));
  const children = new Map();
  c.events.forEach((e, id) => { if (!children.has(e[5])) children.set(e[5], []); children.get(e[5]).push(id); });
  const reach = new Int32Array(c.events.length);
  for (let id = c.events.length - 1; id >= 0; id--) if (c.events[id][5] >= 0) reach[c.events[id][5]] += 1 + reach[id];
  const leaf = (id) => {
    const e = c.events[id];
    const line = [...eventLine(c, e)];
    if (e[6] >= 0) line.push(viaNode(channelText(c, e)));
    if (e[7].length) line.push(make("span", { className: "count" }, ` (and ${e[7].length} other ${e[7].length === 1 ? "cause" : "causes"})`));
    return line;
  };
  const branch = (summary, fillIn, open = false) => {
    const inner = make("div"), node = make("details", { open }, make("summary", {}, ...summary), inner);
    let filled = false;
    const expand = () => { if (!filled && node.open) { filled = true; inner.append(...fillIn()); } };
    node.addEventListener("toggle", expand);
    expand();
    return node;
  };
  const one = (id, open = false) => children.has(id)
    ? branch([...leaf(id), make("span", { className: "count" }, `  ${reach[id].toLocaleString("en-GB")} followed`)], () => below(id, open), open)
    : make("div", { className: "leaf" }, ...leaf(id));
  const below = (id, open = false) => {
    const groups = new Map();
    for (const child of children.get(id) ?? []) {
      const key = `${c.events[child][1]}/${c.events[child][2]}`;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(child);
    }
    return [...groups.values()].map((g) => {
      if (g.length === 1) return one(g[0], open);
      g.sort((a, b) => reach[b] - reach[a]);
      const e = c.events[g[0]], followed = g.reduce((n, child) => n + reach[child], 0);
      const title = [make("time", {}, clock(Math.min(...g.map((child) => c.events[child][0])))), chip(c.domains[e[1]]), `${g.length} \u00d7 ${words(c.kinds[e[2]]).toLowerCase()}`];
      if (followed) title.push(make("span", { className: "count" }, `  ${followed.toLocaleString("en-GB")} followed`));
      return branch(title, () => {
        const shown = g.slice(0, 60).map((child) => one(child));
        if (g.length > 60) shown.push(make("div", { className: "leaf count" }, `and ${g.length - 60} more`));
        return shown;
      });
    });
  };
  const roots = (children.get(-1) ?? []).filter((id) => children.has(id)).sort((a, b) => reach[b] - reach[a]);
  const alone = (children.get(-1) ?? []).length - roots.length;
  const nodes = roots.slice(0, 40).map((id, i) => one(id, i === 0));
  if (alone || roots.length > 40) nodes.push(make("p", { className: "note" }, `${alone} ${alone === 1 ? "event" : "events"} without a cause or consequence${roots.length > 40 ? ` and ${roots.length - 40} smaller trees` : ""} left out here.`));
  $("tree").replaceChildren(...nodes);
  for (const body of document.querySelectorAll("#crossings tbody")) body.hidden = body.dataset.measure !== measure;
};
options($("cascade-measure"), data.focus);
$("cascade-measure").addEventListener("change", () => cascade($("cascade-measure").value));
if (kept.length) cascade(data.focus);

/* ---- crews ----------------------------------------------------------------------- */

for (const m of kept) {
  const bars = data.gantt[m.name];
  if (!bars.length) continue;
  const done = bars.filter((b) => b.state === "done").length;
  const families = [...new Set(bars.map((b) => b.family))].sort();
  const colours = Object.fromEntries(families.map((f, i) => [f, FAMILY_COLOURS[f] ?? SPARE[i % SPARE.length]]));
  const plot = make("div");
  const count = 1 + Math.max(...bars.map((b) => b.row));
  plot.style.height = `${Math.max(150, 26 * count + 60)}px`;
  const key = make("p", { className: "legend" }, ...families.map((f) => {
    const box = make("i");
    box.style.cssText = `border:0;height:12px;background:${colours[f]}`;
    const mine = bars.filter((b) => b.family === f);
    return make("span", { className: "key" }, box, `${f}: ${mine.length} begun, ${mine.filter((b) => b.state === "done").length} finished`);
  }));
  const crewsAt = new Map();
  for (const b of [...bars].sort((x, y) => x.start - y.start)) {
    const key = `${b.component} (${b.family.toLowerCase()}`;
    crewsAt.set(key, (crewsAt.get(key) ?? 0) + 1);
  }
  const first = [...crewsAt].slice(0, 12).map(([key, n]) => `${key}${n > 1 ? `, ${n} crews` : ""})`).join(", ");
  $("gantt").append(make("h3", {}, `${m.label} `, make("small", {}, `${bars.length} crew assignments, ${done} finished within ${data.hours} h; at most ${count} crews out at once`)), key, plot,
    make("p", { className: "note" }, `First sent to: ${first}.`));
  const traces = families.flatMap((f) => [["done", 1], ["recalled", .6], ["open", .4]].map(([status, opacity]) => {
    const mine = bars.filter((b) => b.family === f && b.state === status);
    return { type: "bar", orientation: "h", name: f, y: mine.map((b) => b.row + 1), x: mine.map((b) => b.end - b.start), base: mine.map((b) => b.start), width: .82,
      marker: { color: colours[f], opacity, line: { color: "#fff", width: 1 } }, text: mine.map((b) => b.component), textposition: "inside", insidetextanchor: "start", textangle: 0, constraintext: "inside", textfont: { size: 11, color: status === "open" || f === "Power" ? "#1c2733" : "#fff" },
      customdata: mine.map((b) => [b.component, b.start, b.end, { done: "finished", recalled: "called off", open: "not finished" }[status]]),
      hovertemplate: "%{customdata[0]}<br>hour %{customdata[1]:.1f} to %{customdata[2]:.1f}, %{customdata[3]}<extra>" + f + "</extra>" };
  })).filter((t) => t.x.length);
  Plotly.newPlot(plot, traces, layout({ barmode: "overlay", uniformtext: { minsize: 9, mode: "hide" }, margin: { l: 58, r: 12, t: 4, b: 40 }, shapes: shockLine(),
    xaxis: axis({ title: { text: "hours from the start", standoff: 4 }, range: [0, data.hours], dtick: data.hours > 30 ? 6 : undefined }),
    yaxis: axis({ autorange: "reversed", dtick: count > 20 ? 5 : 1, title: { text: "crew" }, showgrid: false }) }), CONFIG);
}
if (!$("gantt").childElementCount) $("gantt").append(make("p", {}, "No measure of this study sends crews."));

/* ---- sensitivity ----------------------------------------------------------------- */

for (const kpi of data.sensitivity?.charts ?? []) {
  const node = make("div", { className: "chart" });
  const plot = make("div");
  plot.style.height = `${70 + 34 * kpi.bars.length}px`;
  node.append(make("h3", {}, kpi.label, make("span", { className: "unit" }, kpi.unit ? `, ${kpi.unit}` : "")), plot);
  $("tornado").append(node);
  const names = kpi.bars.map((b) => `${b.label} (${tidy(b.low_value)} to ${tidy(b.high_value)}${b.unit ? " " + b.unit : ""})`);
  const side = (end, label, colour) => ({
    type: "bar", orientation: "h", name: label, y: names, base: kpi.bars.map((b) => b.base), x: kpi.bars.map((b) => b[end] - b.base), marker: { color: colour },
    customdata: kpi.bars.map((b) => [b[end], b[`${end}_value`]]), hovertemplate: `%{customdata[1]:,.4~g}: effect %{customdata[0]:,.4~g}<extra>${label}</extra>`,
  });
  Plotly.newPlot(plot, [side("low", "low end", "#56b4e9"), side("high", "high end", "#d55e00")],
    layout({ barmode: "overlay", showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { l: 20, r: 12, t: 26, b: 30 },
      shapes: [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: "#1c2733", width: 1.2, dash: "dot" } }],
      xaxis: axis({ tickformat: ",~g", zeroline: false }), yaxis: axis({ autorange: "reversed", tickfont: { size: 12 } }) }), CONFIG);
}
document.documentElement.dataset.ready = "yes";
})();
