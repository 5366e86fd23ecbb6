// What the page says, from the numbers in the script element `report`.
"use strict";

const report = JSON.parse(document.getElementById("report").textContent);
const find = (id) => document.getElementById(id);
const KINDS = {
  latency_ms: { label: "Latency", unit: "ms", flag: "--latency-ms" },
  size_mb: { label: "Size", unit: "MB", flag: "--size-mb" },
  energy_mj: { label: "Energy", unit: "mJ", flag: "--energy-mj" },
  max_drift: { label: "Drift", unit: "2-norm", flag: "--max-drift" },
};
const state = { target: report.targets[0], kind: "latency_ms", budget: 0, picked: null };
const short = (source) => source.split(":")[0].split(" ")[0];
// Where it was not measured, the manifest goes on to say why.
const energySource = (cost) => (cost.energy_source || "unknown").split(";")[0];
const measured = (cost) => cost.latency_source.startsWith("measured");

// The runtime's rule (runtime.choose): the last profile whose need is within the budget; of a drift the first whose
// certified bound is. -1 where there is none.
function choose(costs, kind, budget) {
  if (kind === "max_drift") return costs.findIndex((cost) => cost.drift_bound !== null && cost.drift_bound <= budget);
  return costs.findLastIndex((cost) => cost.needs[kind] <= budget);
}

// The limits at which the choice changes, by profile: what each needs of `kind`.
function thresholds(costs, kind) {
  const needs = costs.map((cost) => (kind === "max_drift" ? cost.drift_bound : cost.needs[kind]));
  return needs.filter((need) => need !== null && (kind !== "max_drift" || need > 0));
}

// The least number of four digits that is no lower.
function above(value) {
  const rounded = Number(value.toPrecision(4));
  const step = 10 ** (Math.floor(Math.log10(value)) - 3);
  return rounded >= value ? rounded : Number((Math.ceil(value / step) * step).toPrecision(4));
}

function sliderScale() {
  const needs = thresholds(state.target.costs, state.kind);
  return around(needs, 0.1);
}

function drawKinds() {
  const usable = Object.keys(KINDS).filter((kind) => thresholds(state.target.costs, kind).length);
  if (!usable.includes(state.kind)) state.kind = usable[0];
  const choices = usable.map((kind) => {
    const input = html("input", { type: "radio", name: "kind", value: kind });
    input.checked = kind === state.kind;
    input.addEventListener("change", () => { state.kind = kind; startBudget(); });
    return html("label", {}, input, html("span", {}, KINDS[kind].label));
  });
  find("kinds").replaceChildren(html("legend", { class: "hidden" }, "Limit"), ...choices);
}

// A budget for the middle profile, so that both directions are there to try.
function startBudget() {
  const needs = [...thresholds(state.target.costs, state.kind)].sort((a, b) => a - b);
  setBudget(above(needs[Math.floor((needs.length - 1) / 2)]));
  drawStrip();
}

function setBudget(budget, from) {
  const picked = choose(state.target.costs, state.kind, budget), changed = picked !== state.picked || from === undefined;
  Object.assign(state, { budget, picked });
  const axis = sliderScale();
  if (from !== "amount") find("amount").value = budget;
  if (from !== "slider") find("slider").value = 400 * Math.min(1, Math.max(0, budget > 0 ? axis.at(budget) : 0));
  const { unit } = KINDS[state.kind], name = state.picked < 0 ? "no profile fits" : report.profiles[state.picked].name;
  find("slider").setAttribute("aria-valuetext", `${number(budget, 4)} ${unit}: ${name}`);
  find("unit").textContent = unit;
  drawPicked();
  if (changed) drawProfile();
}

function drawStrip() {
  const axis = sliderScale();
  const edges = [axis.low, ...thresholds(state.target.costs, state.kind).filter((need) => need > axis.low), axis.high].sort((a, b) => a - b);
  const parts = [];
  for (let index = 0; index + 1 < edges.length; index++) {
    const picked = choose(state.target.costs, state.kind, edges[index]);
    const last = parts.at(-1);
    if (last && last.picked === picked) last.to = edges[index + 1];
    else parts.push({ picked, from: edges[index], to: edges[index + 1] });
  }
  find("strip").replaceChildren(...parts.map(({ picked, from, to }) => {
    const name = picked < 0 ? "–" : report.profiles[picked].name;
    const part = html("div", { "data-picked": picked, class: picked < 0 ? "none" : null, style: `flex-basis:${100 * (axis.at(to) - axis.at(from))}%` }, name);
    part.addEventListener("click", () => setBudget(above(from)));
    return part;
  }));
  markStrip();
}

function markStrip() {
  for (const part of find("strip").children) part.classList.toggle("on", Number(part.dataset.picked) === state.picked);
}

function ruleText() {
  const cost = state.target.costs[0], margin = `${Math.round(100 * (report.margin - 1))}%`;
  const latency = measured(cost)
    ? `whose 90th percentile latency, with a margin of ${margin}, is within the limit`
    : `whose estimated latency (${cost.latency_source}) is within the limit`;
  return {
    latency_ms: `The runtime picks the greatest profile ${latency}.`,
    size_mb: "The runtime picks the greatest profile whose weights, at its own ranks and widths, are within the limit.",
    energy_mj: `The runtime picks the greatest profile whose energy a call is within the limit (${energySource(cost)}).`,
    max_drift: "The runtime picks the least profile whose certified drift (conformal, 2-norm) is within the limit.",
  }[state.kind];
}

function quality(profile) {
  return profile.quality[report.quality];
}

function drawPicked() {
  const { target, kind, budget, picked } = state, { unit, flag } = KINDS[kind], out = find("picked");
  find("rule").textContent = ruleText();
  out.dataset.profile = picked < 0 ? "" : report.profiles[picked].name;
  if (picked < 0) {
    const least = Math.min(...thresholds(target.costs, kind));
    const name = report.profiles[choose(target.costs, kind, least)].name;
    out.replaceChildren(html("span", { class: "none" },
      `No profile fits. The least ${KINDS[kind].label.toLowerCase()} that can be had is ${number(above(least), 4)} ${unit}, with ${name}.`));
    return;
  }
  const profile = report.profiles[picked], cost = target.costs[picked];
  const facts = [
    [report.quality === "accuracy" ? "accuracy" : "same class as the full model", percent(quality(profile), 2)],
    [measured(cost) ? "latency, 90th percentile" : "latency, estimated", `${number(cost.latency_ms)} ms`],
    ["size", `${number(profile.size_mb)} MB`],
    ["energy a call", `${number(cost.energy_mj)} mJ`],
    ["drift bound", number(cost.drift_bound ?? profile.bound)],
  ];
  out.replaceChildren(
    html("span", { class: "name" }, profile.name),
    ...facts.map(([what, value]) => html("dl", {}, html("dt", {}, what), html("dd", {}, value))),
    html("div", { class: "how" }, html("code", {}, `session.set_budget(t3c.Budget(${kind}=${budget}))`), html("code", {}, `t3c-compile run ${report.name} ${flag} ${budget}`)),
  );
}

// The rows of layers, made once; what a profile makes of them is set in `drawLayers`, so that the bars move.
function makeLayers() {
  const rows = report.layers.map((name, layer) => {
    const outline = html("b"), row = html("div", { class: "layer", role: "listitem" },
      html("code", {}, html("bdi", {}, name)), html("span", { class: "what" }),
      html("span", { class: "bar rank" }, html("i"), outline), html("span", { class: "number" }),
      html("span", { class: "bar bits" }, html("i")), html("span", { class: "what" }));
    const most = greatestRank(layer);
    outline.style.width = `${(100 * most) / Math.max(...report.layers.map((_, index) => greatestRank(index)), 1)}%`;
    outline.hidden = most === 0;
    return tip(row, name, () => [`${row.dataset.form}${row.dataset.form === "dense" ? "" : `, rank ${row.dataset.rank} of ${most}`}, ${row.dataset.bits} bits`]);
  });
  find("layers").replaceChildren(...rows);
}
const greatestRank = (layer) => Math.max(...report.profiles.map((profile) => profile.options[layer].rank));

function drawLayers() {
  const widest = Math.max(...report.profiles.at(-1).options.map((option) => option.bits));
  const most = Math.max(...report.layers.map((_, layer) => greatestRank(layer)), 1);
  const chosen = report.profiles[Math.max(0, state.picked)].options;
  find("layers").classList.toggle("off", state.picked < 0);
  [...find("layers").children].forEach((row, layer) => {
    const { form, rank, bits } = chosen[layer], dense = form === "dense";
    const [, what, ranks, length, widths, width] = row.children;
    Object.assign(row.dataset, { form, rank, bits });
    what.textContent = form;
    ranks.classList.toggle("dense", dense);
    ranks.firstChild.style.width = `${dense ? 100 : (100 * rank) / most}%`;
    length.textContent = dense ? "" : rank;
    widths.firstChild.style.width = `${(100 * bits) / widest}%`;
    width.textContent = `${bits} bit`;
  });
}

function drawTable() {
  const { costs } = state.target, accuracy = report.quality === "accuracy";
  const conformal = costs.some((cost) => cost.drift_bound !== null);
  const columns = [
    ["profile", false, (profile) => [profile.name]],
    ["ranks", false, (profile) => [profile.rank]],
    ["layers × bits", false, (profile) => [profile.bits.replaceAll("x", "×")]],
    ["size, MB", true, (profile) => [padded(profile.size_mb)]],
    ["latency, ms", true, (profile, cost) => [padded(cost.latency_ms), short(cost.latency_source)]],
    ["energy, mJ", true, (profile, cost) => [padded(cost.energy_mj), short(energySource(cost))]],
    [accuracy ? "accuracy" : "same class", true, (profile) => [percent(quality(profile), 2)]],
    ["drift, mean", true, (profile) => [padded(profile.quality.drift)]],
    ["certified drift", true, (profile) => [`≤ ${padded(profile.bound)}`, profile.share === null ? null : `${percent(profile.share, 0)} of inputs`]],
    ...(conformal ? [["certified, compiled", true, (profile, cost) => [`≤ ${padded(cost.drift_bound)}`, `${percent(state.target.share, 0)} of inputs`]]] : []),
  ];
  const side = (right) => (right ? "number" : null);
  const rows = report.profiles.map((profile, index) =>
    html("tr", { class: index === state.picked ? "on" : null }, ...columns.map(([label, right, cells]) => {
      const [text, note] = cells(profile, costs[index]);
      return html("td", { class: side(right), "data-label": label }, text, note ? html("small", {}, note) : null);
    })));
  find("profiles").replaceChildren(
    html("thead", {}, html("tr", {}, ...columns.map(([label, right]) => html("th", { class: side(right), scope: "col" }, label)))),
    html("tbody", {}, ...rows));
  const sources = new Set(costs.map((cost) => (measured(cost) ? `90th percentile, ${cost.latency_source}` : cost.latency_source)));
  const energies = new Set(costs.map(energySource));
  find("profiles-note").textContent =
    `From least to greatest; each holds the one before. ${accuracy ? "Accuracy" : "The share of the full model's top-1 classes"} and drift are those on the calibration data, before compilation. ` +
    `Latency: ${[...sources].join("; ")}. Energy: ${[...energies].join("; ")}.`;
}

function drawTradeoffs() {
  const { costs } = state.target, name = report.quality === "accuracy" ? "accuracy" : "same class as the full model";
  const kinds = new Set(costs.map((cost) => (measured(cost) ? "90th percentile, measured" : `estimated: ${short(cost.latency_source)}`)));
  const axes = { latency_ms: `latency of a call, ms (${[...kinds].join("; ")})`, size_mb: "size of the weights, MB" };
  for (const [kind, place] of [["latency_ms", "latency"], ["size_mb", "size"]]) {
    const own = report.profiles.map((profile, index) => {
      const x = kind === "size_mb" ? profile.size_mb : costs[index].latency_ms;
      return { name: profile.name, x, y: quality(profile), on: index === state.picked, second: false };
    });
    const others = report.baselines.filter((other) => other[kind] !== null).map((other) => ({ name: other.name, x: other[kind], y: other.accuracy, on: false, second: true }));
    const points = [...own, ...others].map((point) => ({ ...point, lines: [`${percent(point.y, 2)} ${name}`, `${number(point.x, 4)} ${KINDS[kind].unit}`] }));
    find(`${place}-caption`).textContent = `${name[0].toUpperCase()}${name.slice(1)} against ${KINDS[kind].label.toLowerCase()}`;
    pareto(find(`${place}-plot`), { points, x: { label: axes[kind], text: (value) => number(value) }, y: { label: `${name}, on calibration data`, text: (value) => percent(value) } });
  }
  find("tradeoff-note").textContent = "The line joins what nothing else beats in both." +
    (report.baselines.length ? " Diamonds are baselines as given; their accuracy comes from the file." : " Baselines are drawn here too where the report is made with --baselines.");
}

function drawCertificates() {
  const { costs, statement } = state.target;
  // An artifact made before these were kept has the mean alone.
  const spread = report.profiles.every((profile) => "drift_p95" in profile.quality && "drift_max" in profile.quality);
  const points = [];
  report.profiles.forEach((profile, index) => {
    const { drift, drift_p95: p95, drift_max: high } = profile.quality, seen = spread ? p95 : drift;
    if (seen === undefined) return;
    const lines = [`seen: mean ${number(drift)}` + (spread ? `, 95th percentile ${number(p95)}, greatest ${number(high)}` : "")];
    const point = { name: profile.name, y: seen, low: drift, high: spread ? high : null, on: index === state.picked };
    points.push({ ...point, x: profile.bound, second: false, lines: [`bound ${number(profile.bound)}`, ...lines] });
    const bound = costs[index].drift_bound;
    if (bound !== null) points.push({ ...point, x: bound, high: null, second: true, unnamed: true, lines: [`conformal bound ${number(bound)}`, ...lines] });
  });
  const what = spread ? "95th percentile; the line goes from the mean to the greatest" : "mean";
  if (points.length) bounds(find("certificate-plot"), {
    points,
    x: { label: "certified bound of drift, 2-norm", text: (value) => number(value) },
    y: { label: "drift seen, 2-norm", text: (value) => number(value) },
  });
  const key = (second, text) => html("span", {}, html("i", { class: second ? "dot second" : "dot" }), text);
  find("certificate-legend").replaceChildren(
    key(false, "bound on calibration data, in torch"),
    ...(statement ? [key(true, "conformal bound of the compiled library")] : []),
    html("span", {}, `Drift: ${what}, on the calibration data. Below the dashed line it is within the bound.`));
  const at = Math.max(0, state.picked), profile = report.profiles[at], bounded = costs[at].bounds;
  find("statements").replaceChildren(
    html("h3", {}, `${profile.name}: at most ${number(profile.bound)}`),
    html("p", {}, profile.statement?.replaceAll("`bound`", number(profile.bound)).replaceAll("`layers` divides", "The map below divides") ?? "The artifact does not say what this bound promises."),
    ...(statement
      ? [html("h3", {}, `${profile.name}, compiled: ${bounded === null ? "no bound" : `at most ${number(bounded.l2)} in 2-norm, ${number(bounded.linf)} in any logit, ${number(bounded.kl)} nats of KL; same class for ${percent(costs[at].agreement)} or more`}`), html("p", {}, statement)]
      : [html("h3", {}, "The compiled library is not certified for this target"), html("p", {}, "t3c-compile certify bounds the drift of the library's own outputs on samples of yours.")]));
}

function drawSensitivity() {
  const values = report.sensitivity;
  find("sensitivity").hidden = values === null;
  find("sensitivity-note").textContent = values === null
    ? "The artifact does not hold the parts of its certificates by layer, so there is no map."
    : "How a profile's certified drift (2-norm) divides among its layers, by the spectral sum and to first order: the stronger the colour, the more of the bound comes from rounding or truncating that layer.";
  if (values === null) return;
  heat(find("sensitivity-plot"), {
    rows: report.layers, columns: report.profiles.map((profile) => profile.name), values, on: state.picked,
    describe: (row, column) => {
      const { form, rank, bits } = report.profiles[column].options[row], bound = report.profiles[column].bound;
      const share = bound > 0 ? ` (${percent(values[row][column] / bound)})` : "";
      return [`${report.profiles[column].name}: ${form === "dense" ? "dense" : `${form}, rank ${rank}`}, ${bits} bits`, `${number(values[row][column])} of the bound ${number(bound)}${share}`];
    },
  });
}

const FAMILY_COLOURS = ["#0b7a9c", "#c9752a", "#5c8f3a", "#8a63b0", "#b34a6a", "#4f6fb8", "#a08a2c", "#3f9a8b"];
const REST = "other kernels", OUTSIDE = "outside kernels";

function drawKernels() {
  const { kernels, unmeasured, name } = state.target;
  find("kernels").hidden = kernels === null;
  if (kernels === null) {
    find("kernels-note").textContent = `Not measured for ${name}. ` + (unmeasured === null
      ? `t3c-compile report ${report.name} --measure -o report.html runs every kernel on this machine and shows each one's share.`
      : `t3c-compile report --measure shows each kernel's share on a machine that runs this target; where this page was made: ${unmeasured}.`);
    return;
  }
  find("kernels-note").textContent = `Medians of calls on the machine that made this page, with ${kernels[0].inputs}. Kernels are timed one by one, to about a microsecond; "${OUTSIDE}" is the rest of an undisturbed call: the virtual machine and Python.`;
  const total = new Map();
  for (const { kernels: steps } of kernels) for (const { family, us } of steps) total.set(family, (total.get(family) ?? 0) + us);
  const families = [...total].sort((a, b) => b[1] - a[1]).map(([family]) => family).slice(0, FAMILY_COLOURS.length);
  const colour = (family) => family === OUTSIDE ? "var(--line)" : family === REST ? "var(--muted)" : FAMILY_COLOURS[families.indexOf(family)];
  const longest = Math.max(...kernels.map((times) => Math.max(times.call_us, sum(times.kernels))));
  const used = new Set();
  const bars = kernels.map((times, index) => {
    const parts = new Map();
    for (const { family, us } of times.kernels) add(parts, families.includes(family) ? family : REST, us);
    add(parts, OUTSIDE, Math.max(0, times.call_us - sum(times.kernels)));
    const whole = [...parts.values()].reduce((a, b) => a + b, 0);
    const stack = [...families, REST, OUTSIDE].filter((family) => parts.get(family) > 0).map((family) => {
      used.add(family);
      const part = html("i", { style: `width:${(100 * parts.get(family)) / longest}%;background:${colour(family)}` });
      return tip(part, family, [`${number(parts.get(family))} µs, ${percent(parts.get(family) / whole)} of a call of ${report.profiles[index].name}`]);
    });
    return html("div", { class: index === state.picked ? "share on" : "share" }, html("span", { class: "name" }, report.profiles[index].name),
      html("div", { class: "stack" }, ...stack), html("span", { class: "number" }, `${number(times.call_us / 1e3)} ms`));
  });
  const legend = [...families, REST, OUTSIDE].filter((family) => used.has(family)).map((family) =>
    html("span", {}, html("i", { class: "key", style: `background:${colour(family)}` }), family));
  find("kernel-bars").replaceChildren(...bars, html("p", { class: "legend" }, ...legend));
  const at = Math.max(0, state.picked), { kernels: steps, call_us: call } = kernels[at], whole = Math.max(call, sum(steps));
  find("kernel-table").replaceChildren(
    html("thead", {}, html("tr", {}, html("th", { scope: "col" }, `kernel, in ${report.profiles[at].name}`), html("th", { class: "optional", scope: "col" }, "how it was compiled"),
      ...["calls", "µs", "share"].map((title) => html("th", { class: "number", scope: "col" }, title)))),
    html("tbody", {}, ...steps.slice(0, 12).map((step) => html("tr", {}, html("td", {}, html("code", {}, step.name)), html("td", { class: "optional" }, step.schedule || "–"),
      ...[number(step.calls), number(step.us), percent(step.us / whole)].map((text) => html("td", { class: "number" }, text))))));
}
const sum = (steps) => steps.reduce((total, { us }) => total + us, 0);
const add = (parts, key, value) => parts.set(key, (parts.get(key) ?? 0) + value);

// Everything that the picked profile changes.
function drawProfile() {
  drawLayers();
  drawTable();
  drawPlots();
  drawKernels();
  markStrip();
}

function drawPlots() {
  find("tip").hidden = true;
  drawTradeoffs();
  drawCertificates();
  drawSensitivity();
}

function drawTarget() {
  drawKinds();
  startBudget();
}

function start() {
  const { name, profiles, layers, targets, tools } = report;
  document.title = `${name}: t3c-compile report`;
  find("name").textContent = name;
  const [least, most] = [profiles[0], profiles.at(-1)].map((profile) => number(profile.size_mb));
  const many = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  find("summary").textContent = `${many(profiles.length, "profile")} of ${many(layers.length, "elastic layer")}, ${least} to ${most} MB, for ${targets.map((target) => target.name).join(", ")}`;
  find("tools").textContent = Object.entries(tools).map(([tool, version]) => `${tool} ${version}`).join(" · ");
  find("target").append(...targets.map((target, index) => html("option", { value: index }, target.name)));
  find("target").addEventListener("change", (event) => { state.target = targets[event.target.value]; drawTarget(); });
  find("target-label").hidden = targets.length === 1;
  find("slider").addEventListener("input", (event) => setBudget(above(sliderScale().value(event.target.value / 400)), "slider"));
  find("amount").addEventListener("input", (event) => setBudget(Number(event.target.value), "amount"));
  const dark = matchMedia("(prefers-color-scheme: dark)"), theme = find("theme");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const name_theme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; name_theme(); });
  dark.addEventListener("change", name_theme);
  name_theme();
  makeLayers();
  drawTarget();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawPlots(); } });
}

start();
