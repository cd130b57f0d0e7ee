// One chart: lines over an axis as SVG, with a cross that all charts of an axis share.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; text is text, never markup. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "rect", "circle", "title", "clipPath", "defs"];
  const made = svg.includes(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "colour") made.style.setProperty("--colour", value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

/** A short piece of line, as in a legend. */
function sample(colour, dash) {
  const line = make("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash });
  return make("svg", { width: 22, height: 10, "aria-hidden": "true" }, line);
}

const charts = new Map(); // by figure: the chart that is drawn in it

/**
 * Draws a chart into a figure of `parent`, which is kept by `id` for the next time.
 *
 * lines: [{label, colour, dash, x, y, lo, hi, smoothed, faint, dots, edges}]; x ascend.
 * axis: {kind: "time" or "sigma", label, format, read, range, unit}; marks: [{x, label, colour, title}];
 * at: [{x, colour}], the moment that the scrubber is at.
 */
function draw(parent, id, chart) {
  let figure = [...parent.children].find((f) => f.dataset.id === id);
  if (!figure) {
    figure = make("figure", { class: "chart", "data-id": id });
    parent.append(figure);
    sizes.observe(figure);
  }
  figure.classList.toggle("wide", Boolean(chart.wide));
  charts.set(figure, chart);
  render(figure);
}

/** Removes the charts of `parent` whose id is not among those that are wanted. */
function keepOnly(parent, ids) {
  for (const figure of [...parent.children]) {
    if (ids.includes(figure.dataset.id)) continue;
    charts.delete(figure);
    sizes.unobserve(figure);
    figure.remove();
  }
}

const sizes = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const chart = charts.get(target);
    if (chart && chart.drawn !== Math.round(contentRect.width)) render(target);
  }
});

function render(figure) {
  const chart = charts.get(figure), width = Math.max(180, figure.clientWidth - 24);
  chart.drawn = Math.round(figure.clientWidth - 24);
  const height = chart.height || (chart.wide ? Math.min(340, Math.max(220, width * 0.42)) : 190);
  const lines = chart.lines.map((l) => ({ ...l, shown: within(l, chart.axis.range) }));
  const ys = lines.flatMap((l) => [l.shown.y, l.shown.lo || [], l.shown.hi || []]);
  const log = chart.log && extent(ys, true) !== null;
  const yRange = padded(extent(ys, log) || [0, 1], log), xLog = chart.axis.kind === "sigma";
  const yTicks = log ? logTicks(...yRange, height / 38) : scaled(yRange, height / 45, chart.unit);
  const labels = labelled(yTicks, chart.format);
  const left = 12 + 6.6 * Math.max(2, ...labels.map((l) => l.length)), right = 10, bottom = 34;
  const top = chart.marks && chart.marks.length ? 20 : 8;
  const [x0, x1] = chart.axis.range;
  const fx = (v) => left + ((xLog ? Math.log(v / x0) / Math.log(x1 / x0) : (v - x0) / (x1 - x0)) * (width - left - right));
  const [y0, y1] = yRange;
  const fy = (v) => height - bottom - (log ? Math.log(Math.max(v, y0 / 10) / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0)) * (height - bottom - top);
  const back = (px) => { const s = (px - left) / (width - left - right); return xLog ? x0 * (x1 / x0) ** s : x0 + s * (x1 - x0); };
  Object.assign(chart, { fx, fy, back, left, right, top, bottom, width, height, log });
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spoken(chart) });
  yTicks.forEach((t, i) => svg.append(
    make("line", { class: "grid", x1: left, x2: width - right, y1: fy(t), y2: fy(t) }),
    make("text", { x: left - 6, y: fy(t) + 4, "text-anchor": "end" }, labels[i])));
  const space = width - left - right, xTicks = xLog ? logTicks(x0, x1, space / 70) : scaled([x0, x1], Math.max(2, space / 85), chart.axis.unit);
  svg.append(make("line", { class: "base", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  labelled(xTicks, chart.axis.format).forEach((label, i) => svg.append(
    make("text", { x: Math.min(fx(xTicks[i]), width - right - 12), y: height - bottom + 15, "text-anchor": "middle" }, label)));
  svg.append(make("text", { x: left + space / 2, y: height - 4, "text-anchor": "middle" }, chart.axis.label));
  const clip = `clip-${chart.id}`, inner = make("g", { "clip-path": `url(#${clip})` });
  svg.append(make("defs", {}, make("clipPath", { id: clip }, make("rect", { x: left, y: top - 2, width: space, height: Math.max(1, height - bottom - top + 4) }))));
  for (const line of lines) inner.append(...paths(line, chart));
  for (const { x, colour } of chart.at || []) {
    if (x >= x0 && x <= x1) inner.append(make("line", { class: "at", x1: fx(x), x2: fx(x), y1: top, y2: height - bottom, style: `stroke:${colour}` }));
  }
  svg.append(inner, ...markers(chart));
  svg.append(make("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" }));
  if (!lines.some((l) => l.shown.x.length)) svg.append(make("text", { x: left + space / 2, y: height / 2 - 10, "text-anchor": "middle" }, chart.none || "nothing here yet"));
  listen(svg, chart);
  figure.replaceChildren(make("figcaption", {}, make("span", {}, chart.title), make("small", {}, chart.note || "")), svg, ...(chart.key ? [key(chart.key)] : []));
}

/** Round numbers of `unit`, which is a number or a function of the greatest value. */
function scaled([low, high], count, unit = 1) {
  const one = typeof unit === "function" ? unit(high) : unit;
  return ticks(low / one, high / one, count).map((t) => t * one);
}

/** The labels of ticks, with as many digits as tell them apart. */
function labelled(values, format) {
  for (const digits of [3, 4, 5, 6, 8, 10]) {
    const labels = values.map((v) => format(v, digits));
    if (new Set(labels).size === labels.length) return labels;
  }
  return values.map((v) => format(v, 12));
}

/** The points of a line in a range of x, with one on each side of it. */
function within(line, [low, high]) {
  const from = Math.max(0, before(line.x, low)), to = Math.min(line.x.length, before(line.x, high) + 2);
  const cut = (list) => (list ? list.slice(from, to) : undefined);
  return { x: cut(line.x), y: cut(line.y), lo: cut(line.lo), hi: cut(line.hi), smoothed: cut(line.smoothed) };
}

function paths(line, chart) {
  const { x, y, lo, hi, smoothed } = line.shown, found = [];
  const usable = (v) => v !== null && Number.isFinite(v) && !(chart.log && v <= 0);
  const trace = (values) => {
    let d = "", open = false;
    values.forEach((v, i) => {
      if (!usable(v)) { open = false; return; }
      d += `${open ? "L" : "M"}${chart.fx(x[i]).toFixed(1)} ${chart.fy(v).toFixed(1)}`;
      open = true;
    });
    return d;
  };
  if (lo) {
    const up = hi.map((v, i) => `${chart.fx(x[i]).toFixed(1)} ${chart.fy(v).toFixed(1)}`);
    const down = lo.map((v, i) => `${chart.fx(x[i]).toFixed(1)} ${chart.fy(v).toFixed(1)}`).reverse();
    if (up.length) found.push(make("path", { class: "band", d: `M${up.join("L")}L${down.join("L")}Z`, style: `fill:${line.colour}` }));
  }
  const stroke = { "stroke-dasharray": line.dash, style: `stroke:${line.colour}` };
  if (smoothed) found.push(make("path", { class: "raw", d: trace(y), style: `stroke:${line.colour}` }));
  found.push(make("path", { class: line.faint ? "first" : "", d: trace(smoothed || y), ...stroke }));
  if (line.edges) y.forEach((v, i) => usable(v) && found.push(make("path", { class: "bin", d: `M${chart.fx(line.edges[i])} ${chart.fy(v)}H${chart.fx(line.edges[i + 1])}`, style: `stroke:${line.colour}` })));
  if (line.dots || x.length === 1) {
    x.forEach((v, i) => usable(y[i]) && found.push(make("circle", { cx: chart.fx(v), cy: chart.fy(y[i]), r: 2.6, style: `fill:${line.colour};opacity:${line.faint ? 0.4 : 1}` })));
  }
  return found;
}

/** Events on the axis: those that would lie on each other are one, with their number. */
function markers(chart) {
  const [x0, x1] = chart.axis.range, groups = [];
  for (const mark of (chart.marks || []).filter((m) => m.x >= x0 && m.x <= x1)) {
    const at = chart.fx(mark.x), last = groups[groups.length - 1];
    if (last && at - last.at < 7) last.held.push(mark); else groups.push({ at, held: [mark] });
  }
  return groups.map(({ at, held }, i) => {
    const room = (i + 1 < groups.length ? groups[i + 1].at : chart.width) - at;
    const first = held[0], label = held.length > 1 ? `${held.length} events` : first.label;
    const shown = room > 12 + 5.8 * label.length ? label : "";
    return make("g", { class: "mark" },
      make("line", { x1: at, x2: at, y1: chart.top - 6, y2: chart.height - chart.bottom, style: `stroke:${first.colour}` }),
      make("path", { d: `M${at - 4} ${chart.top - 12}h8l-4 7z`, style: `fill:${first.colour}` }),
      make("text", { x: at + 7, y: chart.top - 6 }, shown),
      make("title", {}, held.slice(0, 12).map((m) => m.title).join("\n")));
  });
}

const key = (entries) => make("div", { class: "key" }, ...entries.map((e) => make("span", {}, sample(e.colour, e.dash), e.label)));

/** What a screen reader says of a chart: each line's first and last value. */
function spoken(chart) {
  const told = chart.lines.filter((l) => l.y.length).map((l) => `${l.label}: from ${chart.format(l.y[0])} to ${chart.format(l.y[l.y.length - 1])}`);
  return `${chart.title} over ${chart.axis.label}. ${told.join("; ") || "no values yet"}`;
}

/** Reads values under the pointer; a mouse that is dragged over a time axis zooms in. */
function listen(svg, chart) {
  let from = null, box = null;
  const place = (event) => (event.clientX - svg.getBoundingClientRect().left) * (chart.width / svg.getBoundingClientRect().width);
  const inside = (px) => Math.min(Math.max(px, chart.left), chart.width - chart.right);
  svg.addEventListener("pointermove", (event) => {
    const px = inside(place(event));
    cross(chart, chart.back(px));
    tell(chart, chart.back(px), event);
    if (from === null) return;
    if (!box) svg.append(box = make("rect", { class: "select", y: chart.top, height: chart.height - chart.bottom - chart.top }));
    box.setAttribute("x", Math.min(from, px));
    box.setAttribute("width", Math.abs(px - from));
  });
  svg.addEventListener("pointerleave", () => { cross(chart, null); document.getElementById("tip").hidden = true; });
  svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button || !chart.onzoom) return;
    from = inside(place(event));
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    const start = from, end = inside(place(event));
    from = null;
    if (box) { box.remove(); box = null; }
    if (start !== null && Math.abs(end - start) > 6) chart.onzoom([chart.back(Math.min(start, end)), chart.back(Math.max(start, end))]);
  });
  if (chart.onzoom) svg.addEventListener("dblclick", () => chart.onzoom(null));
}

/** Shows the cross at x in all charts of the same axis, or hides it. */
function cross(origin, x) {
  for (const [figure, chart] of charts) {
    if (chart.axis.kind !== origin.axis.kind || chart.fx === undefined) continue;
    const line = figure.querySelector(".cross"), visible = x !== null && x >= chart.axis.range[0] && x <= chart.axis.range[1];
    if (!line) continue;
    line.setAttribute("visibility", visible ? "visible" : "hidden");
    if (visible) for (const end of ["x1", "x2"]) line.setAttribute(end, chart.fx(x));
  }
}

/** The values of all lines at x, beside the pointer. */
function tell(chart, x, event) {
  const tip = document.getElementById("tip"), rows = [];
  for (const line of chart.lines.filter((l) => !l.faint)) {
    const i = line.edges ? Math.min(Math.max(before(line.edges, x), 0), line.x.length - 1) : nearest(line.x, x);
    const reach = (chart.axis.range[1] - chart.axis.range[0]) * 0.05;
    if (i < 0 || (chart.axis.kind === "time" && (x > line.x[line.x.length - 1] + reach || x < line.x[0] - reach))) continue;
    const cells = [make("td", {}, sample(line.colour, line.dash)), make("td", {}, line.label), make("td", { class: "n" }, chart.format(line.smoothed ? line.smoothed[i] : line.y[i], 5))];
    const raw = line.lo && line.lo[i] !== line.hi[i] ? `${chart.format(line.lo[i])} to ${chart.format(line.hi[i])}` : line.smoothed ? `raw ${chart.format(line.y[i])}` : "";
    rows.push(make("tr", {}, ...cells, make("td", { class: "n range" }, raw)));
  }
  const near = (chart.marks || []).filter((m) => Math.abs(chart.fx(m.x) - chart.fx(x)) < 6).slice(0, 4);
  tip.replaceChildren(make("div", {}, `${chart.title} at ${chart.axis.read(x)}`), make("table", {}, ...rows), ...near.map((m) => make("div", { class: "range" }, m.title)));
  tip.hidden = false;
  const wide = tip.offsetWidth, high = tip.offsetHeight;
  tip.style.left = `${Math.max(4, event.clientX + 16 + wide > innerWidth ? event.clientX - wide - 14 : event.clientX + 16)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - high - 6))}px`;
}
