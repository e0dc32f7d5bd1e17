"use strict";
// The head of the page and the plots. `run` is the data that atpo_fast/report/collect.py wrote.
const run = JSON.parse(document.getElementById("run-data").textContent);
const SVG = document.getElementById("tree-svg").namespaceURI;
const byId = (id) => document.getElementById(id);

/** An HTML element with text; text is never parsed as HTML. */
function element(tag, text, parent, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

/** An SVG element with attributes. */
function shape(tag, attributes, parent) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (parent) parent.append(made);
  return made;
}

/** A number for reading: four digits, k and M, exponents where needed. */
function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value; // nan, inf
  const size = Math.abs(value);
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
  if (size > 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(Math.abs(size - 1) < 0.01 ? 7 : 4)); // ratios differ from 1 in late digits
}

/** A tick value with as many decimals as the distance of ticks needs. */
function tickText(value, ticks) {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : 1;
  if (Math.abs(value) >= 1e4 || step < 1e-6 || (value !== 0 && Math.abs(value) < 1e-3)) return number(value);
  return String(+value.toFixed(Math.max(0, 1 - Math.floor(Math.log10(step)))));
}

function drawSummary() {
  byId("folder").textContent = `${run.folder} · written ${run.written}`;
  const { cold_start_em: before, final_em: after, finished, questions } = run.headline;
  const line = byId("headline");
  const values = [before, after].filter((value) => typeof value === "number");
  const times = [typeof before === "number" && "before RL", typeof after === "number" && (finished ? "after RL" : "so far")];
  const set = questions ? ` on ${questions} evaluation questions` : "";
  if (values.length) element("b", values.map((value) => value.toFixed(3)).join(" → "), line);
  element("span", values.length ? `exact match${set}, greedy: ${times.filter(Boolean).join(" → ")}` : "No evaluation yet.", line);
  for (const [name, value] of run.facts) {
    const pair = element("div", undefined, byId("facts"));
    element("dt", name, pair);
    element("dd", value, pair);
  }
  if (run.missing.length) {
    const notice = byId("missing");
    notice.hidden = false;
    element("b", "Not in this report", notice);
    const list = element("ul", undefined, notice);
    for (const text of run.missing) element("li", text, list);
  }
  byId("config-text").textContent = run.config || "(none)";
  byId("summary-text").textContent = Object.keys(run.summary).length ? JSON.stringify(run.summary, null, 1) : "(none)";
}

const WIDTH = 400, HEIGHT = 220, LEFT = 56, RIGHT = 8, TOP = 8, BOTTOM = 36;

/** Round tick values inside [low, high]; with `around`, those that enclose it. */
function ticks(low, high, wanted, around = false) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  const first = around ? Math.floor(low / step + 1e-9) : Math.ceil(low / step - 1e-9);
  const last = around ? Math.ceil(high / step - 1e-9) : Math.floor(high / step + 1e-9);
  for (let i = first; i <= last; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

/** Powers of ten inside [low, high], thinned to about `wanted`. */
function decades(low, high, wanted) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first + 1) / wanted));
  const found = [];
  for (let e = first; e <= last; e += stride) found.push(10 ** e);
  return found;
}

/** Scale of the y axis: {place: value → pixel, ticks}. */
function yScale(values, kind) {
  const span = HEIGHT - TOP - BOTTOM;
  let low = Math.min(...values), high = Math.max(...values);
  if (kind === "log" && low >= 0 && high > 0) {
    const positive = values.filter((v) => v > 0);
    low = 10 ** (Math.floor(Math.log10(Math.min(...positive)) * 2) / 2);
    high = 10 ** (Math.ceil(Math.log10(high) * 2 + 1e-9) / 2);
    if (Math.log10(high / low) < 1.2) [low, high] = [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high))];
    const scaled = (v) => (Math.log10(v) - Math.log10(low)) / (Math.log10(high) - Math.log10(low) || 1);
    return { place: (v) => (v > 0 ? HEIGHT - BOTTOM - span * scaled(v) : null), ticks: decades(low, high, 5) };
  }
  if (low >= 0 && (kind === "stack" || low < 0.6 * high || high === 0)) low = 0;
  if (high === low) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  const shown = ticks(low, high, 4, true);
  [low, high] = [shown[0], shown.at(-1)];
  return { place: (v) => HEIGHT - BOTTOM - (span * (v - low)) / (high - low), ticks: shown };
}

/** Steps of a chart in order, and each line's values as a map from step. */
function table(chart) {
  const columns = chart.series.map((line) => new Map(line.points));
  const steps = [...new Set(columns.flatMap((column) => [...column.keys()]))].sort((a, b) => a - b);
  return { columns, steps };
}

function drawAxes(svg, chart, steps, x, y) {
  for (const tick of y.ticks) {
    const at = y.place(tick);
    shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at, class: "grid" }, svg);
    shape("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, svg).textContent = tickText(tick, y.ticks);
  }
  const shown = steps.length > 1 ? ticks(steps[0], steps.at(-1), 6).filter(Number.isInteger) : steps;
  for (const tick of shown)
    shape("text", { x: x(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, svg).textContent = number(tick);
  shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis" }, svg);
  const middle = (LEFT + WIDTH - RIGHT) / 2;
  shape("text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, svg).textContent = chart.x;
  const up = (TOP + HEIGHT - BOTTOM) / 2;
  const label = shape("text", { transform: `translate(11 ${up}) rotate(-90)`, "text-anchor": "middle" }, svg);
  label.textContent = chart.y;
}

/** One path per line, interrupted where a value is missing; dots while they can be told apart. */
function drawLines(svg, steps, columns, x, y) {
  columns.forEach((column, i) => {
    let path = "", drawing = false;
    const dots = [];
    for (const step of steps) {
      if (!column.has(step)) continue; // recorded at other steps than its neighbours: join over it
      const value = column.get(step), at = value === null ? null : y.place(value);
      if (at !== null) { path += `${drawing ? "L" : "M"}${x(step).toFixed(1)} ${at.toFixed(1)}`; dots.push([x(step), at]); }
      drawing = at !== null;
    }
    shape("path", { d: path, fill: "none", stroke: `var(--c${i % 10})`, "stroke-width": 1.8, "stroke-linejoin": "round" }, svg);
    if (dots.length <= 30) for (const [cx, cy] of dots) shape("circle", { cx, cy, r: 2.4, fill: `var(--c${i % 10})` }, svg);
  });
}

/** Bars on one another, one outline per series. */
function drawStack(svg, steps, columns, x, y) {
  const half = steps.length > 1 ? (x(steps[1]) - x(steps[0])) / 2 : 30;
  const base = steps.map(() => 0);
  columns.forEach((column, i) => {
    let path = "";
    steps.forEach((step, k) => {
      const bottom = y.place(base[k]), top = y.place((base[k] += column.get(step) ?? 0));
      const width = steps.length > 60 ? half * 2.02 : half * 1.7;
      path += `M${(x(step) - width / 2).toFixed(2)} ${bottom.toFixed(2)}V${top.toFixed(2)}h${width.toFixed(2)}V${bottom.toFixed(2)}Z`;
    });
    shape("path", { d: path, fill: `var(--c${i % 10})` }, svg);
  });
}

function drawChart(chart, parent) {
  const { columns, steps } = table(chart);
  const figure = element("figure", undefined, parent);
  const caption = element("figcaption", chart.title, figure);
  const where = element("span", "", caption);
  const legend = element("div", undefined, figure, "legend");
  const values = chart.series.map((line, i) => {
    const item = element("span", undefined, legend);
    element("i", undefined, item).style.background = `var(--c${i % 10})`;
    item.append(line.name);
    return element("b", "", item);
  });
  const sums = steps.map((step) => columns.reduce((sum, column) => sum + (column.get(step) ?? 0), 0));
  const finite = columns.flatMap((column) => [...column.values()]).filter((v) => v !== null);
  const stacked = chart.kind === "stack";
  const y = yScale(stacked ? sums : finite, chart.kind);
  const margin = stacked ? (WIDTH - LEFT - RIGHT) / (2 * steps.length) : 6;
  const reach = steps.at(-1) - steps[0] || 1;
  const room = WIDTH - LEFT - RIGHT - 2 * margin;
  const x = (step) => (steps.length > 1 ? LEFT + margin + (room * (step - steps[0])) / reach : (LEFT + WIDTH - RIGHT) / 2);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title }, figure);
  drawAxes(svg, chart, steps, x, y);
  (stacked ? drawStack : drawLines)(svg, steps, columns, x, y);
  const cursor = shape("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" }, svg);
  const read = (step) => {
    const total = stacked ? `, ${number(sums[steps.indexOf(step)])} s in all` : "";
    where.textContent = `${chart.x.replace("RL ", "").replace("optimizer ", "")} ${step}${total}`;
    values.forEach((value, i) => { value.textContent = columns[i].has(step) ? number(columns[i].get(step)) : "–"; });
  };
  const rest = () => {
    cursor.setAttribute("visibility", "hidden");
    read(steps.at(-1));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const step = steps.reduce((best, s) => (Math.abs(x(s) - at) < Math.abs(x(best) - at) ? s : best), steps[0]);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    read(step);
  });
  svg.addEventListener("pointerleave", rest);
  rest();
}

function drawPlots() {
  for (const chart of run.charts) drawChart(chart, byId(chart.more ? "further-plots" : "main-plots"));
  byId("further").hidden = !run.charts.some((chart) => chart.more);
  if (!run.charts.length) element("p", "There are no metrics to plot yet.", byId("main-plots"), "quiet");
}

drawSummary();
drawPlots();
