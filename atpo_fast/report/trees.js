"use strict";
// The search trees. `run`, `element`, `shape`, `number`, `byId` come from charts.js.
const ROW = 27, COLUMN_MIN = 46, COLUMN_MAX = 120, RADIUS = 11, EDGE = 20, REWARD_ROOM = 64;
let shown = null; // the tree on the page: {tree, index, children, place, nodes, edges, x: turn → column}
let chosen = 0; // its chosen turn
let wholePath = false; // whether the panel shows every turn from the prompt on

/** Children of every turn, in order. */
function childrenOf(turns) {
  const children = turns.map(() => []);
  turns.forEach((turn, i) => { if (turn.parent >= 0) children[turn.parent].push(i); });
  return children;
}

/** Column (depth) and row of every turn: leaves on successive rows, a parent halfway between its outer children. */
function layout(turns, children) {
  const place = turns.map((turn) => ({ depth: 0, row: 0 }));
  turns.forEach((turn, i) => { if (turn.parent >= 0) place[i].depth = place[turn.parent].depth + 1; });
  const order = [], stack = [0]; // depth first, so that the rows of a subtree are neighbours
  while (stack.length) {
    const turn = stack.pop();
    order.push(turn);
    stack.push(...[...children[turn]].reverse());
  }
  let row = 0;
  for (const turn of order) if (!children[turn].length) place[turn].row = row++;
  for (const turn of order.reverse())
    if (children[turn].length) place[turn].row = (place[children[turn][0]].row + place[children[turn].at(-1)].row) / 2;
  return { place, rows: Math.max(row, 1), depth: Math.max(...place.map((p) => p.depth)) };
}

function path(turns, turn) {
  const found = [];
  for (let at = turn; at >= 0; at = turns[at].parent) found.unshift(at);
  return found;
}

/** Fill of a node: neutral at advantage 0, full colour at the tree's largest absolute advantage. */
function colour(advantage, limit) {
  if (typeof advantage !== "number") return "var(--unknown)";
  const share = limit > 0 ? Math.min(1, Math.abs(advantage) / limit) : 0;
  return `color-mix(in oklab, var(--${advantage < 0 ? "negative" : "positive"}) ${(100 * share).toFixed(1)}%, var(--zero))`;
}

const signed = (value) => (typeof value === "number" && value > 0 ? "+" : "") + number(value);

function drawTree(index) {
  const tree = run.trees[index], turns = tree.turns, children = childrenOf(turns);
  const { place, rows, depth } = layout(turns, children);
  const known = turns.slice(1).map((turn) => turn.advantage).filter((a) => typeof a === "number");
  const limit = Math.max(0, ...known.map(Math.abs));
  const svg = byId("tree-svg");
  svg.replaceChildren();
  const room = byId("tree-canvas").clientWidth - 16 - 2 * EDGE - REWARD_ROOM;
  const column = Math.max(COLUMN_MIN, Math.min(COLUMN_MAX, room / Math.max(depth, 1)));
  const x = (i) => EDGE + place[i].depth * column, y = (i) => EDGE + place[i].row * ROW;
  svg.setAttribute("width", 2 * EDGE + depth * column + REWARD_ROOM);
  svg.setAttribute("height", 2 * EDGE + (rows - 1) * ROW);
  const edges = turns.map((turn, i) => (turn.parent < 0 ? null : drawEdge(svg, x(turn.parent), y(turn.parent), x(i), y(i))));
  const nodes = turns.map((turn, i) => drawNode(svg, tree, i, !children[i].length, x(i), y(i), limit));
  shown = { tree, index, children, place, nodes, edges, x };
  drawQuestion(tree);
  drawLegend(limit);
}

function drawEdge(svg, x0, y0, x1, y1) {
  const middle = (x0 + x1) / 2;
  return shape("path", { d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`, class: "edge" }, svg);
}

function drawNode(svg, tree, i, leaf, x, y, limit) {
  const turn = tree.turns[i], unknown = i === 0 || typeof turn.advantage !== "number";
  const node = shape("g", { class: unknown ? "node unknown" : "node", transform: `translate(${x} ${y})`, tabindex: 0, role: "button" }, svg);
  node.setAttribute("aria-label", summaryOf(tree, i).split("\n")[0]);
  const box = { x: -RADIUS, y: -RADIUS, width: 2 * RADIUS, height: 2 * RADIUS, rx: 4 };
  const body = leaf || i === 0 ? shape("rect", box, node) : shape("circle", { r: RADIUS }, node);
  body.classList.add("shape");
  body.style.fill = i === 0 ? "var(--unknown)" : colour(turn.advantage, limit);
  shape("text", { y: 3.5 }, node).textContent = i === 0 ? "Q" : i;
  if (leaf && i > 0) {
    const reward = shape("text", { x: RADIUS + 6, y: 4, class: "reward" }, node);
    reward.textContent = (typeof turn.reward === "number" ? number(turn.reward) : "?") + (turn.multiplicity > 1 ? ` ×${turn.multiplicity}` : "");
  }
  node.addEventListener("click", () => choose(i));
  node.addEventListener("keydown", (event) => onKey(event, i));
  node.addEventListener("pointerenter", () => showTip(node, tree, i));
  node.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
  return node;
}

function summaryOf(tree, i) {
  const turn = tree.turns[i];
  if (i === 0) return `Prompt, ${turn.observation_tokens} tokens`;
  const parts = [`Turn ${i}`, turn.tool ?? (turn.finish_reason === "stop" ? "" : turn.finish_reason)];
  parts.push(`advantage ${signed(turn.advantage)}`, `entropy ${number(turn.nll)}`);
  if (turn.reward !== null) parts.push(`reward ${number(turn.reward)}`);
  return parts.filter(Boolean).join(" · ") + "\n" + turn.text.trim().slice(0, 160);
}

function showTip(node, tree, i) {
  const tip = byId("tip"), box = node.getBoundingClientRect();
  tip.textContent = summaryOf(tree, i);
  tip.hidden = false;
  tip.style.left = `${Math.max(8, Math.min(box.right + 10, innerWidth - tip.offsetWidth - 12))}px`;
  tip.style.top = `${Math.max(8, Math.min(box.bottom + 6, innerHeight - tip.offsetHeight - 12))}px`;
}

/** Arrow keys: left to the parent, right to the first child, up and down within a column. */
function onKey(event, i) {
  const { tree, children, place } = shown;
  const column = tree.turns.map((_, k) => k).filter((k) => place[k].depth === place[i].depth).sort((a, b) => place[a].row - place[b].row);
  const at = column.indexOf(i);
  const goal = {
    ArrowLeft: tree.turns[i].parent, ArrowRight: children[i][0], ArrowUp: column[at - 1], ArrowDown: column[at + 1], Enter: i, " ": i,
  }[event.key];
  if (goal === undefined || goal < 0) return;
  event.preventDefault();
  choose(goal);
  shown.nodes[goal].focus();
}

/** Question and other notes of the tree. */
function drawQuestion(tree) {
  const parent = byId("tree-question");
  parent.replaceChildren();
  const notes = { question_id: tree.question_id, ...tree.meta };
  for (const [name, value] of Object.entries(notes)) {
    const line = element("div", undefined, parent);
    element("span", `${name.replaceAll("_", " ")}: `, line);
    line.append(typeof value === "string" ? value : JSON.stringify(value));
  }
}

function drawLegend(limit) {
  const legend = byId("tree-legend");
  legend.replaceChildren();
  element("span", "advantage", legend);
  element("span", number(-limit), legend);
  element("span", undefined, legend, "scale").title = "neutral is zero";
  element("span", signed(limit), legend);
  element("span", "· circle: inner turn · square: leaf, with its reward · Q: prompt · dashed: no advantage", legend);
}

function choose(turn) {
  chosen = turn;
  const onPath = new Set(path(shown.tree.turns, turn));
  shown.nodes.forEach((node, i) => node.classList.toggle("chosen", i === turn));
  shown.edges.forEach((edge, i) => edge && edge.classList.toggle("on-path", onPath.has(i)));
  bringIntoView(shown.x(turn));
  drawPanel();
  history.replaceState(null, "", `#tree=${shown.index}&turn=${turn}`);
}

/** Scroll the tree sideways, never the page, so that column `x` shows. */
function bringIntoView(x) {
  const canvas = byId("tree-canvas"), right = canvas.scrollLeft + canvas.clientWidth;
  if (x < canvas.scrollLeft + EDGE) canvas.scrollLeft = x - 2 * EDGE;
  else if (x + REWARD_ROOM > right) canvas.scrollLeft = x + REWARD_ROOM + EDGE - canvas.clientWidth;
}

function drawPanel() {
  const panel = byId("turn-panel");
  panel.replaceChildren();
  const turns = shown.tree.turns;
  drawLinks(panel);
  for (const i of wholePath ? path(turns, chosen) : [chosen]) drawTurn(panel, turns[i], i);
  panel.scrollTop = 0;
}

function drawLinks(panel) {
  const links = element("div", undefined, panel, "links");
  const label = element("label", undefined, links);
  const box = element("input", undefined, label);
  box.type = "checkbox";
  box.checked = wholePath;
  box.addEventListener("change", () => { wholePath = box.checked; drawPanel(); });
  label.append(" every turn from the prompt on");
  const goals = [[shown.tree.turns[chosen].parent, "parent"], ...shown.children[chosen].map((child) => [child, "child"])];
  for (const [goal, name] of goals)
    if (goal >= 0) element("button", `${name} ${goal || "Q"}`, links).addEventListener("click", () => choose(goal));
}

function drawTurn(panel, turn, i) {
  const kind = [turn.tool && `calls ${turn.tool}`, i && `ends by ${turn.finish_reason}`].filter(Boolean).join(", ");
  element("h3", i ? `Turn ${i}${kind ? ": " + kind : ""}` : "Prompt", panel);
  const numbers = element("dl", undefined, panel, "numbers");
  const facts = i ? [["advantage", signed(turn.advantage)], ["value", number(turn.value)], ["entropy, nats per token", number(turn.nll)]] : [["value", number(turn.value)]];
  if (turn.reward !== null) facts.push(["reward", number(turn.reward)]);
  if (turn.multiplicity > 1) facts.push(["counts", `${turn.multiplicity} times`]);
  const { action_tokens: written, observation_tokens: observed } = turn;
  facts.push(["tokens", i ? `${written} written, ${observed} observed` : `${observed}`]);
  for (const [name, value] of facts) {
    const pair = element("div", undefined, numbers);
    element("dt", name, pair);
    element("dd", value, pair);
  }
  if (i) drawText(panel, "Written by the policy", turn.text, "");
  if (turn.observation) drawText(panel, i ? "Observation" : "Text", turn.observation, "observation");
}

/** Text as it is, tags such as <search> marked. */
function drawText(panel, title, text, className) {
  element("h4", title, panel);
  const block = element("pre", undefined, panel, className);
  for (const part of text.split(/(<\/?[A-Za-z_][\w-]*>)/)) block.append(/^<\/?[A-Za-z_][\w-]*>$/.test(part) ? element("b", part) : part);
  if (!text) element("i", "(empty)", block);
}

function describe(tree) {
  const rewards = tree.turns.map((turn) => turn.reward).filter((r) => typeof r === "number");
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
  const leaves = childrenOf(tree.turns).filter((c, i) => i && !c.length).length;
  return `step ${tree.step} · ${tree.question_id} · ${leaves} ${leaves === 1 ? "leaf" : "leaves"} · mean reward ${number(mean)}`;
}

/** The tree and turn that the address names, else the first tree and its best leaf. */
function openFromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const index = Number(wanted.get("tree") ?? 0);
  openTree(run.trees[index] ? index : 0, wanted.has("turn") ? Number(wanted.get("turn")) : null);
}

function openTree(index, turn) {
  byId("tree-choice").value = index;
  drawTree(index);
  const { tree, children } = shown;
  const leaves = tree.turns.map((_, i) => i).filter((i) => !children[i].length);
  const best = leaves.reduce((a, b) => ((tree.turns[b].reward ?? -Infinity) > (tree.turns[a].reward ?? -Infinity) ? b : a), leaves[0]);
  const address = location.href;
  choose(tree.turns[turn] && turn !== null ? turn : best);
  if (!address.includes("#tree=")) history.replaceState(null, "", address); // the address changes by a click only
}

function startTrees() {
  byId("no-trees").hidden = run.trees.length > 0;
  if (!run.trees.length) return;
  byId("tree-view").hidden = false;
  run.trees.forEach((tree, i) => { element("option", describe(tree), byId("tree-choice")).value = i; });
  byId("tree-choice").addEventListener("change", (event) => openTree(Number(event.target.value), null));
  addEventListener("hashchange", () => { if (location.hash.startsWith("#tree=")) openFromAddress(); });
  addEventListener("resize", () => { const turn = chosen; drawTree(shown.index); choose(turn); });
  openFromAddress();
  if (location.hash.startsWith("#tree=")) byId("trees").scrollIntoView();
}

startTrees();
