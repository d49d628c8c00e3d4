"use strict";
// All text from the data goes in through textContent or append, never as markup.

const comparison = JSON.parse(document.getElementById("comparison").textContent);
const words = JSON.parse(document.querySelector("main").dataset.words);
const about = comparison.input;
const points = comparison.points.map((point, index) => ({ ...point, index }));
const qualities = [...new Set(points.flatMap((point) => Object.keys(point.quality)))];
const methods = [...new Set(points.map((point) => point.method))].sort();
const state = {
  quality: qualities.includes("recall@10") ? "recall@10" : qualities[0],
  hidden: new Set(),
  frontier: true,
  view: null, // {x0, x1, y0, y1}: log2 bytes and height; null shows everything
  limitQuality: 0, // the least, or where less is better the most
  mostBytes: Infinity,
  picked: null,
  sort: { column: words.columns.bytes_per_item, descending: false },
};
const find = (id) => document.getElementById(id);

// -- figures as text ---------------------------------------------------------------------

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const decimals = (value, most) => value.toLocaleString("en-US", { maximumFractionDigits: most });
const orDash = (write) => (value) => (isNumber(value) ? write(value) : "–");
const countText = orDash((value) => decimals(value, 2));
const ratioText = orDash((value) => decimals(value, value < 100 ? 1 : 0) + "×");
const shareText = orDash((ratio) => decimals(100 / ratio, 1) + " %");
const qualityText = (value, name) => orDash((known) => (words.less_is_better.includes(name)
  ? String(Number(known.toPrecision(Math.abs(known) < 1 ? 3 : 4))) : known.toFixed(3)))(value);
const secondsText = orDash((value) => (value < 9.95
  ? value.toLocaleString("en-US", { maximumSignificantDigits: 2 }) : decimals(value, 0)));

function scaled(value, step, units) {
  let unit = 0;
  while (value >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return decimals(value, value < 100 ? 1 : 0) + units[unit];
}
const sizeText = orDash((value) => scaled(value, 1024, [" B", " KiB", " MiB", " GiB"]));
const rateText = orDash((value) => scaled(value, 1000, ["", "k", "M", "G"]));

// -- making elements ---------------------------------------------------------------------

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const html = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Circle, square, diamond, up, down, pentagon, cross; each about two units wide.
const SHAPES = [
  "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
  "M-.88,-.88H.88V.88H-.88z",
  "M0,-1.25L1.05,0L0,1.25L-1.05,0z",
  "M0,-1.15L1.12,.85H-1.12z",
  "M0,1.15L1.12,-.85H-1.12z",
  "M0,-1.15L1.1,-.36L.68,.93H-.68L-1.1,-.36z",
  "M-1.1,-.6L-.6,-1.1L0,-.5L.6,-1.1L1.1,-.6L.5,0L1.1,.6L.6,1.1L0,.5L-.6,1.1L-1.1,.6L-.5,0z",
];
const COLOURS = 10;

function shape(method, radius) {
  const number = methods.indexOf(method);
  const path = svg("path", { d: SHAPES[number % SHAPES.length], transform: `scale(${radius})` });
  path.style.fill = `var(--c${number % COLOURS})`;
  return path;
}
const swatch = (method) =>
  svg("svg", { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
    shape(method, 5));

// -- what is shown, and what is best of it -----------------------------------------------

const qualityOf = (point) => point.quality[state.quality];
const lessIsBetter = () => words.less_is_better.includes(state.quality);
const gain = (quality) => (lessIsBetter() ? -quality : quality);
const gainOf = (point) => gain(qualityOf(point));
const canDraw = (point) => isNumber(qualityOf(point)) && point.bytes_per_item > 0;
const shown = () => points.filter((point) => canDraw(point) && !state.hidden.has(point.method));
const bySize = (a, b) => a.bytes_per_item - b.bytes_per_item || gainOf(b) - gainOf(a)
  || a.codec_bytes - b.codec_bytes || a.index - b.index;

function frontierOf(list) {
  let most = -Infinity;
  return [...list].sort(bySize).filter((point) => {
    const better = gainOf(point) > most;
    most = Math.max(most, gainOf(point));
    return better;
  });
}
const smallest = () =>
  shown().filter((point) => gainOf(point) >= gain(state.limitQuality)).sort(bySize)[0];
const best = () =>
  shown().filter((point) => point.bytes_per_item <= state.mostBytes)
    .sort((a, b) => gainOf(b) - gainOf(a) || bySize(a, b))[0];

function chosen() {
  return [["A", smallest()], ["B", best()], ["C", points[state.picked]]]
    .filter(([, point]) => point);
}

// -- the choices -------------------------------------------------------------------------

function shellQuote(text) {
  const word = text.startsWith("-") ? "./" + text : text;
  return /^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\\''") + "'";
}

function commandFor(point) {
  if (words.use === "cache") return `fewbits.kv.cache(model, ${JSON.stringify(point.spec)})`;
  // Arrays that were compared from Python are called "the input", and are no file yet.
  const file = about.name === "the input" ? "FILE" : String(about.name);
  const output = file.split("/").pop().replace(/(.)\.[^.]*$/, "$1") + ".fewbits";
  return `fewbits encode ${shellQuote(file)} --method ${shellQuote(point.spec)}`
    + ` -o ${shellQuote(output)}`;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Without leave to write to the clipboard, select the command for the reader to copy.
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function answer(form, point, otherwise) {
  const place = form.querySelector(".answer");
  if (!point) return place.replaceChildren(html("p", { class: "none" }, otherwise));
  const command = commandFor(point);
  const button = html("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", () => copy(command, button));
  return place.replaceChildren(
    html("p", { class: "spec mono" }, swatch(point.method), point.spec),
    html("p", {}, `${countText(point.bytes_per_item)} bytes · `
      + `${ratioText(point.ratio)} smaller · ${state.quality} `
      + qualityText(qualityOf(point), state.quality)),
    html("div", { class: "command" }, html("code", {}, command), button),
  );
}

function drawChoices() {
  const top = shown().sort((a, b) => gainOf(b) - gainOf(a))[0];
  const low = shown().sort(bySize)[0];
  answer(find("smallest"), smallest(), top
    ? `Nothing shown reaches ${state.limitQuality}; the best is ${top.spec}`
      + ` with ${qualityText(qualityOf(top), state.quality)}.`
    : "No method is shown.");
  answer(find("best"), best(), low
    ? `Nothing shown is that small; the smallest is ${low.spec}`
      + ` with ${countText(low.bytes_per_item)} bytes.`
    : "No method is shown.");
  answer(find("picked"), points[state.picked],
    "Click a point in the plot, or a method in the table, to see its command here.");
}

function setUpSizeLimit() {
  const all = points.filter(canDraw).map((point) => point.bytes_per_item);
  const sizes = [...new Set(all)].sort((a, b) => a - b);
  const [number, slider] = find("best").querySelectorAll("input");
  // The slider steps from one size that was measured to the next; the field takes any.
  const show = () => {
    slider.value = sizes.filter((size) => size <= state.mostBytes).length - 1;
    slider.setAttribute("aria-valuetext", `${countText(state.mostBytes)} bytes`);
  };
  slider.max = sizes.length - 1;
  const usual = about.bytes_per_item / words.usual_ratio;
  state.mostBytes = sizes.findLast((size) => size <= usual) ?? sizes[0];
  number.value = state.mostBytes;
  show();
  slider.addEventListener("input", () => {
    number.value = state.mostBytes = sizes[slider.value];
    show();
    draw();
  });
  number.addEventListener("input", () => {
    state.mostBytes = number.value === "" ? Infinity : Number(number.value);
    show();
    draw();
  });
}

function setUpQualityLimit() {
  const [number, slider] = find("smallest").querySelectorAll("input");
  for (const [input, other] of [[number, slider], [slider, number]]) {
    input.addEventListener("input", () => {
      state.limitQuality = Number(input.value);
      other.value = input.value;
      draw();
    });
  }
  resetQualityLimit();
}

/** Starts the limit of a newly chosen quality at 95 % of the best; in the middle if less is better. */
function resetQualityLimit() {
  const values = points.filter(canDraw).map(qualityOf).sort((a, b) => a - b);
  const [number, slider] = find("smallest").querySelectorAll("input");
  const [least, most] = [values[0], values.at(-1)];
  number.step = slider.step = lessIsBetter() ? 0.0001 : 0.001;
  slider.min = Math.floor(least * 1000) / 1000;
  slider.max = lessIsBetter() ? Math.ceil(most * 1000) / 1000 : Math.floor(most * 1000) / 1000;
  state.limitQuality = lessIsBetter()
    ? Number(values[Math.floor(values.length / 2)].toPrecision(3)) : Math.floor(950 * most) / 1000;
  slider.value = number.value = state.limitQuality;
  find("quality-name").textContent = state.quality;
  find("quality-sign").textContent = lessIsBetter() ? "≤" : "≥";
  find("direction").textContent = lessIsBetter() ? "Down" : "Up";
}

// -- legend and table --------------------------------------------------------------------

function brighten(method) {
  find("canvas").classList.toggle("dimmed", method !== null && !state.hidden.has(method));
  for (const marker of find("canvas").querySelectorAll(".marker")) {
    marker.classList.toggle("bright", marker.dataset.method === method);
  }
}
function setUpLegend() {
  for (const method of methods) {
    const box = html("input", { type: "checkbox", checked: "", value: method });
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(method);
      else state.hidden.add(method);
      draw();
      brighten(null);
    });
    find("methods").append(html("label", {
      onpointerenter: () => brighten(method), onpointerleave: () => brighten(null),
    }, box, swatch(method), html("span", {}, method)));
  }
  const setAll = (hide) => {
    state.hidden = new Set(hide ? methods : []);
    draw();
  };
  find("all").addEventListener("click", () => setAll(false));
  find("none").addEventListener("click", () => setAll(true));
}
function drawLegend() {
  for (const label of find("methods").children) {
    const box = label.querySelector("input");
    box.checked = !state.hidden.has(box.value);
    label.classList.toggle("off", !box.checked);
  }
}

const FIGURES = {
  bytes_per_item: [(point) => point.bytes_per_item, countText],
  ratio: [(point) => point.ratio, ratioText],
  share: [(point) => point.ratio, shareText],
  codec_bytes: [(point) => point.codec_bytes, sizeText],
  encode_per_second: [(point) => point.encode_per_second, rateText],
  search_per_second: [(point) => point.search_per_second, rateText],
  fit_seconds: [(point) => point.fit_seconds, secondsText],
};
const figures = Object.entries(words.columns).map(([name, head]) => [head, FIGURES[name]]);
const COLUMNS = new Map([
  ["method", [(point) => point.spec, String]],
  ...figures.slice(0, 2),
  ...qualities.map((name) =>
    [name, [(point) => point.quality[name], (value) => qualityText(value, name)]]),
  ...figures.slice(2),
]);

function setUpTable() {
  const row = find("table").tHead.rows[0];
  row.append(html("th", { scope: "col", "aria-label": "on the frontier" }));
  for (const name of COLUMNS.keys()) {
    const button = html("button", { type: "button" }, name);
    button.addEventListener("click", () => {
      const { column, descending } = state.sort;
      const fromHigh = name !== "method" && name !== words.columns.bytes_per_item
        && !words.less_is_better.includes(name);
      state.sort = { column: name, descending: column === name ? !descending : fromHigh };
      drawTable();
    });
    row.append(html("th", { scope: "col", "data-column": name }, button));
  }
}
function compareBy({ column, descending }) {
  const [value] = COLUMNS.get(column);
  return (a, b) => {
    const [left, right] = [value(a), value(b)];
    if (typeof left === "string") return left.localeCompare(right) * (descending ? -1 : 1);
    if (!isNumber(left) || !isNumber(right)) return isNumber(right) - isNumber(left);
    return (descending ? right - left : left - right) || a.index - b.index;
  };
}
function drawTable() {
  const table = find("table");
  const rows = points.filter((point) => !state.hidden.has(point.method));
  const front = new Set(frontierOf(shown()));
  for (const head of table.tHead.querySelectorAll("[data-column]")) {
    const way = state.sort.descending ? "descending" : "ascending";
    head.setAttribute("aria-sort", head.dataset.column === state.sort.column ? way : "none");
  }
  table.tBodies[0].replaceChildren(...rows.sort(compareBy(state.sort)).map((point) => {
    const letters = chosen().filter(([, other]) => other === point).map(([letter]) => letter);
    const [, ...figures] = COLUMNS.values();
    const button = html("button", {
      type: "button", class: "mono", title: "Show the command for this point",
      onclick: () => pick(point.index),
    }, swatch(point.method), point.spec);
    return html("tr", {
      "data-index": point.index, class: front.has(point) ? "on-frontier" : "",
    },
    html("td", {}, front.has(point) ? "●" : ""),
    html("td", {}, button, ...letters.map((letter) => html("span", { class: "badge" }, letter))),
    ...figures.map(([value, write]) => html("td", {}, write(value(point)))));
  }));
  find("shown").textContent = `${rows.length} of ${points.length} shown`;
}

// -- the whole page ----------------------------------------------------------------------

function draw() {
  drawChoices();
  drawLegend();
  drawPlot();
  drawTable();
}
function start() {
  const empty = !points.some(canDraw);
  find("nothing").hidden = !empty;
  find("figures").hidden = empty;
  if (empty) return;
  for (const name of qualities) find("quality").append(html("option", { value: name }, name));
  find("quality").value = state.quality;
  find("quality").addEventListener("change", (event) => {
    state.quality = event.target.value;
    state.view = null;
    resetQualityLimit();
    draw();
  });
  find("frontier").addEventListener("change", (event) => {
    state.frontier = event.target.checked;
    drawPlot();
  });
  find("zoom-in").addEventListener("click", () => zoom(0.7));
  find("zoom-out").addEventListener("click", () => zoom(1 / 0.7));
  find("reset").addEventListener("click", resetView);
  setUpPointer(find("canvas"));
  find("canvas").addEventListener("keydown", onKey);
  setUpSizeLimit();
  setUpQualityLimit();
  for (const form of document.forms) form.addEventListener("submit", (e) => e.preventDefault());
  setUpLegend();
  setUpTable();
  draw();
  new ResizeObserver(() => {
    if (find("plot").clientWidth !== plot.width) drawPlot();
  }).observe(find("plot"));
}
start();
