"use strict";
// What the views of views.js are made of: elements, values, tables and curves. What comes from a
// record is put into the page as text, never as HTML.

const RUNS = JSON.parse(document.getElementById("data").textContent).runs.reverse(); // newest first
const BY_ID = new Map(RUNS.map((run) => [run.id, run]));
const VERDICTS = [
  ["holds", "✔", "good"],
  ["holds in part", "◐", "part"],
  ["does not hold here", "✘", "bad"],
  ["undecided", "?", "open"],
  ["not measured here", "–", "open"],
];
const COLOURS = "#5790fc #f89c20 #e42536 #964a8b #9c9ca1 #7a21dd".split(" "); // petroff6
const DASHES = [[], [7, 4], [2, 3]];
const MOST = 24; // columns of a comparison
const main = document.getElementById("main");
let state = {};
let charts = [];

// --- Elements, values, links

/** An element with attributes, listeners (`onclick`) and children; strings become text. */
function h(tag, about = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

const unique = (values) => [...new Set(values)];
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const isNumber = (value) => typeof value === "number";
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

const FOUR_DIGITS = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }); // slow to make
function show(value) {
  if (isNumber(value)) {
    const small = value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e12);
    return small ? value.toExponential(2) : FOUR_DIGITS.format(value);
  }
  return value == null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
}

const when = (time) => (time || "").slice(0, 16).replace("T", " ");
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
function deviation(values) {
  const centre = mean(values);
  return Math.sqrt(values.reduce((sum, v) => sum + (v - centre) ** 2, 0) / (values.length - 1));
}

/** Values of one column over the runs of a row: as a mean ± standard deviation where they are numbers. */
function summary(values) {
  const known = values.filter((value) => value != null && value !== "");
  if (known.length > 1 && known.every(isNumber)) {
    const spread = same(Math.min(...known), Math.max(...known)) ? "" : ` ± ${deviation(known).toPrecision(2)}`;
    return { sort: mean(known), text: show(mean(known)) + spread, number: true };
  }
  const texts = unique(known.map(show)).sort();
  return { sort: known.length > 1 ? texts.join() : known[0], text: texts.join(", "), number: known.every(isNumber) };
}

const path = (...parts) => "./" + parts.join("/").split("/").map(encodeURIComponent).join("/");
function link(view, values = {}) {
  const kept = Object.entries(values).filter(([name, value]) => value && name !== "view");
  return `#${view}${kept.length ? "?" + new URLSearchParams(kept) : ""}`;
}
/** Changes the view's state without a new entry in the browser's history. */
function set(changes) {
  Object.assign(state, changes);
  history.replaceState(null, "", link(state.view, state));
}
const runLink = (run, text = run.id) => h("a", { href: link("run", { id: run.id }) }, text);
const small = (...content) => h("small", {}, content);
const badge = (status) => h("span", { class: `status ${status}` }, status);
function verdict(word, bare = false) {
  const [, sign, kind] = VERDICTS.find(([name]) => name === word) || [word, "?", "open"];
  const name = h("span", { class: bare ? "hidden" : null }, word);
  return h("span", { class: `verdict ${kind}`, title: word }, `${sign} `, name);
}
/** [verdict, how many claims have it] of those that occur. */
const counted = (claims) =>
  VERDICTS.map(([word]) => [word, claims.filter((claim) => claim.verdict === word).length]).filter(([, n]) => n);
const tally = (claims) =>
  counted(claims).map(([word, n]) => [verdict(word, true), h("small", { class: "count" }, `${n} `)]);

// --- Tables

/** A table of rows of cells; a cell is a value, a summary or an element. The first column is the row's head. */
function table(columns, rows, about = {}) {
  const fill = (value, tag) => {
    if (value instanceof Node) return h(tag, {}, value);
    const { text, number } = value && value.text !== undefined ? value : { text: show(value), number: isNumber(value) };
    return h(tag, { class: number ? "number" : text.length > 40 || text.includes("\n") ? "long" : null }, text);
  };
  const head = columns.map((name) => h("th", { scope: "col" }, name));
  const body = rows.map(([first, ...others]) => {
    const start = fill(first, "th");
    start.scope = "row";
    return h("tr", {}, start, others.map((value) => fill(value, "td")));
  });
  return scroll(h("table", about, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}
const scroll = (content) => h("div", { class: "scroll" }, content);
const pairs = (values, columns = ["name", "value"]) => table(columns, Object.entries(values));
const records = (rows) => {
  const columns = unique(rows.flatMap(Object.keys));
  return table(columns, rows.map((row) => columns.map((name) => row[name])));
};
const section = (title, ...content) => h("section", {}, h("h2", {}, title), content);
const folded = (title, ...content) => h("details", {}, h("summary", {}, title), content);
const isText = (name) => name.startsWith("samples"); // what a notebook showed side by side
const field = (text, input) => h("label", { class: "field" }, `${text} `, input);
const checkbox = (about, change) =>
  h("input", { type: "checkbox", ...about, onchange: (event) => change(event.target.checked) });
const tick = (text, checked, change) => h("label", {}, checkbox({ checked }, change), ` ${text}`);
function choice(text, options, chosen, change) {
  const choices = options.map(([value, shown]) => h("option", { value, selected: value === chosen }, shown));
  return field(text, h("select", { onchange: (event) => change(event.target.value) }, choices));
}
/** A choice of one of the values that the runs have under `name`, or all. */
function chooseOne(text, name, redraw) {
  const values = unique(RUNS.map((run) => run[name])).sort();
  const options = [["", "all"], ...values.map((value) => [value, value])];
  return choice(text, options, state[name], (value) => (set({ [name]: value }), redraw()));
}

// --- Curves

/** Draws what is inside `node` when it comes near the screen. */
function lazy(node, draw) {
  const watcher = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watcher.disconnect();
    if (node.isConnected) draw(node);
  }, { rootMargin: "400px" });
  watcher.observe(node);
  return node;
}

/** Exponential mean of the values so far, without the pull towards a start of 0. */
function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = sum * weight + value;
    total = total * weight + 1;
    return sum / total;
  });
}

/** Of runs of one group: steps, mean, and mean ± standard deviation where there are several. */
function curve(runs, name) {
  const lines = runs.filter((run) => run.curves[name]).map((run) => {
    const [steps, values] = run.curves[name];
    return [run.steps[steps], smoothed(values, Number(state.smooth || 0))];
  });
  if (lines.length < 2) return lines[0];
  const [steps, ...all] = uPlot.join(lines);
  const known = steps.map((_, i) => all.map((values) => values[i]).filter((value) => value != null));
  const at = steps.map((_, i) => i).filter((i) => known[i].length === lines.length); // steps that all runs have
  const spread = at.map((i) => deviation(known[i]));
  const centre = at.map((i) => mean(known[i]));
  return [at.map((i) => steps[i]), centre, centre.map((c, i) => c + spread[i]), centre.map((c, i) => c - spread[i])];
}

function dropCharts() {
  charts.forEach((drawn) => drawn.destroy());
  charts = [];
}

/** A figure of curves: [{label, colour, dash, points: [steps, values, high?, low?]}]. */
function figure(title, lines) {
  const ends = lines.map(({ label, points: [x, y] }) => {
    return `${label}: ${show(y[0])} at step ${x[0]} to ${show(y.at(-1))} at step ${x.at(-1)}`;
  });
  const place = h("div", { class: "plot", role: "img", "aria-label": `${title}. ${ends.join("; ")}` });
  return h("figure", {}, h("figcaption", {}, title), lazy(place, () => {
    const positive = lines.every(({ points: [, y] }) => y.some((value) => value > 0));
    const log = state.log && positive;
    const drawable = (values) => (log ? values.map((value) => (value > 0 ? value : null)) : values);
    const columns = lines.map(({ points: [steps, ...values] }) => [steps, ...values.map(drawable)]);
    const series = [{ label: "step" }], bands = [];
    for (const { label, colour, dash, points } of lines) {
      const value = (_, found) => show(found) || "–";
      const marks = { points: { show: points[0].length < 3 }, spanGaps: true };
      series.push({ label, stroke: colour, dash, width: 1.5, value, ...marks });
      if (points.length < 4) continue;
      bands.push({ series: [series.length, series.length + 1], fill: colour + "28" });
      const edge = { stroke: "transparent", class: "band", points: { show: false } };
      series.push({ label: `${label} high`, ...edge }, { label: `${label} low`, ...edge });
    }
    const line = { stroke: "#8884", width: 0.5 };
    const axis = { stroke: getComputedStyle(document.body).color, grid: line, ticks: line };
    const y = { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : show(tick))) };
    const options = {
      width: place.clientWidth, height: 240, series, bands, axes: [{ ...axis, size: 32 }, y],
      scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
      cursor: { sync: { key: "step" }, points: { size: 7 } },
    };
    const drawn = new uPlot(options, uPlot.join(columns), place);
    charts.push(drawn);
    const fit = () => place.clientWidth && drawn.setSize({ width: place.clientWidth, height: 240 });
    new ResizeObserver(fit).observe(place);
  }));
}

/** Figures of the curves of `entries`, [title, names of curves] each, and how all of them are drawn. */
function curves(entries, figures) {
  const place = h("div", { class: "figures" }), others = h("div", { class: "figures" });
  const one = ([title, names]) => {
    const found = names.flatMap((name) => entries.map((entry) => ({ ...entry, name, points: curve(entry.runs, name) })));
    const lines = found.filter(({ points }) => points).map(({ name, number, label, points }, i) => {
      const [n, text] = names.length > 1 ? [i, name.slice(0, -title.length - 1)] : [number, label];
      const dash = DASHES[(n + Math.floor(n / COLOURS.length)) % DASHES.length];
      return { label: text, points, colour: COLOURS[n % COLOURS.length], dash };
    });
    return figure(title, lines);
  };
  const draw = () => {
    dropCharts();
    place.replaceChildren(...figures.slice(0, 6).map(one));
    others.replaceChildren(...figures.slice(6).map(one));
  };
  const slide = (event) => (set({ smooth: Number(event.target.value) || "" }), draw());
  const range = { type: "range", min: 0, max: 0.95, step: 0.05, value: state.smooth || 0, oninput: slide };
  const log = tick("Logarithmic", state.log, (on) => (set({ log: on ? 1 : "" }), draw()));
  const hint = small("Drag to zoom, double click to go back, click a name to hide its curve.");
  const more = figures.length > 6 && folded(plural(figures.length - 6, "more curve"), others);
  draw();
  return [h("div", { class: "controls" }, field("Smoothing", h("input", range)), log, hint), place, more];
}
