"use strict";
// The plot of the report page: axes, frontier, points, pointing and zoom. Uses report_page.js.

const MARGIN = { left: 52, right: 16, top: 30, bottom: 46 };
const plot = { width: 0, height: 0 };

/** A quality as a height in the plot: itself, or its logarithm, with 0 below all that is above it. */
function heightOf(quality) {
  if (!words.logarithmic.includes(state.quality)) return quality;
  const above = points.filter(canDraw).map(qualityOf).filter((value) => value > 0);
  return Math.log10(Math.max(quality, (above.length ? Math.min(...above) : 1) / 2));
}

/** The view that shows everything. Hidden methods count too, so that filtering moves nothing. */
function wholeView() {
  const drawn = points.filter(canDraw);
  const xs = drawn.map((point) => Math.log2(point.bytes_per_item));
  const ys = drawn.map((point) => heightOf(qualityOf(point)));
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const [padX, padY] = [(x1 - x0) * 0.05 || 0.5, (y1 - y0) * 0.07 || 0.05];
  return { x0: x0 - padX, x1: x1 + padX, y0: y0 - padY, y1: y1 + padY };
}
const view = () => state.view ?? wholeView();

function scales() {
  const { x0, x1, y0, y1 } = view();
  const wide = plot.width - MARGIN.left - MARGIN.right;
  const high = plot.height - MARGIN.top - MARGIN.bottom;
  return {
    x: (value) => MARGIN.left + ((value - x0) / (x1 - x0)) * wide,
    y: (value) => MARGIN.top + ((y1 - value) / (y1 - y0)) * high,
    unX: (pixel) => x0 + ((pixel - MARGIN.left) / wide) * (x1 - x0),
    unY: (pixel) => y1 - ((pixel - MARGIN.top) / high) * (y1 - y0),
  };
}
function placeOf(point, scale = scales()) {
  return [scale.x(Math.log2(point.bytes_per_item)), scale.y(heightOf(qualityOf(point)))];
}

/** Byte ticks: powers of two, thinned or halved until they stand 62 pixels apart or more. */
function byteTicks(scale) {
  const { x0, x1 } = view();
  const octave = scale.x(1) - scale.x(0);
  const every = Math.max(1, Math.ceil(62 / octave));
  const parts = every > 1 ? 1 : 2 ** Math.floor(Math.log2(Math.max(1, octave / 62)));
  const ticks = [];
  for (let power = Math.floor(x0); power <= x1; power += 1) {
    if (power % every !== 0) continue;
    for (let part = 0; part < parts; part += 1) ticks.push(2 ** power * (1 + part / parts));
  }
  return ticks.filter((tick) => Math.log2(tick) >= x0 && Math.log2(tick) <= x1);
}
/** Heights and texts of the ticks of a logarithmic scale: tenfold steps, with 2 and 5 if few. */
function logarithmicTicks() {
  const { y0, y1 } = view();
  const steps = y1 - y0 > 3 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(y0); power <= y1; power += 1) {
    for (const step of steps) ticks.push([power + Math.log10(step), step * 10 ** power]);
  }
  return ticks.filter(([height]) => height >= y0 && height <= y1)
    .map(([height, value]) =>
      [height, value < 0.0009 ? value.toExponential(0) : String(Number(value.toPrecision(1)))]);
}
function qualityTicks() {
  if (words.logarithmic.includes(state.quality)) return logarithmicTicks();
  const { y0, y1 } = view();
  const rough = (y1 - y0) / (plot.height / 70);
  const ten = 10 ** Math.floor(Math.log10(rough));
  const step = ten * [1, 2, 5, 10].find((factor) => factor * ten >= rough);
  const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let k = Math.ceil(y0 / step); k * step <= y1; k += 1) {
    ticks.push([k * step, (k * step).toFixed(places)]);
  }
  return ticks;
}

function drawAxes(scale) {
  const right = plot.width - MARGIN.right;
  const bottom = plot.height - MARGIN.bottom;
  const group = svg("g", { id: "axes", "aria-hidden": "true" });
  for (const tick of byteTicks(scale)) {
    const x = scale.x(Math.log2(tick));
    group.append(
      svg("line", { class: "gridline", x1: x, x2: x, y1: MARGIN.top, y2: bottom }),
      svg("text", { class: "x-tick", x, y: bottom + 18, "text-anchor": "middle" },
        decimals(tick, 3)),
    );
  }
  for (const [height, text] of qualityTicks()) {
    const y = scale.y(height);
    group.append(
      svg("line", { class: "gridline", x1: MARGIN.left, x2: right, y1: y, y2: y }),
      svg("text", { class: "y-tick", x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, text),
    );
  }
  group.append(
    svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
    svg("text", { class: "label", x: 4, y: 16 }, `${state.quality} ${lessIsBetter() ? "↓" : "↑"}`),
    svg("text", { class: "label", x: right, y: bottom + 38, "text-anchor": "end" },
      `← ${words.sizes} (log scale)`),
  );
  return group;
}

function drawLimits(scale) {
  const group = svg("g", { "aria-hidden": "true" });
  const vertical = (bytes, name, text) => {
    const x = scale.x(Math.log2(bytes));
    if (!(x >= MARGIN.left && x <= plot.width - MARGIN.right)) return;
    group.append(
      svg("line", { class: name, x1: x, x2: x, y1: 0, y2: plot.height }),
      svg("text", { x: x - 5, y: plot.height - MARGIN.bottom - 8, "text-anchor": "end" }, text),
    );
  };
  vertical(about.bytes_per_item, "original", words.whole);
  vertical(state.mostBytes, "limit-line", "");
  const y = scale.y(heightOf(state.limitQuality));
  group.append(svg("line", { class: "limit-line", x1: 0, x2: plot.width, y1: y, y2: y }));
  return group;
}

/** Steps, not slopes: between two sizes nothing better than the smaller one was measured. */
function drawFrontier(scale) {
  const places = frontierOf(shown()).map((point) => placeOf(point, scale));
  const path = places.map(([x, y], index) => (index ? `H${x}V${y}` : `M${x},${y}`)).join("");
  return svg("path", { class: "frontier", d: path });
}

function pointLabel(point) {
  return `${point.spec}: ${countText(point.bytes_per_item)} ${words.sizes}, `
    + `${state.quality} ${qualityText(qualityOf(point), state.quality)}`;
}
function drawMarkers(scale) {
  const group = svg("g", { id: "markers" });
  const front = new Set(frontierOf(shown()));
  // The frontier is drawn last, on top; arrow keys go by size all the same.
  const order = shown().sort((a, b) => front.has(a) - front.has(b) || bySize(a, b));
  for (const point of order) {
    const [x, y] = placeOf(point, scale);
    const radius = front.has(point) ? 6 : 5;
    group.append(svg("g", {
      class: front.has(point) || !state.frontier ? "marker" : "marker behind",
      transform: `translate(${x},${y})`, "data-index": point.index, "data-method": point.method,
      role: "button", tabindex: -1, "aria-label": pointLabel(point),
      onfocus: () => focusPoint(point.index), onblur: () => activate(null),
    }, svg("circle", { class: "halo", r: radius + 4 }), shape(point.method, radius)));
  }
  return group;
}

function drawChosen(scale) {
  const group = svg("g", { "aria-hidden": "true" });
  const seen = new Map();
  for (const [letter, point] of chosen()) {
    if (!shown().includes(point)) continue;
    const [x, y] = placeOf(point, scale);
    const nth = seen.get(point) ?? 0; // a point chosen twice gets its letters side by side
    seen.set(point, nth + 1);
    const tag = svg("g", { transform: `translate(${x - 13 + 18 * nth},${y - 15})` },
      svg("circle", { class: "tag", r: 9 }),
      svg("text", { "text-anchor": "middle", y: 4 }, letter));
    group.append(svg("g", { class: "chosen", "data-letter": letter, "data-index": point.index },
      svg("circle", { cx: x, cy: y, r: 11 }), tag));
  }
  return group;
}

let focused = null; // index of the point that the Tab key leads to
function drawPlot() {
  const canvas = find("canvas");
  const hadFocus = canvas.contains(document.activeElement);
  plot.width = find("plot").clientWidth;
  plot.height = Math.round(Math.min(520, Math.max(320, plot.width * 0.56)));
  canvas.setAttribute("viewBox", `0 0 ${plot.width} ${plot.height}`);
  canvas.setAttribute("aria-label", `${state.quality} against ${words.sizes}`);
  const scale = scales();
  const clip = svg("clipPath", { id: "inside" }, svg("rect", {
    x: MARGIN.left - 6, y: MARGIN.top - 6,
    width: plot.width - MARGIN.left - MARGIN.right + 12,
    height: plot.height - MARGIN.top - MARGIN.bottom + 6,
  }));
  canvas.replaceChildren(clip, drawAxes(scale), svg("g", { "clip-path": "url(#inside)" },
    drawLimits(scale), state.frontier ? drawFrontier(scale) : "", drawMarkers(scale),
    drawChosen(scale)));
  const stop = markerOf(focused) ?? markerOf(shown().sort(bySize)[0]?.index);
  stop?.setAttribute("tabindex", 0);
  if (hadFocus) stop?.focus();
}
const markerOf = (index) => find("canvas").querySelector(`[data-index="${index}"].marker`);

// -- pointing at things ------------------------------------------------------------------

function tooltipRows(point) {
  const { columns } = words;
  return [
    ["method", point.method],
    [words.sizes, countText(point.bytes_per_item)],
    ["smaller by", ratioText(point.ratio)],
    ...qualities.map((name) => [name, qualityText(point.quality[name], name)]),
    [`${words.paid_once}, paid once`, sizeText(point.codec_bytes)],
    [`… per ${words.item} here`, sizeText(point.codec_bytes / about.rows)],
    [columns.encode_per_second.replace("/s", ""), `${rateText(point.encode_per_second)}/s`],
    [columns.search_per_second.replace("/s", ""), `${rateText(point.search_per_second)}/s`],
    ["fit", `${secondsText(point.fit_seconds)} s`],
  ];
}

/** Marks a point in plot and table and shows its figures; null clears. */
function activate(index) {
  const tooltip = find("tooltip");
  for (const element of document.querySelectorAll(".active")) element.classList.remove("active");
  const marker = index === null ? null : markerOf(index);
  tooltip.hidden = !marker;
  if (!marker) return;
  marker.classList.add("active");
  find("table").querySelector(`tr[data-index="${index}"]`)?.classList.add("active");
  const point = points[index];
  tooltip.replaceChildren(
    html("strong", { class: "mono" }, point.spec),
    html("dl", {}, ...tooltipRows(point).flatMap(([name, text]) =>
      [html("dt", {}, name), html("dd", {}, text)])),
  );
  const [x, y] = placeOf(point);
  const left = x + 18 + tooltip.offsetWidth > plot.width ? x - 18 - tooltip.offsetWidth : x + 18;
  const top = Math.min(Math.max(0, y - 30), Math.max(0, plot.height - tooltip.offsetHeight));
  tooltip.style.left = `${Math.max(0, left)}px`;
  tooltip.style.top = `${top}px`;
}
function focusPoint(index) {
  focused = index;
  for (const marker of find("canvas").querySelectorAll(".marker")) {
    marker.setAttribute("tabindex", -1);
  }
  markerOf(index).setAttribute("tabindex", 0);
  activate(index);
}
function pick(index) {
  state.picked = index;
  draw();
  activate(index);
}

const pixelOf = (event) => {
  const box = find("canvas").getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
function nearest(event) {
  const [x, y] = pixelOf(event);
  const scale = scales();
  const near = shown().map((point) => {
    const [px, py] = placeOf(point, scale);
    return { point, distance: Math.hypot(px - x, py - y) };
  }).sort((a, b) => a.distance - b.distance)[0];
  return near && near.distance < 22 ? near.point.index : null;
}

// -- zoom --------------------------------------------------------------------------------

/** Sets the view, kept within the whole and not closer than figures can tell apart. */
function setView(wanted) {
  const whole = wholeView();
  const span = (low, high, least, most) => Math.min(Math.max(high - low, least), most);
  const width = span(wanted.x0, wanted.x1, 0.05, whole.x1 - whole.x0);
  const height = span(wanted.y0, wanted.y1, 0.004, whole.y1 - whole.y0);
  const x0 = Math.min(Math.max(wanted.x0, whole.x0), whole.x1 - width);
  const y0 = Math.min(Math.max(wanted.y0, whole.y0), whole.y1 - height);
  const all = width === whole.x1 - whole.x0 && height === whole.y1 - whole.y0;
  state.view = all ? null : { x0, x1: x0 + width, y0, y1: y0 + height };
  drawPlot();
}
function zoom(factor, [px, py] = [plot.width / 2, plot.height / 2]) {
  const scale = scales();
  const [x, y] = [scale.unX(px), scale.unY(py)];
  const { x0, x1, y0, y1 } = view();
  setView({
    x0: x - (x - x0) * factor, x1: x + (x1 - x) * factor,
    y0: y - (y - y0) * factor, y1: y + (y1 - y) * factor,
  });
}
function resetView() {
  state.view = null;
  drawPlot();
}

let drag = null; // where a drag began, and its rectangle
function setUpPointer(canvas) {
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button === 0) drag = { start: pixelOf(event), box: null };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag || event.pointerType === "touch") return activate(nearest(event));
    const [[ax, ay], [bx, by]] = [drag.start, pixelOf(event)];
    if (!drag.box && Math.hypot(bx - ax, by - ay) < 6) return undefined;
    if (!drag.box) {
      canvas.setPointerCapture(event.pointerId);
      canvas.append(drag.box = svg("rect", { class: "box" }));
      activate(null);
    }
    return fill(drag.box, {
      x: Math.min(ax, bx), y: Math.min(ay, by), width: Math.abs(bx - ax), height: Math.abs(by - ay),
    }, []);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag?.box) {
      const scale = scales();
      const [xs, ys] = [[drag.start[0], pixelOf(event)[0]], [drag.start[1], pixelOf(event)[1]]];
      setView({
        x0: scale.unX(Math.min(...xs)), x1: scale.unX(Math.max(...xs)),
        y0: scale.unY(Math.max(...ys)), y1: scale.unY(Math.min(...ys)),
      });
    } else if (drag && nearest(event) !== null) pick(nearest(event));
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => { drag?.box?.remove(); drag = null; });
  canvas.addEventListener("pointerleave", () => activate(null));
  canvas.addEventListener("dblclick", resetView);
  canvas.addEventListener("wheel", (event) => {
    if (event.deltaY > 0 && state.view === null) return; // nothing to zoom out: scroll the page
    event.preventDefault();
    zoom(Math.exp(Math.max(-120, Math.min(120, event.deltaY)) * 0.002), pixelOf(event));
  }, { passive: false });
}

function moveFocus(step) {
  const order = shown().sort(bySize);
  const now = order.findIndex((point) => point.index === focused);
  const next = order[Math.min(Math.max(now + step, 0), order.length - 1)];
  const { x0, x1, y0, y1 } = view();
  const [x, y] = [Math.log2(next.bytes_per_item), heightOf(qualityOf(next))];
  if (x < x0 || x > x1 || y < y0 || y > y1) {
    const [width, height] = [(x1 - x0) / 2, (y1 - y0) / 2];
    setView({ x0: x - width, x1: x + width, y0: y - height, y1: y + height });
  }
  markerOf(next.index).focus();
}
function onKey(event) {
  const actions = {
    ArrowRight: () => moveFocus(1), ArrowLeft: () => moveFocus(-1),
    ArrowDown: () => moveFocus(1), ArrowUp: () => moveFocus(-1),
    Home: () => moveFocus(-points.length), End: () => moveFocus(points.length),
    Enter: () => pick(focused), " ": () => pick(focused), Escape: () => activate(null),
    "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), 0: resetView,
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
}
