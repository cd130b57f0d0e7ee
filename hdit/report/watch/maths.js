"use strict";
// What needs no page: numbers to text, axes, smoothing. tests/report/test_watch_page.py runs it.

const SI = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** A number in at most `digits` digits, with k, M, G, ... from a thousand on. */
function brief(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const rounded = Number(value.toPrecision(digits)), size = Math.abs(rounded);
  for (const [unit, letter] of SI) {
    if (size >= unit) return `${Number((rounded / unit).toPrecision(digits))}${letter}`;
  }
  return size !== 0 && size < 1e-3 ? rounded.toExponential().replace("e-", "e−") : String(rounded);
}

/** A whole number with commas. */
const whole = (value) => Math.round(value).toLocaleString("en");

/** Seconds in two units: 3 d 4 h, 2 h 5 min, 1 min 10 s. */
function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = Math.max(0, units.findIndex(([unit]) => s >= unit));
  if (s === 0) return "0 s";
  const parts = [`${Math.floor(s / units[first][0])} ${units[first][1]}`];
  const next = units[first + 1];
  const rest = next ? Math.floor((s % units[first][0]) / next[0]) : 0;
  if (rest && first < 3) parts.push(`${rest} ${next[1]}`);
  return parts.join(" ");
}

/** The last index whose x is at most `value`, or -1; xs ascend. */
function before(xs, value) {
  let low = 0, high = xs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= value) low = middle + 1; else high = middle;
  }
  return low - 1;
}

/** The index whose x is nearest to `value`, or -1 of none; xs ascend. */
function nearest(xs, value) {
  const i = before(xs, value);
  if (i < 0) return xs.length ? 0 : -1;
  return i + 1 < xs.length && xs[i + 1] - value < value - xs[i] ? i + 1 : i;
}

/** y at x on straight lines through points; beyond them on the last line. xs ascend from 0. */
function interpolate(xs, ys, x) {
  if (xs.length < 2) return ys.length ? ys[0] : 0;
  const i = Math.min(Math.max(before(xs, x), 0), xs.length - 2);
  const width = xs[i + 1] - xs[i];
  return width > 0 ? ys[i] + ((x - xs[i]) / width) * (ys[i + 1] - ys[i]) : ys[i + 1];
}

/**
 * Means of all values around each x, which weigh e times less for each `reach` that they lie away.
 * Those on both sides count, so that the curve does not lag behind.
 */
function smooth(xs, ys, reach) {
  if (!(reach > 0)) return ys;
  const n = ys.length, sums = ys.slice(), weights = new Array(n).fill(1);
  for (const step of [1, -1]) {
    let sum = 0, weight = 0;
    for (let i = step > 0 ? 0 : n - 1; i >= 0 && i < n; i += step) {
      sums[i] += sum;
      weights[i] += weight;
      const next = xs[i + step], keep = next === undefined ? 0 : Math.exp(-Math.abs(next - xs[i]) / reach);
      sum = (sum + ys[i]) * keep;
      weight = (weight + 1) * keep;
    }
  }
  return sums.map((s, i) => s / weights[i]);
}

/** Round numbers within low..high, about `count` of them. */
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** Round numbers within low..high of a logarithmic axis: powers of ten, and more between if few. */
function logTicks(low, high, count) {
  const decades = Math.log10(high / low), found = [];
  const every = Math.max(1, Math.ceil(decades / count));
  const steps = decades < 0.8 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : decades * 3 <= count + 2 ? [1, 2, 5] : [1];
  for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
    if (steps.length === 1 && k % every) continue;
    for (const m of steps) {
      const t = Number(`${m}e${k}`);
      if (t >= low * 0.999999 && t <= high * 1.000001) found.push(t);
    }
  }
  return found.length > 2 ? found : ticks(low, high, count).filter((t) => t > 0);
}

/** The least and the greatest of the finite numbers of several lists, above 0 if `log`; or null. */
function extent(lists, log) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) {
    for (const v of list) {
      if (v === null || !Number.isFinite(v) || (log && v <= 0)) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
  }
  return low <= high ? [low, high] : null;
}

/** A range a little wider, or around its only value. */
function padded([low, high], log) {
  if (log) {
    const ratio = high > low ? (high / low) ** 0.04 : 1.5;
    return [low / ratio, high * ratio];
  }
  const pad = high > low ? (high - low) * 0.05 : Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

/**
 * The edges with the outermost bins no wider than a factor of `most`: the ends of a density lie far
 * out, where there is hardly an image.
 */
function nearer(edges, most = 8) {
  const n = edges.length - 1, found = edges.slice();
  if (n < 3) return found;
  found[0] = Math.max(edges[0], edges[1] / most);
  found[n] = Math.min(edges[n], edges[n - 1] * most);
  return found;
}

/** The middle of each bin on a logarithmic axis. */
const middles = (edges) => edges.slice(1).map((e, i) => Math.sqrt(e * edges[i]));
