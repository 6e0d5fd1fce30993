// Four views: Runs, Compare, Claims and one Run. What a view shows is in the URL's hash, so that a link
// holds it. A view is a function that returns its elements.

// --- Runs

const FIELDS = {
  status: (run) => run.status,
  seed: (run) => Object.values(run.seeds).map(show).join(", "),
  started: (run) => when(run.started),
  seconds: (run) => Math.round(run.seconds),
  "memory, MB": (run) => Math.round(run.peak_memory_bytes / 1e6),
  claims: (run) => run.claims.filter((claim) => claim.verdict === "holds").length,
  commit: (run) => (run.commit || "").slice(0, 8),
  gpu: (run) => ((run.hardware || {}).gpus || []).join(", "),
};
/** The value of a column: a field, `p:` and a parameter, or `m:` and a metric. */
function valueOf(run, column) {
  const values = { "p:": run.parameters, "m:": run.metrics }[column.slice(0, 2)];
  return values ? values[column.slice(2)] : FIELDS[column](run);
}

for (const run of RUNS) { // what a query looks at
  const named = (kind, values) => Object.keys(values).map((name) => [name.toLowerCase(), kind + name]);
  run.names = new Map([...named("m:", run.metrics), ...named("p:", run.parameters)]);
  const texts = [run.notebook, run.id, run.status, run.error, run.commit, ...Object.values(run.parameters).map(show)];
  run.text = texts.join(" ").toLowerCase();
}
const TESTS = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b };
TESTS["="] = (a, b) => a === b;
/** Whether a run has all words of a query; `rank>=8` asks for a parameter or metric. */
function matches(run, query) {
  return query.toLowerCase().split(/\s+/).filter(Boolean).every((word) => {
    const [, name, sign, wanted] = word.match(/^([^<>=]+)(<=|>=|=|<|>)(.+)$/) || [];
    if (!name) return run.text.includes(word);
    const key = run.names.get(name);
    if (key === undefined) return false;
    const value = valueOf(run, key);
    if (isNumber(value)) return TESTS[sign](value, Number(wanted));
    return sign === "=" && show(value).toLowerCase() === wanted;
  });
}

const FREE = ["resume", "save_steps"]; // these change no result
/** Runs that differ in nothing but their seeds, as lists. */
function groups(runs) {
  const key = ({ notebook, parameters, seeds }) => {
    const left = Object.entries(parameters).filter(([name]) => !(name in seeds) && !FREE.includes(name));
    return JSON.stringify([notebook, left.sort()]);
  };
  return [...Map.groupBy(runs, key).values()];
}
/** Names of parameters (or metrics) with several values among the runs of one notebook, or among all. */
function differing(runs, within = true, kind = "parameters") {
  const parts = within ? [...Map.groupBy(runs, (run) => run.notebook).values()] : [runs];
  const several = (part, name) => part.some((run) => !same(run[kind][name], part[0][kind][name]));
  return unique(runs.flatMap((run) => Object.keys(run[kind]))).filter((name) => parts.some((part) => several(part, name)));
}
/** Names of metrics, first those of quality, with several values, and of many runs. */
function frequent(runs, limit) {
  const names = runs.flatMap((run) => Object.keys(run.metrics).filter((name) => isNumber(run.metrics[name])));
  const varied = new Set(differing(runs, true, "metrics"));
  const ranked = [...Map.groupBy(names, (name) => name)].map(([name, all]) => {
    const quality = /accuracy|win|gold|perplexity|loss/i.test(name);
    return [name, all.length + RUNS.length * (varied.has(name) + 2 * quality)];
  });
  return ranked.sort((a, b) => b[1] - a[1]).slice(0, limit).map(([name]) => name);
}
/** The columns for these runs, where nobody has chosen any. */
function proposed(runs) {
  const parameters = differing(runs).filter((name) => !runs.some((run) => name in run.seeds));
  const about = ["status", "seed", "started", "seconds", "claims"];
  return [...about, ...parameters.slice(0, 6).map((name) => `p:${name}`), ...frequent(runs, 4).map((name) => `m:${name}`)];
}
/** Sorts rows by a column, falling with "-"; what is missing comes last. */
function sortRows(rows, order) {
  const [, falling, by] = (order || "").match(/^(-?)(.+)$/) || [];
  const key = (row) => (by === "notebook" ? row.members[0].notebook : row.cells.get(by)?.sort);
  if (!by) return;
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const found = isNumber(x) && isNumber(y) ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return falling ? -found : found;
  });
}

function runsView() {
  const chosen = new Set((state.runs || "").split(",").filter((id) => BY_ID.has(id)));
  const place = h("div"), compare = h("a", { class: "button" }), size = h("span", { "aria-live": "polite" });
  const picker = h("div", { class: "picker" }), chooser = folded("Columns", picker);
  let offer;
  chooser.addEventListener("toggle", () => offer());

  function mark(members, on) {
    for (const { id } of members) on ? chosen.add(id) : chosen.delete(id);
    set({ runs: [...chosen].join(",") });
    compare.textContent = chosen.size ? `Compare ${plural(chosen.size, "run")}` : "Tick runs to compare them";
    compare.classList.toggle("off", !chosen.size);
    if (chosen.size) compare.href = link("compare", { runs: state.runs, group: state.group });
    else compare.removeAttribute("href");
  }
  function head(name) {
    const sorted = { [name]: "ascending", [`-${name}`]: "descending" }[state.sort] || "none";
    const sort = () => {
      set({ sort: sorted === "ascending" ? `-${name}` : name });
      draw();
      [...place.querySelectorAll("th button")].find((button) => button.dataset.column === name)?.focus();
    };
    const arrow = h("span", { "aria-hidden": "true" }, { none: "", ascending: " ▲", descending: " ▼" }[sorted]);
    const button = h("button", { onclick: sort, "data-column": name }, name.replace(/^[pm]:/, ""), arrow);
    return h("th", { scope: "col", "aria-sort": sorted }, button);
  }
  function line({ members, cells }) {
    const [run] = members, checked = members.every(({ id }) => chosen.has(id));
    const box = checkbox({ "aria-label": `compare ${run.notebook} ${run.id}`, checked }, (on) => mark(members, on));
    const together = { href: link("compare", { runs: members.map(({ id }) => id).join(",") }) };
    const several = () => [h("a", together, run.notebook), small(` ${members.length} runs`)];
    const name = members.length > 1 ? several() : runLink(run, run.notebook);
    return h("tr", {}, h("td", { class: "tick" }, box), h("th", { scope: "row" }, name), [...cells].map(([column, cell]) => {
      if (column === "status") return h("td", {}, unique(members.map((member) => member.status)).map(badge));
      if (column === "claims") return h("td", {}, tally(members.flatMap(({ claims }) => claims)));
      return h("td", { class: cell.number ? "number" : null, title: cell.text.length > 24 ? cell.text : null }, cell.text);
    }));
  }
  function draw() {
    const wanted = (name, run) => !state[name] || run[name] === state[name];
    const shown = (run) => wanted("notebook", run) && wanted("status", run) && matches(run, state.q || "");
    const runs = RUNS.filter(shown), known = (name) => FIELDS[name] || /^[pm]:/.test(name);
    const columns = state.columns ? state.columns.split("~").filter(known) : proposed(runs);
    const rows = (state.group ? groups(runs) : runs.map((run) => [run])).map((members) => {
      const of = (name) => (name === "started" ? members.slice(0, 1) : members); // the newest
      const cell = (name) => [name, summary(of(name).map((run) => valueOf(run, name)))];
      return { members, cells: new Map(columns.map(cell)) };
    });
    sortRows(rows, state.sort);
    const body = h("tbody");
    const fill = (start) => { // 100 rows at a time, as one scrolls
      body.append(...rows.slice(start, start + 100).map(line));
      if (start + 100 < rows.length) lazy(body.lastChild, () => fill(start + 100));
    };
    fill(0);
    const checked = runs.length > 0 && runs.every(({ id }) => chosen.has(id));
    const all = checkbox({ "aria-label": "all runs of this table", checked }, (on) => {
      mark(runs, on);
      body.querySelectorAll("input").forEach((box) => (box.checked = on));
    });
    const heads = h("tr", {}, h("th", { class: "tick" }, all), ["notebook", ...columns].map(head));
    place.replaceChildren(scroll(h("table", { class: "runs" }, h("thead", {}, heads), body)));
    const grouped = state.group ? `${plural(rows.length, "group")} of ` : "";
    size.textContent = grouped + plural(runs.length, "run") + (runs.length < RUNS.length ? ` of ${RUNS.length}` : "");
    offer = () => picker.replaceChildren(...(chooser.open ? pick(runs, columns) : []));
    offer();
  }
  function pick(runs, columns) {
    const box = (kind, name) => tick(name, columns.includes(kind + name), (on) => {
      const others = columns.filter((other) => other !== kind + name);
      set({ columns: [...others, ...(on ? [kind + name] : [])].join("~") });
      draw();
    });
    const list = (title, kind, names) => h("fieldset", {}, h("legend", {}, title), names.map((name) => box(kind, name)));
    return [
      h("button", { onclick: () => (set({ columns: "" }), draw()) }, "Choose for me"),
      list("About the run", "", Object.keys(FIELDS)),
      list("Parameters", "p:", unique(runs.flatMap((run) => Object.keys(run.parameters)))),
      list("Metrics", "m:", frequent(runs, Infinity)),
    ];
  }
  const type = (event) => (set({ q: event.target.value }), draw());
  const about = { type: "search", id: "search", placeholder: "lora rank>=8", value: state.q || "", oninput: type };
  const group = tick("Group over seeds", state.group, (on) => (set({ group: on ? 1 : "" }), mark([]), draw()));
  const choices = [chooseOne("Notebook", "notebook", draw), chooseOne("Status", "status", draw), group];
  draw();
  mark([]);
  return [h("div", { class: "controls" }, field("Search", h("input", about)), choices, chooser, compare, size), place];
}

// --- Compare

function compareView() {
  const runs = (state.runs || "").split(",").map((id) => BY_ID.get(id)).filter(Boolean);
  if (!runs.length) {
    return [h("p", {}, "Tick runs in ", h("a", { href: "#runs" }, "Runs"), " to see here what differs between them.")];
  }
  const lists = state.group ? groups(runs) : runs.map((run) => [run]);
  const entries = columnsOf(lists.slice(0, MOST), differing(runs, false));
  const head = (first) => [first, ...entries.map(columnHead)];
  const flip = (on) => (set({ group: on ? 1 : "" }), render());
  const others = h("a", { href: link("runs", { runs: state.runs, group: state.group }) }, "Choose others");
  const drawn = unique(runs.flatMap((run) => Object.keys(run.curves)));
  const claims = claimRows(runs, entries);
  const tables = unique(runs.flatMap((run) => Object.keys(run.tables))).sort((a, b) => isText(b) - isText(a));
  return [
    h("div", { class: "controls" }, tick("Group over seeds: mean ± standard deviation", state.group, flip), others),
    lists.length > MOST && h("p", { class: "note" }, `The first ${MOST} of ${lists.length} are shown.`),
    parameterTables(runs, entries, head),
    ...metricTables(runs, entries, head),
    drawn.length > 0 && section("Curves", curves(entries, drawn.map((name) => [name, [name]]))),
    claims.length > 0 && section("Claims", table(head("claim"), claims)),
    tables.length > 0 && section("Texts and tables", tables.map((name, i) => {
      const part = h("details", { open: i === 0 && isText(name) }, h("summary", {}, name));
      const fill = () => part.open && part.children.length === 1 && part.append(abreast(name, entries));
      part.addEventListener("toggle", fill);
      fill();
      return part;
    })),
  ];
}
/** Of each list of runs: its number, letter, and a label of what differs. */
function columnsOf(lists, differ) {
  const runs = lists.flat(), notebooks = unique(runs.map((run) => run.notebook));
  const notable = differ.filter((name) => !runs.some((run) => name in run.seeds));
  return lists.map((members, number) => {
    const { parameters, seeds, notebook } = members[0], letter = String.fromCharCode(65 + number);
    const names = notable.length || state.group ? notable.slice(0, 2) : Object.keys(seeds);
    const about = names.filter((name) => name in parameters).map((name) => `${name} ${show(parameters[name])}`);
    const label = [letter, ...(notebooks.length > 1 ? [notebook] : []), ...about].join(" · ");
    return { runs: members, number, letter, label };
  });
}
function columnHead({ runs: [run, ...others], number, label }) {
  const mark = h("span", { class: "swatch", "aria-hidden": "true" });
  mark.style.background = COLOURS[number % COLOURS.length];
  const where = others.length ? plural(others.length + 1, "run") : runLink(run, when(run.started));
  return h("span", {}, mark, label, h("br"), small(where));
}
const valuesIn = (entries, kind, name) => entries.map(({ runs }) => runs.map((run) => run[kind][name]));
const rowsIn = (entries, kind, names) => names.map((name) => [name, ...valuesIn(entries, kind, name).map(summary)]);

function parameterTables(runs, entries, head) {
  const differ = differing(runs, false);
  const equal = Object.entries(runs[0].parameters).filter(([name]) => !differ.includes(name));
  const first = differ.length ? table(head("that differ"), rowsIn(entries, "parameters", differ)) : h("p", {}, "All are equal.");
  const rest = equal.length > 0 && folded(plural(equal.length, "equal parameter"), pairs(Object.fromEntries(equal)));
  return section("Parameters", first, rest);
}
function metricTables(runs, entries, head) {
  const signed = (value) => (value > 0 ? "+" : "") + show(value);
  const line = (name) => {
    const [first, ...others] = valuesIn(entries, "metrics", name).map(summary);
    return [name, first, ...others.map((other) => {
      if (!isNumber(first.sort) || !isNumber(other.sort)) return other;
      const change = other.sort - first.sort;
      const share = first.sort ? ` (${signed(Math.round((1000 * change) / Math.abs(first.sort)) / 10)} %)` : "";
      return h("div", { class: "number" }, other.text, h("br"), small(signed(change) + share));
    })];
  };
  const names = unique(runs.flatMap((run) => Object.keys(run.metrics)));
  const having = (name) => valuesIn(entries, "metrics", name).filter((values) => values.some((value) => value != null));
  const shared = names.filter((name) => having(name).length > 1 || entries.length === 1);
  const single = names.filter((name) => !shared.includes(name)), title = "of one column only";
  const note = entries.length > 1 && h("p", {}, small("Below a value: its difference from the first column."));
  return [
    shared.length > 0 && section("Metrics", note, table(head("metric"), shared.map(line))),
    single.length > 0 &&
      folded(`${plural(single.length, "metric")} ${title}`, table(head("metric"), rowsIn(entries, "metrics", single))),
  ];
}
function claimRows(runs, entries) {
  const all = runs.flatMap(({ claims, notebook }) => claims.map((claim) => ({ ...claim, notebook })));
  const found = Map.groupBy(all, ({ notebook, number }) => `${notebook} ${number}`);
  return [...found.values()].map(([{ number, claim, notebook }]) => [
    h("span", {}, `${number} · ${claim}`),
    ...entries.map(({ runs: members }) => {
      const own = members.filter((run) => run.notebook === notebook).flatMap((run) => run.claims);
      const judged = own.filter((other) => other.number === number);
      const one = (c) => [verdict(c.verdict), h("br"), small(show(c.value))];
      return h("div", {}, judged.length > 1 ? tally(judged) : judged.map(one));
    }),
  ]);
}
/** One table of all entries: rows meet by their first column, and what is equal everywhere stands once. */
function abreast(name, entries) {
  const having = entries.filter(({ runs }) => runs[0].tables[name]?.length);
  const rows = new Map(having.map((entry) => [entry, entry.runs[0].tables[name]]));
  const [first, ...columns] = unique([...rows.values()].flat().flatMap(Object.keys));
  const keys = unique([...rows.values()].flat().map((row) => row[first]));
  const find = (entry, key) => rows.get(entry).find((row) => row[first] === key);
  const known = (key) => having.map((entry) => find(entry, key)).filter(Boolean);
  const agree = (column) => keys.every((key) => known(key).every((row) => same(row[column], known(key)[0][column])));
  const layout = columns.flatMap((column) => (agree(column) ? [[column]] : having.map((entry) => [column, entry])));
  const cell = (key, column, entry) => (entry ? find(entry, key) : known(key)[0])?.[column];
  const body = keys.map((key) => [key, ...layout.map(([column, entry]) => cell(key, column, entry))]);
  const titles = layout.map(([column, entry]) => (entry ? `${column} · ${entry.letter}` : column));
  const several = entries.some(({ runs }) => runs.length > 1);
  const note = `What is equal in all runs stands once.${several ? " Of several seeds, the newest run is shown." : ""}`;
  return h("div", {}, h("p", {}, small(note)), table([first, ...titles], body));
}

// --- Claims

function claimsView() {
  const place = h("div");
  const draw = () => {
    const judged = RUNS.filter((run) => run.claims.length && (!state.notebook || run.notebook === state.notebook));
    const parts = [...Map.groupBy(judged, (run) => run.notebook)].sort(([a], [b]) => a.localeCompare(b));
    const content = state.all ? parts.map(matrix) : newest(parts);
    place.replaceChildren(...(parts.length ? content : [h("p", {}, "No run has recorded a claim yet.")]));
  };
  const options = [["", "newest run of each notebook"], ["1", "all runs and seeds"]];
  const shown = choice("Show", options, state.all && "1", (all) => (set({ all }), draw()));
  draw();
  return [h("div", { class: "controls" }, chooseOne("Notebook", "notebook", draw), shown), place];
}
function newest(parts) {
  const found = parts.flatMap(([, runs]) => {
    const run = runs.find(({ status }) => status === "finished") || runs[0];
    const all = ({ number }) => runs.flatMap(({ claims }) => claims).filter((claim) => claim.number === number);
    return run.claims.map((claim) => ({ claim, run, all: all(claim) }));
  });
  found.sort((a, b) => a.claim.number - b.claim.number);
  const counts = counted(found.map(({ claim }) => claim));
  const sums = counts.map(([word, n]) => h("span", {}, h("b", {}, String(n)), " ", verdict(word)));
  const rows = found.map(({ claim, run, all }) => [
    ...claimCells(claim),
    h("span", {}, all.length > 1 && tally(all)),
    runLink(run, run.notebook),
  ]);
  return [h("p", { class: "sum" }, sums), table([...CLAIM_HEADS, "all runs", "run"], rows, { class: "claims" })];
}
const CLAIM_HEADS = ["#", "verdict", "claim", "measured", "how"];
function claimCells({ number, verdict: word, claim, value, how, source }) {
  return [number, verdict(word), claim, value, source ? `${how} (decided by: ${source})` : how];
}

/** Of one notebook: a row for each claim, a column for each run. */
function matrix([notebook, runs]) {
  const shown = state.all === "2" ? runs : runs.slice(0, MOST);
  const claims = [...Map.groupBy(runs.flatMap((run) => run.claims), ({ number }) => number)].sort(([a], [b]) => a - b);
  const heads = shown.map((run) => {
    const seeds = Object.entries(run.seeds).map(([name, value]) => `${name} ${show(value)}`);
    return h("span", {}, runLink(run, when(run.started).slice(5)), h("br"), small(seeds.join(", ")));
  });
  const cell = (run, number) => {
    const found = run.claims.find((claim) => claim.number === number);
    const sign = found ? verdict(found.verdict, shown.length > 6) : h("span");
    if (found) sign.title = `${found.verdict}: ${show(found.value)}`;
    return sign;
  };
  const rows = claims.map(([number, all]) => {
    const name = h("span", {}, `${number} · ${all[0].claim}`);
    return [name, h("span", {}, tally(all)), ...shown.map((run) => cell(run, number))];
  });
  const every = h("button", { onclick: () => (set({ all: "2" }), render()) }, `Show all ${runs.length} runs`);
  const content = table(["claim", "all runs", ...heads], rows, { class: "matrix" });
  return section(notebook, content, runs.length > shown.length && every);
}

// --- One run

function runView() {
  const run = BY_ID.get(state.id);
  if (!run) return [h("p", {}, `No run ${state.id || ""} in this page.`)];
  const earlier = RUNS.slice(RUNS.indexOf(run) + 1).find(({ notebook }) => notebook === run.notebook);
  const both = link("compare", { runs: earlier && `${run.id},${earlier.id}` });
  const checks = Object.entries(run.checks || {}).map(([name, { passed, found }]) => {
    const sign = h("span", { class: `verdict ${passed ? "good" : "bad"}` }, passed ? "✔ passed" : "✘ failed");
    return [name, sign, show(found).slice(0, 200)];
  });
  const figures = [...Map.groupBy(Object.keys(run.curves), (name) => name.split("/").at(-1))]; // full/loss and lora/loss
  const tables = Object.entries(run.tables).sort(([a], [b]) => isText(b) - isText(a));
  const claims = () => section("Claims", table(CLAIM_HEADS, run.claims.map(claimCells), { class: "claims" }));
  const metrics = Object.keys(run.metrics).length > 0 && section("Metrics", pairs(run.metrics));
  const costs = h("div", {}, section("Files", fileList(run)), section("Cost", ...costsOf(run)));
  return [
    h("h1", {}, run.notebook, " ", badge(run.status)),
    h("p", {}, run.id, earlier && [" · ", h("a", { href: both }, "compare with the run before")]),
    run.error && h("pre", { class: "error" }, run.error),
    run.claims.length > 0 && claims(),
    figures.length > 0 && section("Curves", curves([{ runs: [run], number: 0, label: run.notebook }], figures)),
    h("div", { class: "columns" }, metrics, section("Parameters", pairs(run.parameters)), costs),
    checks.length > 0 && section("Checks", table(["check", "result", "found"], checks)),
    h("div", { class: "columns" }, tables.map(([name, rows]) => section(name, rows.length ? records(rows) : "no rows"))),
  ];
}
function fileList(run) {
  const files = run.files.map((name) => h("li", {}, h("a", { href: path(run.place, name) }, name)));
  const made = run.artifacts.map(({ name, kind, parents, bytes }) => {
    const origin = parents.length ? `, from ${parents.join(" + ")}` : "";
    return h("li", {}, h("a", { href: path(run.place, name) }, name), ` ${kind}, ${show(bytes / 1e6)} MB${origin}`);
  });
  return h("ul", {}, files, made);
}
function costsOf(run) {
  const timings = Object.entries(run.timings || {}).map(([name, value]) => [`${name}, s`, value]);
  const facts = { started: when(run.started), seconds: run.seconds, "peak memory, MB": run.peak_memory_bytes / 1e6 };
  const { memory_bytes: memory, ...machine } = run.hardware || {};
  const hardware = { ...machine, ...(memory && { "memory, GB": memory / 1e9 }) };
  return [
    pairs({ ...facts, ...Object.fromEntries(timings), commit: (run.commit || "").slice(0, 12) }),
    folded("Hardware", pairs(hardware)),
    folded("Versions", pairs(run.versions || {})),
  ];
}

// --- The page

const VIEWS = {
  runs: ["Runs", runsView],
  compare: ["Compare", compareView],
  claims: ["Claims", claimsView],
  run: ["Run", runView],
};
function render() {
  const [view, query] = location.hash.slice(1).split("?");
  state = { view: VIEWS[view] ? view : "runs", ...Object.fromEntries(new URLSearchParams(query)) };
  dropCharts();
  const [title, draw] = VIEWS[state.view];
  main.replaceChildren(...draw().filter(Boolean));
  document.title = `labkit: ${state.id || title}`;
  const kept = { runs: state.runs, group: state.group }; // a choice of runs goes with one
  const links = Object.entries(VIEWS).slice(0, 3).map(([name, [text]]) => {
    const current = name === state.view ? "page" : null;
    return h("a", { href: link(name, name === "claims" ? {} : kept), "aria-current": current }, text);
  });
  document.querySelector("nav").replaceChildren(...links);
}
document.getElementById("about").textContent = plural(RUNS.length, "run");
addEventListener("hashchange", () => {
  render();
  main.focus({ preventScroll: true });
  scrollTo(0, 0);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector(".controls details[open]")?.removeAttribute("open");
  if (event.key !== "/" || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  event.preventDefault();
  if (state.view !== "runs") location.hash = "#runs";
  setTimeout(() => document.getElementById("search")?.focus());
});
render();
