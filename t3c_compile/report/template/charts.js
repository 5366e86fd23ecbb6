// Plots drawn as SVG. Every text goes through createTextNode: names from the artifact are never read as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Three or so significant digits, without zeros that say nothing.
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-4 || Math.abs(value) >= 1e6)) return value.toExponential(digits - 1);
  return Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
}
// The same with its zeros, for a column.
const padded = (value) => (typeof value === "number" && Math.abs(value) >= 1e-4 && Math.abs(value) < 100 ? value.toPrecision(3) : number(value));
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

// A name that fits into so many letters; the end of a layer's name tells more than its beginning.
const head = (name, letters) => (name.length > letters ? `${name.slice(0, Math.max(1, letters - 1))}…` : name);
const tail = (name, letters) => (name.length > letters ? `…${name.slice(1 - Math.max(2, letters))}` : name);

// What the pointer or the keyboard's focus is on is told in words; `lines` may be a function that gives them.
function tip(node, title, lines) {
  const box = document.getElementById("tip");
  const show = () => {
    const told = typeof lines === "function" ? lines() : lines;
    box.replaceChildren(html("b", {}, title), ...told.map((line) => html("div", {}, line)));
    box.hidden = false;
    const at = node.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - box.offsetWidth / 2), innerWidth - box.offsetWidth - 8);
    const above = at.top - box.offsetHeight - 8;
    box.style.left = `${left}px`;
    box.style.top = `${above > 4 ? above : at.bottom + 8}px`;
  };
  const hide = () => { box.hidden = true; };
  node.addEventListener("pointerenter", show);
  node.addEventListener("focus", show);
  node.addEventListener("pointerleave", hide);
  node.addEventListener("blur", hide);
  return node;
}

// A scale from values to 0..1, linear, or logarithmic where `log`.
function scale([low, high], log) {
  const of = log ? Math.log : (value) => value;
  const back = log ? Math.exp : (value) => value;
  const span = of(high) - of(low) || 1;
  return { at: (value) => (of(value) - of(low)) / span, value: (share) => back(of(low) + share * span), low, high, log };
}

// A scale with room around `values`; logarithmic where they are positive and spread over more than a factor of 8.
function around(values, pad = 0.07) {
  const low = Math.min(...values), high = Math.max(...values);
  if (low > 0 && high / low > 8) {
    const room = (high / low) ** pad;
    return scale([low / room, high * room], true);
  }
  const room = (high - low || Math.abs(high) || 1) * pad;
  return scale([low - room, high + room], false);
}

// Round numbers within a scale, about `count` of them.
function ticks({ low, high, log }, count) {
  const found = [];
  if (log) {
    const steps = Math.log10(high / low) > count / 2 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) found.push(Number(`${step}e${power}`));
  } else {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
    for (let index = Math.ceil(low / step); index * step <= high; index++) found.push(Number((index * step).toPrecision(12)));
  }
  return found.filter((value) => value >= low && value <= high);
}

// An empty plot in `host`, as wide as it is, with axes; what `x` and `y` return are pixels.
function frame(host, { x, y, height = 300, left = 54 }) {
  const width = Math.max(host.clientWidth, 200), top = 26, right = 14, bottom = 46;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${y.label}; ${x.label}` });
  const atX = (value) => left + x.scale.at(value) * (width - left - right);
  const atY = (value) => height - bottom - y.scale.at(value) * (height - top - bottom);
  for (const value of ticks(y.scale, 5).filter(y.possible ?? (() => true))) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: atY(value), y2: atY(value) }));
    root.append(svg("text", { x: left - 8, y: atY(value) + 4, "text-anchor": "end" }, y.text(value)));
  }
  for (const value of ticks(x.scale, width < 420 ? 4 : 6)) {
    root.append(svg("line", { class: "grid", x1: atX(value), x2: atX(value), y1: top, y2: height - bottom }));
    root.append(svg("text", { x: atX(value), y: height - bottom + 17, "text-anchor": "middle" }, x.text(value)));
  }
  root.append(svg("text", { class: "title", x: 0, y: 12 }, y.label));
  root.append(svg("text", { class: "title", x: width - right, y: height - 8, "text-anchor": "end" }, x.label));
  host.replaceChildren(root);
  return { root, x: atX, y: atY, width, height, inner: { left, right: width - right, top, bottom: height - bottom } };
}

// Puts names beside points where they cover no point and no other name; one that finds no place is left to the tooltip.
function label(plot, points) {
  const taken = points.map(({ px, py }) => [px - 6, py - 6, px + 6, py + 6]);
  const free = ([l, t, r, b]) =>
    l >= plot.inner.left && r <= plot.inner.right && t >= plot.inner.top - 8 && b <= plot.inner.bottom &&
    taken.every(([l2, t2, r2, b2]) => r + 4 < l2 || l > r2 + 4 || b < t2 || t > b2);
  for (const { px, py, name, on } of points.filter((point) => !point.unnamed).sort((a, b) => Number(b.on) - Number(a.on))) {
    const text = svg("text", { class: on ? "name on" : "name" }, head(name, 24));
    plot.root.append(text);
    const wide = text.getComputedTextLength();
    const places = [[px - wide / 2, py - 10], [px - wide / 2, py + 19], [px + 12, py + 4], [px - wide - 12, py + 4]];
    const place = places.find(([l, base]) => free([l, base - 10, l + wide, base + 3]));
    if (!place) { text.remove(); continue; }
    taken.push([place[0], place[1] - 10, place[0] + wide, place[1] + 3]);
    text.setAttribute("x", place[0]);
    text.setAttribute("y", place[1]);
  }
}

// A point: a circle, or a diamond where it is `second`.
function mark(plot, { px, py, name, lines, on, second }) {
  const size = on ? 7 : 5.5, classes = `point${second ? " second" : ""}${on ? " on" : ""}`;
  const node = second
    ? svg("path", { class: classes, d: `M${px} ${py - size}L${px + size} ${py}L${px} ${py + size}L${px - size} ${py}Z` })
    : svg("circle", { class: classes, cx: px, cy: py, r: size });
  node.setAttribute("tabindex", 0);
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", [name, ...lines].join(", "));
  plot.root.append(tip(node, name, lines));
}

// Points of quality against cost, and the line of those that no other beats in both.
function pareto(host, { points, x, y }) {
  const plot = frame(host, {
    x: { ...x, scale: around(points.map((point) => point.x)) },
    y: { ...y, scale: around(points.map((point) => point.y), 0.14), possible: (share) => share >= 0 && share <= 1 },
  });
  const placed = points.map((point) => ({ ...point, px: plot.x(point.x), py: plot.y(point.y) }));
  let best = -Infinity;
  const front = [...placed].sort((a, b) => a.x - b.x || b.y - a.y).filter((point) => point.y > best && ((best = point.y), true));
  const path = front.map(({ px, py }, index) => (index ? `H${px}V${py}` : `M${px} ${py}`)).join("");
  plot.root.append(svg("path", { class: "front", d: `${path}H${plot.inner.right}` }));
  for (const point of placed) mark(plot, point);
  label(plot, placed);
}

// Bounds (x) against drifts seen (y) on equal axes; a whisker goes from the mean to the greatest drift.
function bounds(host, { points, x, y }) {
  const most = 1.08 * Math.max(...points.flatMap((point) => [point.x, point.y, point.high ?? 0]), 1e-9);
  const same = scale([0, most], false);
  const plot = frame(host, { x: { ...x, scale: same }, y: { ...y, scale: same }, height: 330 });
  plot.root.append(svg("line", { class: "diagonal", x1: plot.x(0), y1: plot.y(0), x2: plot.x(most), y2: plot.y(most) }));
  const placed = points.map((point) => ({ ...point, px: plot.x(point.x), py: plot.y(point.y) }));
  for (const { px, low, high } of placed.filter((point) => point.high !== null))
    plot.root.append(svg("line", { class: "whisker", x1: px, x2: px, y1: plot.y(low), y2: plot.y(high) }));
  for (const point of placed) mark(plot, point);
  label(plot, placed);
}

// A grid of layers and profiles, the stronger in colour the greater the value.
function heat(host, { rows, columns, values, on, describe }) {
  const width = Math.max(host.clientWidth, 200), high = rows.length > 60 ? 13 : 20;
  const font = high < 16 ? 10.5 : width < 420 ? 11 : 12, letter = 0.55 * font;
  const left = Math.min(letter * Math.max(...rows.map((name) => name.length)) + 14, 0.48 * width);
  const top = 24, wide = (width - left) / columns.length, bottom = top + rows.length * high;
  const most = Math.max(...values.flat(), 1e-12);
  const root = svg("svg", { viewBox: `0 0 ${width} ${bottom + 44}`, height: bottom + 44, role: "group", "aria-label": "parts of the bound by layer and profile" });
  columns.forEach((name, column) =>
    root.append(svg("text", { class: column === on ? "name on" : "name", x: left + (column + 0.5) * wide, y: 14, "text-anchor": "middle" }, head(name, Math.floor(wide / 7)))));
  const letters = Math.floor((left - 12) / letter);
  rows.forEach((name, row) => {
    const y = top + row * high;
    root.append(svg("text", { x: left - 8, y: y + high / 2 + 4, "text-anchor": "end", style: `font-size:${font}px` }, tail(name, letters)));
    values[row].forEach((value, column) => {
      const cell = svg("rect", { class: "cell", x: left + column * wide, y, width: wide, height: high, style: `fill:${tint(value / most)}` });
      root.append(tip(cell, name, describe(row, column)));
    });
  });
  if (on >= 0) root.append(svg("rect", { class: "column", x: left + on * wide, y: top, width: wide, height: bottom - top }));
  const bar = Math.min(220, width - left), steps = 44, y = bottom + 14;
  for (let step = 0; step < steps; step++)
    root.append(svg("rect", { x: left + (step * bar) / steps, y, width: bar / steps + 0.5, height: 9, style: `fill:${tint(step / (steps - 1))}` }));
  root.append(svg("text", { x: left, y: y + 24 }, "0"));
  root.append(svg("text", { x: left + bar, y: y + 24, "text-anchor": "end" }, `${number(most)}, 2-norm`));
  host.replaceChildren(root);
}
const tint = (share) => `color-mix(in oklab, var(--accent) ${(100 * share).toFixed(1)}%, var(--faint))`;
