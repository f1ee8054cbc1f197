"use strict";
// The page: sends texts to the worker, shows what comes back, and lets the reader look inside.

const $ = id => document.getElementById(id);
const description = JSON.parse($("description").textContent);
const { config, run } = description;
const LEVELS = 9; // colors: costs below 1 bit per character, below 2, ..., 8 bits or more
const box = $("text"), spans = box.children;
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

// The text. To the cells of engine.js it adds `at`, the number of tokens before a cell.
let cells = [];
let current = -1; // the chosen cell
let kept = false; // whether it stays chosen when the pointer moves
let next = -1; // a cell to choose as soon as it is there
let job = 0; // number of the newest request; what earlier ones still send is ignored
let waiting = []; // cells that are not shown yet
let began = null; // time and number of characters at the beginning of a job; null: none runs
let inspecting = null; // the cell that the worker looks into
let inspected = {}; // what is shown of the last such: {cell, layers, attention}, or {}

// --- the worker ----------------------------------------------------------------------------------

const engine = new Blob([$("engine").textContent], { type: "text/javascript" });
const worker = new Worker(URL.createObjectURL(engine));

function load() {
  const text = atob($("weights").textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  $("weights").textContent = "";
  worker.postMessage({ type: "load", description, weights: bytes.buffer }, [bytes.buffer]);
}

const receive = {
  loaded: () => generate(),
  started({ unknown }) {
    $("unknown").hidden = !unknown.length;
    const characters = unknown.map(label).join(" ");
    $("unknown").textContent = `Left out, because they are not in the vocabulary: ${characters}`;
  },
  cells({ cells: found }) {
    waiting.push(...found);
    if (!reducedMotion.matches) append();
  },
  done() {
    append();
    const seconds = (performance.now() - began.time) / 1000, count = characters(cells);
    const speed = Math.round((count - began.count) / seconds);
    const counted = count === 1 ? "1 character" : `${grouped(count)} characters`;
    status(`${counted}, ${grouped(speed)} a second. ${average()}`);
    began = null;
    box.style.minHeight = "";
    if (current < 0) choose(costliest());
  },
  inspected({ layers, attention }) {
    showInside({ cell: inspecting, layers, attention });
    inspecting = null;
    if (cells[current] !== inspected.cell) inspect();
  },
  failed({ message }) {
    began = null;
    status(`The model stopped: ${message}`);
  },
};

worker.onmessage = ({ data }) => {
  if (data.job === undefined || data.job === job) receive[data.type](data);
};
worker.onerror = event => status(`The model stopped: ${event.message}`);

function send(type, request) {
  if (!$("form").reportValidity()) return false;
  const sampling = { temperature: Number($("temperature").value), top_k: Number($("top_k").value) };
  worker.postMessage({ type, job: ++job, sampling, seed: Number($("seed").value), ...request });
  return true;
}

// Score the text of the reader, and continue it.
function generate(max_new_tokens = Number($("length").value)) {
  const text = $("prompt").value;
  if (!send("prompt", { text, start: description.start, max_new_tokens })) return;
  begin(0, max_new_tokens ? "Generating …" : "Scoring …");
}

// Continue the first `count` cells; with a token after them, if given.
function proceed(count, token) {
  const prefix = cells.slice(0, count).flatMap(cell => cell.ids);
  const ids = token === undefined ? prefix : [...prefix, token];
  const max_new_tokens = Number($("length").value);
  if (!send("run", { ids, from: prefix.length, max_new_tokens })) return;
  begin(count, "Generating …");
}

// A job that continues the first `count` cells.
function begin(count, text) {
  waiting = [];
  box.style.minHeight = `${box.offsetHeight}px`; // what is below does not jump
  if (count < cells.length) truncate(count);
  began = { time: performance.now(), count: characters(cells) };
  status(text);
}

function stop() {
  if (!began) return;
  worker.postMessage({ type: "stop" });
  receive.done();
  job++;
}

// --- the text ------------------------------------------------------------------------------------

function status(text) {
  $("status").textContent = text;
}

function characters(some) {
  return some.reduce((sum, { text }) => sum + [...text].length, 0);
}

function largest(values) {
  return values.reduce((a, b) => Math.max(a, b), 0);
}

function element(tag, content = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = content;
  made.className = className;
  return made;
}

const MARKS = { "\n": "↵", "\t": "⇥" };

// The text with marks for line ends and tabs, with or without these themselves, and with escapes
// for what else cannot be seen.
function visible(text, laidOut = false) {
  const mark = c => (laidOut ? MARKS[c] + c : MARKS[c]);
  const escape = c => `\\u{${c.codePointAt(0).toString(16)}}`;
  return text.replace(/(?! )[\p{C}\p{Z}]/gu, c => (c in MARKS ? mark(c) : escape(c)));
}

function label(text) {
  return { " ": "space", "\n": "line end", "\t": "tab" }[text] ?? visible(text);
}

// The bytes of a token, as escapes where they are no ASCII.
function tokenBytes(id) {
  const escape = byte => `\\x${byte.charCodeAt(0).toString(16)}`;
  return description.tokenizer.tokens[id].replace(/[\x80-\xff]/g, escape);
}

// The name of a token. In the tokenizers byte and bpe it can have a part of a character.
function tokenLabel(id, text) {
  const partial = text.includes("\ufffd") && ["byte", "bpe"].includes(description.tokenizer.kind);
  return partial ? tokenBytes(id) : label(text);
}

function percent(p) {
  return p < 0.001 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
}

function bits(nats) {
  return `${(nats / Math.LN2).toFixed(2)} bits`;
}

function bothUnits(nats, digits = 3) {
  return `${nats.toFixed(digits)} nats (${bits(nats)})`;
}

function grouped(number) {
  return number.toLocaleString("en");
}

function level({ text, nats }) {
  return Math.min(LEVELS - 1, Math.floor(nats / [...text].length / Math.LN2));
}

function average() {
  const predicted = cells.filter(({ nats }) => nats !== null);
  if (!predicted.length) return "Nothing precedes it, so it has no cost.";
  const nats = predicted.reduce((sum, cell) => sum + cell.nats, 0) / characters(predicted);
  const known = run.floor === null ? "" : ` Entropy of the corpus: ${bothUnits(run.floor)}.`;
  return `Cost: ${bothUnits(nats)} per character.${known}`;
}

function costliest() {
  const most = largest(cells.map(({ nats }) => nats));
  return Math.max(0, cells.findIndex(({ nats }) => nats === most));
}

function append() {
  const shown = document.createDocumentFragment(), byCost = $("colors").value === "cost";
  for (const cell of waiting) {
    const last = cells.at(-1);
    cells.push({ ...cell, at: last ? last.at + last.ids.length : 0 });
    shown.append(element("span", visible(cell.text, true), `c${byCost ? level(cell) : 0}`));
  }
  waiting = [];
  box.append(shown);
  if (next >= 0 && next < cells.length) choose(next);
}

function truncate(count) {
  cells.length = count;
  while (spans.length > count) box.lastChild.remove();
  current = next = -1;
  kept = false;
  inspected = {};
  $("details").replaceChildren(element("p", "Nothing is chosen."));
}

function choose(i) {
  if (!cells[i] || i === current) return;
  spans[current]?.classList.remove("on");
  current = i;
  next = -1;
  spans[i].classList.add("on");
  const { text, ids, nats, costs, likeliest } = cells[i];
  const heading = element("p"), list = element("ol");
  const parts = ids.map((id, part) => `${tokenBytes(id)} ${bits(costs[part])}`);
  const tokens = ids.length > 1 ? ` in ${ids.length} tokens: ${parts.join(", ")}` : "";
  const known = run.floor === null ? "" : `; entropy ${bits(run.floor)} per character`;
  const cost = nats === null ? "not predicted" :
    `${percent(Math.exp(-nats))}, ${bothUnits(nats)}${tokens}${known}`;
  heading.append(element("b", `${label(text)} `), cost);
  list.ariaLabel = "Likeliest here";
  likeliest.forEach(([id, token, p], number) => {
    const button = element("button"), item = element("li");
    button.append(element("span", `${number + 1} `, "key"), element("b", tokenLabel(id, token)));
    button.append(` ${percent(p)}`);
    button.title = "Continue the text with this token";
    button.onclick = () => branch(number);
    item.append(button);
    list.append(item);
  });
  $("details").replaceChildren(heading, list);
  inspect();
}

// Continue with an alternative in place of the chosen cell.
function branch(number) {
  const token = cells[current]?.likeliest[number];
  if (!token) return;
  const place = current;
  proceed(place, token[0]);
  next = place;
  box.focus({ preventScroll: true });
}

// --- looking inside ------------------------------------------------------------------------------

function inspect() {
  const cell = cells[current];
  if (inspecting || !config.n_layer) return;
  if (!cell || cell.nats === null) {
    showInside({});
    return;
  }
  inspecting = cell;
  const window = cells.flatMap(({ ids }) => ids).slice(cell.start, cell.at);
  worker.postMessage({ type: "inspect", ids: window, target: cell.ids[0] });
}

// Show what the worker has found in a cell; {} shows nothing.
function showInside(found) {
  inspected = found;
  if ($("colors").value === "attention") paint();
  $("layers").replaceChildren(...(found.layers ?? []).map(({ nats, likeliest }, layer) => {
    const row = element("tr"), guesses = element("td");
    for (const [id, token, p] of likeliest.slice(0, 3)) {
      guesses.append(element("b", tokenLabel(id, token)), ` ${percent(p)} `);
    }
    row.append(element("td", layer ? `block ${layer}` : "embedding"), element("td", bits(nats)));
    row.append(guesses);
    return row;
  }));
}

// Color the text: by cost, or by the attention of the token before the chosen one.
function paint() {
  const byAttention = $("colors").value === "attention";
  for (const control of document.querySelectorAll(".attention")) control.hidden = !byAttention;
  const levels = byAttention ? attentionLevels() : cells.map(level);
  levels.forEach((value, i) => { spans[i].className = `c${value}`; });
  spans[current]?.classList.add("on");
  const names = byAttention ? ["none", ...Array(LEVELS - 2).fill("\u00a0"), "most"] :
    [...Array(LEVELS - 1).keys(), `${LEVELS - 1}+`];
  const title = byAttention ? "Attention for the chosen character: " : "Bits: ";
  $("legend").replaceChildren(title, ...names.map((name, i) => element("span", name, `c${i}`)));
}

function attentionLevels() {
  const { cell, attention } = inspected;
  const weights = attention?.[$("layer").value * config.n_head + Number($("head").value)] ?? [];
  const sums = cells.map(({ ids, at }) => ids.reduce(
    (sum, _, i) => sum + (weights[at + i - cell?.start] ?? 0), 0));
  const most = largest(sums);
  return sums.map(sum => most ? Math.round((LEVELS - 1) * sum / most) : 0);
}

// --- the run -------------------------------------------------------------------------------------

// Validation losses by step as a line, in SVG; `floor`, if not null, is a dashed one.
function curve(losses, floor) {
  const left = 65, right = 630, top = 15, bottom = 180;
  const steps = losses.map(([step]) => step), values = losses.map(([, loss]) => loss);
  const [first, last] = [steps[0], steps.at(-1)];
  const low = Math.min(...values, floor ?? Infinity), high = Math.max(...values);
  const x = step => left + (step - first) / (last - first) * (right - left);
  const y = loss => bottom - 10 - (loss - low) / (high - low || 1) * (bottom - 10 - top);
  const points = losses.map(([step, loss]) => `${x(step).toFixed(1)} ${y(loss).toFixed(1)}`);
  const entropy = floor === null ? "" :
    `<path class="floor" d="M${left} ${y(floor)}H${right}"/>
    <text x="${left + 6}" y="${y(floor) - 5}">entropy of the corpus</text>`;
  return `<svg viewBox="0 0 640 210" role="img" aria-label="Validation loss:
    ${values[0].toFixed(3)} nats at step ${first}, ${values.at(-1).toFixed(3)} at step ${last}">
    <path class="axis" d="M${left} ${top}V${bottom}H${right}"/>${entropy}
    <path d="M${points.join("L")}"/>
    <text x="0" y="${top + 5}">${high.toFixed(3)}</text>
    <text x="0" y="${y(low) + 4}">${low.toFixed(3)}</text>
    <text x="${left}" y="200">step ${first}</text>
    <text x="${right}" y="200" text-anchor="end">${grouped(last)}</text></svg>`;
}

function showRun() {
  const { losses, samples, floor, steps } = run, figures = [`${grouped(steps)} steps.`];
  if (losses.length > 1) $("losses").innerHTML = curve(losses, floor);
  if (losses.length) {
    const [step, nats] = losses.at(-1);
    figures.push(`Validation loss: ${bothUnits(nats, 4)} per character at step ${grouped(step)}.`);
  }
  if (floor !== null) {
    figures.push(`The entropy of the corpus, the lowest possible loss: ${bothUnits(floor, 4)}.`);
  }
  figures.push(`The weights in this file are ${description.precision}.`);
  $("figures").textContent = figures.join(" ");
  $("samples").hidden = !samples.length;
  $("step").max = $("step").value = samples.length - 1;
  $("step").hidden = samples.length < 2;
  if (samples.length) showSample();
  if (run.command) $("command").append("The command of the run:", element("pre", run.command));
  $("settings").textContent = JSON.stringify({ model: config, ...run.settings }, null, 2);
}

// The sample that the slider points at, and the newest validation loss at its step.
function showSample() {
  const [step, text] = run.samples[$("step").value];
  const [at, nats] = run.losses.filter(([at]) => at <= step).at(-1) ?? [];
  let shown = `Step ${grouped(step)}`;
  if (at !== undefined) shown += `, validation loss ${bothUnits(nats, 4)}`;
  if (at < step) shown += ` at step ${grouped(at)}`;
  $("shown").textContent = $("step").ariaValueText = shown;
  $("sample").textContent = text.trim();
}

// --- controls ------------------------------------------------------------------------------------

$("form").onsubmit = event => {
  event.preventDefault();
  generate();
};
$("another").onclick = () => {
  $("seed").stepUp();
  generate();
};
$("score").onclick = () => {
  if ($("prompt").value) generate(0);
  else status("Type or paste a text to score.");
};
$("more").onclick = () => (cells.length ? proceed(cells.length) : generate());
$("stop").onclick = stop;
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
};
for (const id of ["colors", "layer", "head"]) $(id).onchange = paint;
$("step").oninput = showSample;

// The cell of the next row that is nearest to the left edge of the current one.
function nextRow(step) {
  const { offsetTop: top, offsetLeft: left } = spans[current];
  let best = current;
  for (let i = current + step; spans[i]; i += step) {
    if (spans[i].offsetTop === top) continue;
    if (best !== current && spans[i].offsetTop !== spans[best].offsetTop) break;
    const distance = Math.abs(spans[i].offsetLeft - left);
    if (best === current || distance < Math.abs(spans[best].offsetLeft - left)) best = i;
  }
  return best;
}

// Pointing at a character chooses it. A click keeps it, so that the pointer can leave the text.
box.onclick = ({ target }) => {
  const i = [].indexOf.call(spans, target);
  kept = i >= 0 && !(kept && i === current);
  choose(i);
};
let pointer = "";
box.onmousemove = ({ target, screenX, screenY }) => {
  // a browser also sends this event when the text moves under a pointer that rests
  const moved = pointer !== `${screenX} ${screenY}`;
  pointer = `${screenX} ${screenY}`;
  if (moved && !kept) choose([].indexOf.call(spans, target));
};
box.oncopy = event => { // without the marks
  const text = getSelection().toString().replace(/↵\n?/g, "\n").replace(/⇥\t?/g, "\t");
  event.clipboardData.setData("text/plain", text);
  event.preventDefault();
};
box.onfocus = () => {
  if (current < 0 && next < 0) choose(0);
};
box.onkeydown = event => {
  const steps = { ArrowRight: () => current + 1, ArrowLeft: () => current - 1,
    ArrowDown: () => nextRow(1), ArrowUp: () => nextRow(-1),
    Home: () => 0, End: () => cells.length - 1 };
  if (event.ctrlKey || event.metaKey || event.altKey || current < 0) return;
  if (/^[1-9]$/.test(event.key)) branch(event.key - 1);
  if (!(event.key in steps)) return;
  event.preventDefault();
  choose(steps[event.key]());
  spans[current].scrollIntoView({ block: "nearest" });
};

for (const [id, count] of [["layer", config.n_layer], ["head", config.n_head]]) {
  for (let i = 0; i < (count ?? 0); i++) $(id).add(new Option(i + 1, i));
}
for (const id of ["inside", "colors"]) {
  $(id).closest("section, .row").hidden = !config.n_layer; // of a bigram model
}
showRun();
paint();
load();
