// The page: what is shown, and what its controls change.

const $ = (id) => document.getElementById(id);
let data = JSON.parse($("data").textContent);
const view = { axis: "images", zoom: null, hidden: new Set(), weights: new Set(), kinds: new Set(), at: Infinity, quantity: null, which: null, playing: null };

const COLOURS = 8, DASHES = [null, "6 3", "2 3", "8 3 2 3", "12 4", "1 4"];
const colour = (i) => `var(--c${i % COLOURS})`;
const later = (i) => DASHES[Math.floor(i / COLOURS) % DASHES.length]; // runs beyond the colours
const shown = () => data.runs.map((run, i) => ({ run, i })).filter(({ run }) => !view.hidden.has(run.name));

const share = (v, digits = 3) => (v === null ? "–" : `${Number((100 * v).toPrecision(digits))} %`);
const rate = (v, digits = 3) => (v === 0 ? "0" : Number(v.toPrecision(digits)).toExponential().replace("e-", "e−").replace("e+", "e"));
const binary = (v) => [2 ** 30, 2 ** 20, 2 ** 10].find((size) => v >= size) || 1;
const bytes = (v, digits = 3) => {
  for (const [size, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) if (v >= size) return `${Number((v / size).toPrecision(digits))} ${name}`;
  return `${brief(v)} B`;
};
const CURVES = [
  { key: "loss", title: "training loss", wide: true, log: true, smooth: true },
  { key: "grad_norm", title: "gradient norm", log: true, smooth: true },
  { key: "lr", title: "learning rate", format: rate },
  { key: "images_per_second", title: "images/s", smooth: true },
  { key: "data_wait_share", title: "waiting for data", format: share, smooth: true },
  { key: "mfu", title: "MFU", note: "share of the peak", format: share, smooth: true },
  { key: "peak_memory", title: "peak memory", format: bytes, unit: binary },
  { key: "gradient_noise_scale", title: "gradient noise scale", note: "images", log: true, smooth: true },
  { key: "skipped_steps", title: "skipped steps", quiet: true },
  { key: "rollbacks", title: "rollbacks", quiet: true },
  { key: "skipped_files", title: "skipped files", quiet: true },
];

// ---- axes -------------------------------------------------------------------------------------

const AXES = {
  images: { label: "images", format: brief, read: (v) => `${whole(v)} images` },
  macs: { label: "MACs of training", format: brief, read: (v) => `${brief(v, 4)} MACs` },
  hours: { label: "hours of training", format: brief, read: (v) => duration(v * 3600) },
};
const MINUTES = { label: "minutes of training", unit: 1 / 60, format: (v, digits) => brief(v * 60, digits) };
const convert = (run, images) => (view.axis === "images" ? images : interpolate(run.axes.images, run.axes[view.axis], images));
const drawable = (run) => Array.isArray(run.axes[view.axis]);

function timeAxis() {
  const ends = shown().filter(({ run }) => drawable(run)).map(({ run }) => convert(run, lastImages(run)));
  const range = view.zoom || [0, Math.max(0, ...ends) || 1];
  const axis = { kind: "time", range, ...AXES[view.axis] };
  return view.axis === "hours" && range[1] < 2 ? { ...axis, ...MINUTES } : axis;
}
const lastImages = (run) => Math.max(run.state.images, run.axes.images[run.axes.images.length - 1] || 0);

/** How far smoothing reaches, in images. */
function reach() {
  const part = ($("smoothing").value / 100) ** 2 * 0.2;
  return part * Math.max(1, ...shown().map(({ run }) => lastImages(run)));
}

function marks() {
  if (!$("marks").checked) return [];
  const found = shown().filter(({ run }) => drawable(run)).flatMap(({ run, i }) => run.events.filter((e) => !view.kinds.has(e.kind)).map((e) => ({
    x: convert(run, e.images), colour: colour(i), label: e.kind, title: `${run.name}, ${whole(e.images)} images: ${e.kind}${e.text ? `: ${e.text}` : ""}` })));
  return found.sort((a, b) => a.x - b.x);
}

const onzoom = (range) => { view.zoom = range; drawTime(); };

// ---- curves -----------------------------------------------------------------------------------

function line(run, i, curve, smoothing, more = {}) {
  const made = { label: run.name, colour: colour(i), dash: later(i), ...more, x: curve.x.map((n) => convert(run, n)), y: curve.y, lo: curve.lo, hi: curve.hi };
  if (smoothing && reach() > 0) made.smoothed = smooth(curve.x, curve.y, reach());
  return made;
}

function drawTime() {
  const axis = timeAxis(), found = marks(), log = $("log").checked, at = position();
  const here = shown().filter(({ run }) => drawable(run));
  const there = view.at === Infinity ? [] : here.map(({ run, i }) => ({ x: convert(run, at), colour: colour(i) }));
  const common = { axis, onzoom, at: new Set(there.map((m) => m.x)).size > 1 ? there : there.slice(0, 1).map((m) => ({ ...m, colour: "var(--accent)" })) };
  const ids = [];
  CURVES.forEach((c, n) => {
    const held = here.filter(({ run }) => run.curves[c.key]);
    if (c.quiet && !held.some(({ run }) => run.curves[c.key].y.some((v) => v > 0))) return;
    if (c.key !== "loss" && !held.length) return;
    const each = Math.max(1, ...held.map(({ run }) => (run.curves[c.key].each || [1])[0]));
    const note = c.wide && each > 1 ? `means of up to ${whole(each)} lines; shaded: from the least to the greatest` : c.note;
    ids.push(c.key);
    draw($("curves"), c.key, { ...common, id: `t${n}`, title: c.title, wide: c.wide, note, log: log && c.log, format: c.format || brief, unit: c.unit,
      lines: held.map(({ run, i }) => line(run, i, run.curves[c.key], c.smooth)), marks: c.wide || c.key === "grad_norm" ? found : [] });
  });
  keepOnly($("curves"), ids);
  drawValidation(common, found, log);
  drawBins(common, log);
  $("zoom").hidden = !view.zoom;
  $("smoothed").textContent = reach() > 0 ? `over ${brief(reach(), 2)} images` : "off: raw";
}

// ---- validation -------------------------------------------------------------------------------

const weightNames = () => [...new Set(data.runs.flatMap((run) => run.validation.flatMap((v) => Object.keys(v.weights))))]
  .sort((a, b) => (a === "ema" ? -1 : b === "ema" ? 1 : a === "model" ? 1 : b === "model" ? -1 : a.localeCompare(b)));
const weightTitle = (name) => (name === "model" ? "raw weights" : name === "ema" ? "EMA" : name);

function drawValidation(common, found, log) {
  const names = weightNames();
  $("validation").hidden = !names.length;
  if (!names.length) return;
  const dash = (name) => DASHES[names.indexOf(name) % DASHES.length];
  const using = names.filter((n) => !view.weights.has(n));
  $("weights").replaceChildren(...names.map((name) => toggle(weightTitle(name), !view.weights.has(name), "var(--text)", dash(name), () => flip(view.weights, name))));
  const few = data.runs.every((run) => run.validation.length < 30);
  const lines = (quantity) => shown().filter(({ run }) => drawable(run)).flatMap(({ run, i }) => using.map((name) => {
    const held = run.validation.filter((v) => v.weights[name] && v.weights[name][quantity] !== null);
    const curve = { x: held.map((v) => v.images), y: held.map((v) => v.weights[name][quantity]) };
    return line(run, i, curve, false, { label: `${run.name}, ${weightTitle(name)}`, dash: dash(name), dots: few });
  }));
  const counts = [...new Set(data.runs.flatMap((run) => run.validation.map((v) => v.count)).filter(Boolean))];
  const note = counts.length ? `${counts.map(whole).join(" or ")} held-out images` : "";
  draw($("validated"), "loss", { ...common, id: "v0", title: "validation loss, weighted", note, height: 260, log, format: brief, lines: lines("loss"), marks: found });
  draw($("validated"), "x0", { ...common, id: "v1", title: "mean of (D − x0)²", note, height: 260, log, format: brief, lines: lines("x0"), marks: found });
}

// ---- by sigma ---------------------------------------------------------------------------------

/** What can be shown by sigma: of validation for each weights, and of training. */
function quantities() {
  const found = [];
  const has = (key) => data.runs.some((run) => run.validation.some((v) => Object.values(v.weights).some((w) => w[key].length)));
  if (has("loss_by_sigma")) found.push(["loss_by_sigma", "validation loss, weighted"]);
  if (has("x0_by_sigma")) found.push(["x0_by_sigma", "mean of (D − x0)² in validation"]);
  if (data.runs.some((run) => run.sigma)) found.push(["training", "training loss"]);
  return found;
}

/** The losses of a run in each bin at the last moment up to `images`, and the bins; or null. */
function levels(run, images) {
  if (view.quantity === "training") {
    if (!run.sigma) return null;
    const values = run.sigma.bins.map((bin) => { const i = before(bin.x, images); return i < 0 ? null : smooth(bin.x, bin.y, reach())[i]; });
    return { edges: run.sigma.edges, values, images };
  }
  const held = run.validation.filter((v) => v.images <= images && v.weights[view.which] && v.weights[view.which][view.quantity].length);
  const last = held[held.length - 1];
  return last ? { edges: last.edges, values: last.weights[view.which][view.quantity], images: last.images } : null;
}

/** Fills a menu, but not one that is open and has these entries already. */
function options(select, entries, chosen) {
  if ([...select.options].map((o) => o.value).join("\n") !== entries.map(([value]) => value).join("\n")) {
    select.replaceChildren(...entries.map(([value, text]) => make("option", { value }, text)));
  }
  select.value = chosen;
}

function drawLevels() {
  const kinds = quantities(), names = weightNames();
  $("levels").hidden = !kinds.length;
  if (!kinds.length) return;
  if (!kinds.some(([key]) => key === view.quantity)) view.quantity = kinds[0][0];
  if (!names.includes(view.which)) view.which = names[0];
  options($("quantity"), kinds, view.quantity);
  options($("which"), names.map((n) => [n, weightTitle(n)]), view.which);
  $("whose").hidden = view.quantity === "training" || names.length < 2;
  const at = position(), held = shown().map(({ run, i }) => ({ run, i, now: levels(run, at), first: levels(run, firstLevel(run)) })).filter((h) => h.now);
  const range = extent(held.map((h) => nearer(h.now.edges)), true) || [0.01, 100], ends = extent(held.map((h) => h.now.edges), true);
  const cut = ends && (ends[0] < range[0] || ends[1] > range[1]) ? `; the outermost bins go on to ${brief(ends[0], 3)} and ${brief(ends[1], 3)}` : "";
  const axis = { kind: "sigma", label: "sigma (log scale)", range, format: brief, read: (v) => `sigma ${brief(v, 3)}` };
  const line = ({ run, i }, level, faint) => ({ label: faint ? `${run.name}, first` : run.name, colour: colour(i), dash: later(i), faint, dots: true, edges: faint ? null : nearer(level.edges), x: middles(nearer(level.edges)), y: level.values });
  const lines = held.flatMap((h) => (h.first && h.first.images < h.now.images ? [line(h, h.first, true)] : []).concat([line(h, h.now, false)]));
  const of = view.quantity === "training" ? "" : `, ${weightTitle(view.which)}`;
  draw($("sigma"), "levels", { axis, id: "s0", wide: true, title: `${kinds.find(([k]) => k === view.quantity)[1]}${of}`, note: `faint: the first${cut}`, log: $("log").checked, format: brief, lines });
}
const firstLevel = (run) => (view.quantity === "training" ? Math.min(...run.sigma ? run.sigma.bins.map((b) => b.x[0] ?? Infinity) : [0]) : (run.validation[0] || { images: 0 }).images);

/** A small chart for each bin of sigma, over time. */
function drawBins(common, log) {
  drawLevels();
  const first = data.runs.map((run) => levels(run, Infinity)).find(Boolean), ids = [];
  if (!first || $("levels").hidden) return;
  first.values.forEach((_, n) => {
    const lines = shown().filter(({ run }) => drawable(run)).map(({ run, i }) => {
      if (view.quantity === "training") return run.sigma && run.sigma.bins[n] ? line(run, i, run.sigma.bins[n], true) : null;
      const held = run.validation.filter((v) => v.weights[view.which] && Number.isFinite(v.weights[view.which][view.quantity][n] ?? NaN));
      return line(run, i, { x: held.map((v) => v.images), y: held.map((v) => v.weights[view.which][view.quantity][n]) }, false, { dots: held.length < 25 });
    });
    ids.push(`bin${n}`);
    draw($("bins"), `bin${n}`, { ...common, id: `b${n}`, height: 150, title: `sigma ${brief(first.edges[n], 3)} to ${brief(first.edges[n + 1], 3)}`, log, format: brief, lines: lines.filter(Boolean) });
  });
  keepOnly($("bins"), ids);
}

// ---- the scrubber -----------------------------------------------------------------------------

/** Images of all grids and validations of the runs that are shown. */
function moments() {
  const found = new Set(shown().flatMap(({ run }) => [...run.grids.map((g) => g.images), ...run.validation.map((v) => v.images)]));
  if (!found.size) shown().forEach(({ run }) => run.sigma && run.axes.images.slice(1).forEach((n) => found.add(n)));
  return [...found].sort((a, b) => a - b);
}

/** The moment that is shown: the last one at or before the chosen images, or the first. */
function position() {
  const all = moments();
  return all.length ? all[Math.max(0, before(all, view.at))] : Infinity;
}

function go(steps) {
  const all = moments(), i = Math.min(Math.max(before(all, view.at) + steps, 0), all.length - 1);
  if (!all.length) return;
  view.at = i === all.length - 1 ? Infinity : all[i]; // at the end it stays there as more come
  moved();
}
function moved() { drawScrubbers(); drawGrids(); drawTime(); }

function drawScrubbers() {
  const all = moments(), i = Math.max(0, before(all, view.at));
  for (const box of document.querySelectorAll(".scrubber")) {
    if (!box.children.length) {
      box.append(
        make("button", { type: "button", class: "play", "aria-label": "play", onclick: play }, "▶"),
        make("input", { type: "range", min: 0, step: 1, "aria-label": "moment of training", oninput: (e) => go(e.target.value - Math.max(0, before(moments(), view.at))) }),
        make("output"));
    }
    const [button, slider, output] = box.children;
    slider.max = Math.max(0, all.length - 1);
    slider.value = i;
    slider.disabled = button.disabled = all.length < 2;
    button.textContent = view.playing ? "❚❚" : "▶";
    slider.setAttribute("aria-valuetext", all.length ? `${whole(all[i])} images` : "none");
    output.textContent = all.length ? `${whole(all[i])} images (${i + 1} of ${all.length})` : "nothing yet";
  }
}

function play() {
  if (view.playing) { clearInterval(view.playing); view.playing = null; drawScrubbers(); return; }
  if (before(moments(), view.at) >= moments().length - 1) view.at = -1;
  view.playing = setInterval(() => { go(1); if (view.at === Infinity) play(); }, 450);
  drawScrubbers();
}

document.addEventListener("keydown", (event) => {
  if (!(event.target instanceof Element) || event.target.closest("input, select, textarea, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
  if (steps === undefined) return;
  event.preventDefault();
  go(steps);
});

// ---- samples, events, settings, runs ----------------------------------------------------------

function drawGrids() {
  const held = shown().filter(({ run }) => run.grids.length);
  $("samples").hidden = !data.runs.some((run) => run.grids.length);
  const old = new Map([...$("grids").children].map((f) => [f.dataset.run, f]));
  $("grids").replaceChildren(...held.map(({ run, i }) => {
    const n = Math.max(0, before(run.grids.map((g) => g.images), position())), grid = run.grids[n];
    const figure = old.get(run.name) || make("figure", { "data-run": run.name, colour: colour(i) }, make("figcaption", {}, make("span", {}, run.name), make("span")), make("img", { onload: pixels, decoding: "async" }), make("p", { class: "note" }));
    const image = figure.querySelector("img");
    if (image.getAttribute("src") !== grid.src) image.src = grid.src;
    image.alt = `Samples of ${run.name} after ${whole(grid.images)} images`;
    figure.querySelector("figcaption span:last-child").textContent = `${whole(grid.images)} images`;
    figure.querySelector(".note").textContent = (run.grid_notes || []).join(" ");
    return figure;
  }));
}
function pixels(event) { event.target.classList.toggle("pixels", event.target.naturalWidth < event.target.clientWidth * 1.5); }

function drawEvents() {
  const counts = {};
  for (const run of data.runs) for (const [kind, n] of Object.entries(run.event_counts)) counts[kind] = (counts[kind] || 0) + n;
  $("kinds").replaceChildren(...Object.entries(counts).map(([kind, n]) => toggle(`${kind} (${whole(n)})`, !view.kinds.has(kind), null, null, () => flip(view.kinds, kind))));
  const all = shown().flatMap(({ run, i }) => run.events.filter((e) => !view.kinds.has(e.kind)).map((e) => ({ e, run, i })));
  all.sort((a, b) => (b.e.time || 0) - (a.e.time || 0) || b.e.images - a.e.images);
  const to = (e) => { view.at = e.images; moved(); };
  const rows = all.slice(0, 500).map(({ e, run, i }) => make("tr", { class: "go", tabindex: 0, onclick: () => to(e), onkeydown: (key) => key.key === "Enter" && to(e) },
    make("td", { class: "name", title: run.name }, make("span", { class: "dot", colour: colour(i) }), run.name), make("td", { class: "n" }, whole(e.images)),
    make("td", { class: "n" }, e.time ? clock(e.time) : ""), make("td", {}, e.kind), make("td", {}, e.text)));
  const head = make("tr", {}, ...["run", "images", "time", "kind", "what"].map((t, n) => make("th", { class: n === 1 || n === 2 ? "n" : null }, t)));
  const total = Object.values(counts).reduce((a, b) => a + b, 0), kept = data.runs.reduce((a, run) => a + run.events.length, 0);
  $("events").replaceChildren(total ? make("div", { class: "scroll list" }, make("table", { class: "wide stack" }, make("thead", {}, head), make("tbody", {}, ...rows)))
    : make("p", { class: "empty" }, "Nothing out of the ordinary has happened."),
  ...(kept < total || all.length > 500 ? [make("p", { class: "note" }, `Of ${whole(total)} events the page holds ${whole(kept)}, the first and the last of each kind, and lists 500 at most; all are in events.jsonl of each run.`)] : []));
}

function drawSettings() {
  const same = "The settings of the runs are the same.";
  const rows = data.differences.map(({ key, values }) => make("tr", {}, make("td", {}, make("code", {}, key)), ...values.map((v, i) => make("td", {}, v !== null ? make("code", {}, v) : data.runs[i].config ? "not set" : "–"))));
  const head = make("tr", {}, make("th", {}, "setting"), ...data.runs.map((run, i) => make("th", {}, make("span", { class: "dot", colour: colour(i) }), run.name)));
  $("differences").replaceChildren(...(data.runs.length < 2 ? [] : !rows.length ? [make("p", { class: "empty" }, same)]
    : [make("h3", {}, "What differs"), make("div", { class: "scroll" }, make("table", { class: "wide" }, make("thead", {}, head), make("tbody", {}, ...rows)))]));
  const open = new Set([...$("configs").querySelectorAll("details[open]")].map((d) => d.dataset.run));
  $("configs").replaceChildren(...data.runs.map((run) => make("details", { "data-run": run.name, open: open.has(run.name) }, make("summary", {}, `config.toml of ${run.name}`), make("pre", {}, run.config || "not there yet"))));
}

const clock = (seconds, year) => new Date(seconds * 1000).toLocaleString("en-GB", { day: "numeric", month: "short", year, hour: "2-digit", minute: "2-digit" });
const STATES = { finished: "✓ finished", training: "● going on", starting: "● starting", stalled: "! stalled", stopped: "◼ stopped", "not begun": "○ not begun" };

function drawRuns() {
  const now = data.live ? Date.now() / 1000 : data.made;
  $("runs").replaceChildren(...data.runs.map((run, i) => {
    const s = run.state, last = s.last, part = s.total ? Math.min(1, s.images / s.total) : null;
    const validated = run.validation[run.validation.length - 1], names = validated ? Object.keys(validated.weights) : [];
    const name = names.includes("ema") ? "ema" : names[0];
    const facts = [
      ["loss", "loss" in last ? brief(last.loss) : null], [`validation, ${name ? weightTitle(name) : ""}`, name ? brief(validated.weights[name].loss) : null],
      ["images/s", s.speed ? brief(s.speed, 3) : null], ["MFU", "mfu" in last ? share(last.mfu) : null],
      ["memory", last.peak_memory ? bytes(last.peak_memory) : null], ["weights", s.weights ? brief(s.weights, 3) : null],
      ["MACs an image", s.macs ? brief(s.macs, 3) : null],
    ].filter(([, value]) => value !== null);
    const ago = s.written ? `last line ${duration(now - s.written)} ${data.live ? "ago" : "before this page"}` : "no metrics yet";
    const left = s.seconds_left !== null && s.is === "training" ? `${duration(s.seconds_left)} left` : "";
    return make("article", { class: "run", colour: colour(i) },
      make("h2", {}, make("span", {}, run.name), make("span", { class: `pill ${s.is.split(" ")[0]}` }, STATES[s.is])),
      run.folder === run.name ? null : make("div", { class: "path" }, run.folder),
      part === null ? null : make("div", { class: "meter", role: "progressbar", "aria-label": "images trained on", "aria-valuenow": Math.round(100 * part), "aria-valuemin": 0, "aria-valuemax": 100 }, make("div", { style: `width:${(100 * part).toFixed(2)}%` })),
      make("div", { class: "progress" }, make("span", {}, make("b", {}, whole(s.images)), s.total ? ` of ${whole(s.total)} images` : " images"), left ? make("b", {}, left) : null, make("span", {}, ago)),
      make("dl", { class: "facts" }, ...facts.map(([title, value]) => make("div", {}, make("dt", {}, title), make("dd", {}, value)))),
      ...run.notes.map((text) => make("p", { class: "note" }, text)));
  }));
}

function toggle(text, pressed, stroke, dash, onclick) {
  return make("button", { type: "button", class: "toggle", "aria-pressed": String(pressed), onclick }, stroke ? sample(stroke, dash) : null, make("span", { title: text }, text));
}
function flip(set, name) { if (!set.delete(name)) set.add(name); drawAll(); }

/** Draws anew, and leaves the focus of the keyboard on the same button. */
function keepingFocus(draw) {
  const held = document.activeElement, place = held && held.closest("[id]");
  const at = place ? [...place.querySelectorAll("button")].indexOf(held) : -1;
  draw();
  if (at >= 0 && place.querySelectorAll("button")[at]) place.querySelectorAll("button")[at].focus();
}

const drawAll = () => keepingFocus(() => {
  $("legend").replaceChildren(...data.runs.map((run, i) => toggle(run.name, !view.hidden.has(run.name), colour(i), later(i), () => flip(view.hidden, run.name))));
  for (const input of document.querySelectorAll("#axis input")) {
    input.disabled = !data.runs.some((run) => Array.isArray(run.axes[input.value]));
    input.title = input.disabled ? "No run has it in its metrics." : "";
  }
  drawRuns(); drawScrubbers(); drawGrids(); drawTime(); drawEvents(); drawSettings();
});

// ---- controls, and a run that goes on ---------------------------------------------------------

for (const input of document.querySelectorAll("#axis input")) input.addEventListener("change", () => { view.axis = input.value; view.zoom = null; drawTime(); });
for (const id of ["smoothing", "log", "marks"]) $(id).addEventListener("input", drawTime);
$("zoom").addEventListener("click", () => onzoom(null));
$("quantity").addEventListener("change", (e) => { view.quantity = e.target.value; drawTime(); });
$("which").addEventListener("change", (e) => { view.which = e.target.value; drawTime(); });

function drawMade(lost) {
  $("made").classList.toggle("lost", Boolean(lost));
  $("made").textContent = lost ? `not connected: as of ${clock(data.made, "numeric")}` : data.live ? "live" : `as of ${clock(data.made, "numeric")}`;
}

async function refresh() {
  try {
    const answer = await fetch("data.json", { cache: "no-cache" });
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    if (text !== refresh.last) {
      refresh.last = text;
      data = JSON.parse(text);
      drawAll();
    } else drawRuns();
    drawMade(false);
  } catch (error) {
    drawMade(true);
  }
  setTimeout(refresh, data.live * 1000);
}

drawMade(false);
drawAll();
if (data.live) setTimeout(refresh, data.live * 1000);
