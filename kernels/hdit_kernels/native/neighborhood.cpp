// Neighborhood attention: queries in strips of a row, vectors across queries, so that no key is
// computed in vain. A strip goes down its columns; the rows of keys that its windows hold lie in
// rings, transposed for the logits and as they are for the sums.
#include "simd.h"

namespace {

struct Strides {
  long b, h, w, n;
};

struct Shape {
  long b, h, w, n;
  int e, k;
};

INLINE long window_start(long i, long length, int k) {
  return std::min(std::max(i - k / 2, 0L), length - k);
}

template <class T> constexpr int STRIP = VECTOR_BYTES == 64 ? 2 * LANES<T> : 4 * LANES<T>;
constexpr int OFFSETS = VECTOR_BYTES == 64 ? 7 : 4;  // of keys in registers at once
constexpr int PARTS = VECTOR_BYTES == 64 ? 4 : 2;    // of a token's vectors in registers at once
constexpr int GROUP = 4;                             // queries whose sums are in registers at once

template <class T> int padded(int e) { return (e + LANES<T> - 1) / LANES<T> * LANES<T>; }

// Queries [x0, x0 + n) of a row and the columns [first, first + columns) that their windows hold.
template <class T> struct Strip {
  static constexpr int L = LANES<T>, VECTORS = STRIP<T> / L;
  int x0, n, vectors, first, columns;
  int begin[STRIP<T>];        // of each query's window, counted from `first`; of the last beyond n
  int base[VECTORS];          // of a vector's first query
  bool even[VECTORS];         // whether each lane's window begins one after that of the lane before
  Vec<Int<T>> lane[VECTORS];  // begin - base

  Strip(int x0, long w, int k) : x0(x0), n(int(std::min<long>(STRIP<T>, w - x0))) {
    vectors = (n + L - 1) / L;
    first = int(window_start(x0, w, k));
    columns = int(window_start(x0 + n - 1, w, k)) + k - first;
    for (int i = 0; i < STRIP<T>; i++)
      begin[i] = int(window_start(x0 + std::min(i, n - 1), w, k)) - first;
    for (int v = 0; v < vectors; v++) {
      base[v] = begin[v * L];
      even[v] = true;
      for (int i = 0; i < L; i++) {
        lane[v][i] = begin[v * L + i] - base[v];
        even[v] &= lane[v][i] == i;
      }
    }
  }
};

// to[j * step + i] = factor * from[i * stride + j] for i < n, j < e.
template <class T, class S>
INLINE void pack_transposed(const S *from, long stride, int n, int e, T *to, int step, T factor) {
  constexpr int L = LANES<T>;
  if (n < L || e < L) {
    for (int i = 0; i < n; i++)
      for (int j = 0; j < e; j++) to[(long)j * step + i] = widen(from[i * stride + j]) * factor;
    return;
  }
  for (int i = 0;; i = std::min(i + L, n - L)) {  // the last block may overlap the one before
    for (int j = 0;; j = std::min(j + L, e - L)) {
      Vec<T> rows[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; r++) rows[r] = load(from + (i + r) * stride + j) * factor;
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int r = 0; r < L; r++) store(to + (long)(j + r) * step + i, rows[r]);
      if (j == e - L) break;
    }
    if (i == n - L) break;
  }
}

// to[i * padded(e) + j] = from[i * stride + j], zero for j beyond e.
template <class T, class S> INLINE void pack(const S *from, long stride, int n, int e, T *to) {
  constexpr int L = LANES<T>;
  const int wide = padded<T>(e);
  for (int i = 0; i < n; i++, from += stride, to += wide) {
    int j = 0;
    for (; j + L <= e; j += L) store(to + j, load(from + j));
    for (; j < wide; j++) to[j] = j < e ? widen(from[j]) : T(0);
  }
}

// Lanes of queries for one vector of a strip: to[j * L + lane]; lanes beyond n repeat the last.
template <class T, class S>
INLINE void pack_queries(const S *from, long stride, int n, int e, T *to, T factor) {
  constexpr int L = LANES<T>;
  pack_transposed<T>(from, stride, std::min(n, L), e, to, L, factor);
  for (int i = n; i < L; i++)
    for (int j = 0; j < e; j++) to[j * L + i] = to[j * L + n - 1];
}

// logits[o * L + lane] = q . key at the lane's window start + o, for J offsets of one row of keys;
// for two rows of queries where ROWS is 2.
template <class T, int J, int ROWS, bool EVEN> INLINE void dot(const T *q0, const T *q1,
                                                               const T *keys, int step, int e,
                                                               Vec<Int<T>> lane, T *s0, T *s1) {
  constexpr int L = LANES<T>;
  Vec<T> a[J], b[J];
#pragma GCC unroll 8
  for (int o = 0; o < J; o++) a[o] = b[o] = Vec<T>{};
  for (int j = 0; j < e; j++, keys += step, q0 += L, q1 += L) {
    const Vec<T> x = load(q0), y = ROWS == 2 ? load(q1) : x;
#pragma GCC unroll 8
    for (int o = 0; o < J; o++) {
      Vec<T> key = load(keys + o);
      if (!EVEN) key = permute<T>(key, lane);
      a[o] += x * key;
      if (ROWS == 2) b[o] += y * key;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < J; o++) {
    store(s0 + o * L, a[o]);
    if (ROWS == 2) store(s1 + o * L, b[o]);
  }
}

template <class T, int ROWS, bool EVEN> void dot_row(const T *q0, const T *q1, const T *keys,
                                                     int step, int e, int k, Vec<Int<T>> lane,
                                                     T *s0, T *s1) {
  const int passes = (k + OFFSETS - 1) / OFFSETS;
  for (int pass = 0, o = 0; pass < passes; pass++) {
    const int count = (k - o + passes - pass - 1) / (passes - pass);
    switch (count) {
#define CASE(J)                                                     \
  case J:                                                           \
    dot<T, J, ROWS, EVEN>(q0, q1, keys + o, step, e, lane, s0, s1); \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
    }
    o += count;
    s0 += count * LANES<T>;
    s1 += count * LANES<T>;
  }
}

// Rows of a strip, row r of the image in slot r % slots.
template <class T> struct Ring {
  T *memory;
  long size;  // of a row
  int slots;
  T *row(long r) const { return memory + r % slots * size; }
};

// Logits of vector v of a strip for query rows y and, where ROWS is 2, y + 1.
template <class T> INLINE void logits(const Strip<T> &strip, int v, long y, int rows,
                                      const Shape &p, const T *q0, const T *q1, const Ring<T> &keys,
                                      int step, T *s0, T *s1) {
  const int k = p.k, kl = k * LANES<T>;
  const long w0 = window_start(y, p.h, k), w1 = rows == 2 ? window_start(y + 1, p.h, k) : w0;
  for (long r = w0; r < w1 + k; r++) {
    const T *key = keys.row(r) + strip.base[v];
    const bool both = rows == 2 && r >= w1 && r < w0 + k;
    const bool second = !both && r >= w0 + k;
    const T *a = second ? q1 : q0;
    T *to = second ? s1 + (r - w1) * kl : s0 + (r - w0) * kl;
    T *to1 = s1 + (r - w1) * kl;
    const auto lane = strip.lane[v];
    if (both && strip.even[v]) dot_row<T, 2, true>(a, q1, key, step, p.e, k, lane, to, to1);
    else if (both) dot_row<T, 2, false>(a, q1, key, step, p.e, k, lane, to, to1);
    else if (strip.even[v]) dot_row<T, 1, true>(a, a, key, step, p.e, k, lane, to, to);
    else dot_row<T, 1, false>(a, a, key, step, p.e, k, lane, to, to);
  }
}

// Logits to the base 2 -> their powers, and 1 over the sum of those.
template <class T> INLINE Vec<T> powers(T *s, int count) {
  constexpr int L = LANES<T>;
  Vec<T> top = load(s), total = Vec<T>{};
  for (int o = 1; o < count; o++) top = maximum<T>(top, load(s + o * L));
  for (int o = 0; o < count; o++) {
    const Vec<T> power = exp2(load(s + o * L) - top);
    store(s + o * L, power);
    total += power;
  }
  return splat(T(1)) / total;
}

// ---- sums over a window -------------------------------------------------------------------------

// Calls body(column, active) for the columns that the windows of GROUP queries hold, where
// active(i) says whether query i's window holds it; a constant wherever it can be.
template <class Body> INLINE void columns(const int *begin, int k, const Body &body) {
  const int b = begin[0];
  const bool regular = begin[1] == b + 1 && begin[2] == b + 2 && begin[3] == b + 3 && k >= GROUP;
  if (regular) {
    body(b, [](int i) { return i <= 0; });
    body(b + 1, [](int i) { return i <= 1; });
    body(b + 2, [](int i) { return i <= 2; });
    for (int c = b + 3; c < b + k; c++) body(c, [](int) { return true; });
    body(b + k, [](int i) { return i >= 1; });
    body(b + k + 1, [](int i) { return i >= 2; });
    body(b + k + 2, [](int i) { return i >= 3; });
    return;
  }
  for (int c = b; c < begin[GROUP - 1] + k; c++)
    body(c, [=](int i) { return c >= begin[i] && c < begin[i] + k; });
}

// out[i][part] = sum over query i's window of weight * row of values.
template <class T, int P> INLINE void gather(const T *weights, const Ring<T> &values, long w0,
                                             int part, int wide, const int *begin, int k,
                                             Vec<T> (&sums)[GROUP][PARTS]) {
  constexpr int L = LANES<T>;
#pragma GCC unroll 4
  for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
    for (int c = 0; c < P; c++) sums[i][c] = Vec<T>{};
  for (int dy = 0; dy < k; dy++) {
    const T *row = values.row(w0 + dy) + part * L;
    const T *p = weights + (long)dy * k * L;
    const T *of[GROUP] = {p - begin[0] * L, p - begin[1] * L + 1, p - begin[2] * L + 2,
                          p - begin[3] * L + 3};
    columns(begin, k, [&](int column, auto active) __attribute__((always_inline)) {
      Vec<T> value[P];
#pragma GCC unroll 4
      for (int c = 0; c < P; c++) value[c] = load(row + (long)column * wide + c * L);
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; i++)
        if (active(i)) {
          const Vec<T> weight = splat(of[i][column * L]);
#pragma GCC unroll 4
          for (int c = 0; c < P; c++) sums[i][c] += weight * value[c];
        }
    });
  }
}

// row of sums += weight * query i, over its window: the transpose of gather.
template <class T, int P> INLINE void scatter(const T *weights, const Ring<T> &sums, long w0,
                                              int part, int wide, const int *begin, int k,
                                              const T *queries) {
  constexpr int L = LANES<T>;
  Vec<T> query[GROUP][P];
#pragma GCC unroll 4
  for (int i = 0; i < GROUP; i++)
#pragma GCC unroll 4
    for (int c = 0; c < P; c++) query[i][c] = load(queries + (long)i * wide + (part + c) * L);
  for (int dy = 0; dy < k; dy++) {
    T *row = sums.row(w0 + dy) + part * L;
    const T *p = weights + (long)dy * k * L;
    const T *of[GROUP] = {p - begin[0] * L, p - begin[1] * L + 1, p - begin[2] * L + 2,
                          p - begin[3] * L + 3};
    columns(begin, k, [&](int column, auto active) __attribute__((always_inline)) {
      Vec<T> total[P];
#pragma GCC unroll 4
      for (int c = 0; c < P; c++) total[c] = load(row + (long)column * wide + c * L);
#pragma GCC unroll 4
      for (int i = 0; i < GROUP; i++)
        if (active(i)) {
          const Vec<T> weight = splat(of[i][column * L]);
#pragma GCC unroll 4
          for (int c = 0; c < P; c++) total[c] += weight * query[i][c];
        }
#pragma GCC unroll 4
      for (int c = 0; c < P; c++) store(row + (long)column * wide + c * L, total[c]);
    });
  }
}

// Ask ahead for the share of a row that falls to the group of queries at `at`: of the columns of
// its keys, or of the queries. Tokens lie apart in memory, by their heads, so that the hardware
// does not see what comes next. (What does nothing else must be inlined all the way up: GCC drops a
// call of it as one without effect.)
template <class S> INLINE void prefetch(const S *token, int e) {
  for (int j = 0; j < e; j += 64 / int(sizeof(S)))
    __builtin_prefetch(token + j, 0, 2);  // into the second cache: the first is full
}
template <class T, class S>
INLINE void prefetch_keys(const Strip<T> &strip, const S *x, Strides xs, long row, int e, int at) {
  const int groups = (strip.n + GROUP - 1) / GROUP, group = at / GROUP;
  for (int i = strip.columns * group / groups; i < strip.columns * (group + 1) / groups; i++)
    prefetch(x + row * xs.h + (strip.first + i) * xs.w, e);
}
template <class T, class S> INLINE void prefetch_queries(const Strip<T> &strip, const S *x,
                                                         Strides xs, long row, int e, int at) {
  for (int i = at; i < std::min(at + GROUP, strip.n); i++)
    prefetch(x + row * xs.h + (strip.x0 + i) * xs.w, e);
}

template <class S, class T> INLINE void put(S *to, Vec<T> v, int room) {
  if (room >= LANES<T>) return store(to, v);
  for (int i = 0; i < room; i++) narrow(v[i], to + i);
}

// Each query of a strip: its sum over its window times factor[lane] -> out, stride `step` a query.
template <class T, class S, class Between>
INLINE void gather_strip(const Strip<T> &strip, const T *weights, const Ring<T> &values, long w0,
                         int e, int k, const T *factor, S *out, long step, const Between &between) {
  constexpr int L = LANES<T>;
  const int wide = padded<T>(e), parts = wide / L;
  for (int g = 0; g < strip.n; g += GROUP) {
    const T *p = weights + (long)(g / L) * k * k * L + g % L;
    between(g);
    for (int part = 0; part < parts; part += PARTS) {
      Vec<T> sums[GROUP][PARTS];
      const int now = std::min(PARTS, parts - part);
      const int *begin = strip.begin + g;
      switch (now) {
        case 1:
          gather<T, 1>(p, values, w0, part, wide, begin, k, sums);
          break;
        case 2:
          gather<T, 2>(p, values, w0, part, wide, begin, k, sums);
          break;
#if defined(__AVX512F__)
        case 3:
          gather<T, 3>(p, values, w0, part, wide, begin, k, sums);
          break;
        case 4:
          gather<T, 4>(p, values, w0, part, wide, begin, k, sums);
          break;
#endif
      }
      for (int i = 0; i < std::min(GROUP, strip.n - g); i++)
        for (int c = 0; c < now; c++) {
          const int at = (part + c) * L;
          put<S, T>(out + (g + i) * step + at, sums[i][c] * factor[g + i], e - at);
        }
    }
  }
}

template <class T> INLINE void scatter_strip(const Strip<T> &strip, const T *weights,
                                             const Ring<T> &sums, long w0, int e, int k,
                                             const T *queries) {
  constexpr int L = LANES<T>;
  const int wide = padded<T>(e), parts = wide / L;
  for (int g = 0; g < strip.n; g += GROUP) {
    const T *p = weights + (long)(g / L) * k * k * L + g % L;
    const T *q = queries + (long)g * wide;
    for (int part = 0; part < parts; part += PARTS) {
      const int *begin = strip.begin + g;
      switch (std::min(PARTS, parts - part)) {
        case 1:
          scatter<T, 1>(p, sums, w0, part, wide, begin, k, q);
          break;
        case 2:
          scatter<T, 2>(p, sums, w0, part, wide, begin, k, q);
          break;
#if defined(__AVX512F__)
        case 3:
          scatter<T, 3>(p, sums, w0, part, wide, begin, k, q);
          break;
        case 4:
          scatter<T, 4>(p, sums, w0, part, wide, begin, k, q);
          break;
#endif
      }
    }
  }
}

// ---- a strip from row y0 to row y1 --------------------------------------------------------------

// Consecutive pieces of a thread's scratch memory.
template <class T> struct Pieces {
  long used = 0;
  T *memory = nullptr;
  T *take(long count) {
    T *piece = memory + used;
    used += (count + 15) / 16 * 16;
    return piece;
  }
};

template <class T> struct Plan {
  Strip<T> strip;
  Shape p;
  int step, wide, slots;  // of a transposed row of keys; of a token; rows of a ring
  long size, logits;      // of a row of the rings; of the logits of a row of queries
  Plan(const Shape &p, int x0) : strip(x0, p.w, p.k), p(p) {
    constexpr int L = LANES<T>;
    step = (STRIP<T> + p.k - 1 + L - 1) / L * L;
    wide = padded<T>(p.e);
    slots = p.k + 1;
    size = (long)step * wide;
    logits = (long)p.k * p.k * STRIP<T>;
  }
};

template <class T, class S>
void forward_strip(const Shape &p, int x0, long y0, long y1, double scale, const S *q, Strides qs,
                   const S *k, Strides ks, const S *v, Strides vs, S *out, Strides os) {
  constexpr int L = LANES<T>;
  const Plan<T> plan(p, x0);
  const auto &strip = plan.strip;
  Ring<T> keys{nullptr, plan.size, plan.slots}, values = keys;
  T *query[2], *s[2], *inverse[2];
  Pieces<T> pieces;
  for (int pass = 0; pass < 2; pass++) {  // measure, then take
    keys.memory = pieces.take(plan.size * plan.slots);
    values.memory = pieces.take(plan.size * plan.slots);
    for (int z = 0; z < 2; z++) {
      query[z] = pieces.take((long)p.e * STRIP<T>);
      s[z] = pieces.take(plan.logits);
      inverse[z] = pieces.take(STRIP<T>);
    }
    if (pass == 0) pieces = {0, static_cast<T *>(scratch(pieces.used * sizeof(T)))};
  }
  const T factor = T(scale * LOG2E);
  long have = window_start(y0, p.h, p.k);
  for (long y = y0; y < y1; y += 2) {
    const int rows = y + 1 < y1 ? 2 : 1;
    for (const long end = window_start(y + rows - 1, p.h, p.k) + p.k; have < end; have++) {
      const S *row = k + have * ks.h + strip.first * ks.w;
      pack_transposed<T>(row, ks.w, strip.columns, p.e, keys.row(have), plan.step, T(1));
      pack<T>(v + have * vs.h + strip.first * vs.w, vs.w, strip.columns, p.e, values.row(have));
    }
    const int soon = int(window_start(std::min(y + 3, y1 - 1), p.h, p.k) + p.k - have);
    for (int i = 0; i < strip.vectors; i++) {
      const long at = (long)i * p.e * L, logit = (long)i * p.k * p.k * L;
      for (int z = 0; z < rows; z++)
        pack_queries<T>(q + (y + z) * qs.h + (x0 + i * L) * qs.w, qs.w, strip.n - i * L, p.e,
                        query[z] + at, factor);
      logits<T>(strip, i, y, rows, p, query[0] + at, query[1] + at, keys, plan.step, s[0] + logit,
                s[1] + logit);
      for (int z = 0; z < rows; z++) store(inverse[z] + i * L, powers<T>(s[z] + logit, p.k * p.k));
    }
    for (int z = 0; z < rows; z++)
      gather_strip<T>(strip, s[z], values, window_start(y + z, p.h, p.k), p.e, p.k, inverse[z],
                      out + (y + z) * os.h + x0 * os.w, os.w,
                      [&](int at) __attribute__((always_inline)) {
                        if (z < soon) {
                          prefetch_keys(strip, k, ks, have + z, p.e, at);
                          prefetch_keys(strip, v, vs, have + z, p.e, at);
                        }
                        if (y + 2 + z < y1) {
                          prefetch_queries(strip, q, qs, y + 2 + z, p.e, at);
                          prefetch_queries(strip, out, os, y + 2 + z, p.e, at);
                        }
                      });
  }
}

// Adds row r of a ring to the gradient, and clears it for the next.
template <class T>
INLINE void flush(const Strip<T> &strip, const Ring<T> &ring, long r, int e, T *grad, Strides gs) {
  constexpr int L = LANES<T>;
  T *from = ring.row(r), *to = grad + r * gs.h + strip.first * gs.w;
  const int wide = padded<T>(e);
  for (int i = 0; i < strip.columns; i++, from += wide, to += gs.w) {
    int j = 0;
    for (; j + L <= e; j += L) store(to + j, load(to + j) + load(from + j));
    for (; j < e; j++) to[j] += from[j];
    for (j = 0; j < wide; j += L) store(from + j, Vec<T>{});
  }
}

template <class T, class S>
void backward_strip(const Shape &p, int x0, long y0, long y1, double scale, const S *q, Strides qs,
                    const S *k, Strides ks, const S *v, Strides vs, const S *g, Strides gs, S *dq,
                    Strides dqs, T *dk, Strides dks, T *dv, Strides dvs) {
  constexpr int L = LANES<T>;
  const Plan<T> plan(p, x0);
  const auto &strip = plan.strip;
  const int count = p.k * p.k;
  Ring<T> keys{nullptr, plan.size, plan.slots}, values = keys, plain = keys, dkeys = keys,
                                                dvalues = keys;
  T *query[2], *grad[2], *s[2], *t[2], *plain_query, *plain_grad, *ones;
  Pieces<T> pieces;
  for (int pass = 0; pass < 2; pass++) {  // measure, then take
    for (Ring<T> *ring : {&keys, &values, &plain, &dkeys, &dvalues})
      ring->memory = pieces.take(plan.size * plan.slots);
    for (int z = 0; z < 2; z++) {
      query[z] = pieces.take((long)p.e * STRIP<T>);
      grad[z] = pieces.take((long)p.e * STRIP<T>);
      s[z] = pieces.take(plan.logits);
      t[z] = pieces.take(plan.logits);
    }
    plain_query = pieces.take((long)plan.wide * STRIP<T>);
    plain_grad = pieces.take((long)plan.wide * STRIP<T>);
    ones = pieces.take(STRIP<T>);
    if (pass == 0) pieces = {0, static_cast<T *>(scratch(pieces.used * sizeof(T)))};
  }
  memset(dkeys.memory, 0, plan.size * plan.slots * sizeof(T));
  memset(dvalues.memory, 0, plan.size * plan.slots * sizeof(T));
  memset(plain_query, 0, (long)plan.wide * STRIP<T> * sizeof(T));  // queries beyond the strip's
  memset(plain_grad, 0, (long)plan.wide * STRIP<T> * sizeof(T));
  std::fill_n(ones, STRIP<T>, T(1));
  const T factor = T(scale * LOG2E);
  long have = window_start(y0, p.h, p.k), held = have;  // rows packed; the first not yet flushed
  for (long y = y0; y < y1; y += 2) {
    const int rows = y + 1 < y1 ? 2 : 1;
    for (const long start = window_start(y, p.h, p.k); held < start; held++) {
      flush(strip, dkeys, held, p.e, dk, dks);
      flush(strip, dvalues, held, p.e, dv, dvs);
    }
    for (const long end = window_start(y + rows - 1, p.h, p.k) + p.k; have < end; have++) {
      const S *key = k + have * ks.h + strip.first * ks.w;
      const S *value = v + have * vs.h + strip.first * vs.w;
      pack_transposed<T>(key, ks.w, strip.columns, p.e, keys.row(have), plan.step, T(1));
      pack_transposed<T>(value, vs.w, strip.columns, p.e, values.row(have), plan.step, T(1));
      pack<T>(key, ks.w, strip.columns, p.e, plain.row(have));
    }
    const int soon = int(window_start(std::min(y + 3, y1 - 1), p.h, p.k) + p.k - have);
    for (int i = 0; i < strip.vectors; i++) {
      const long at = (long)i * p.e * L, logit = (long)i * count * L;
      const int n = strip.n - i * L;
      for (int z = 0; z < rows; z++) {
        const long x = x0 + i * L;
        pack_queries<T>(q + (y + z) * qs.h + x * qs.w, qs.w, n, p.e, query[z] + at, factor);
        pack_queries<T>(g + (y + z) * gs.h + x * gs.w, gs.w, n, p.e, grad[z] + at, T(1));
      }
      logits<T>(strip, i, y, rows, p, query[0] + at, query[1] + at, keys, plan.step, s[0] + logit,
                s[1] + logit);
      logits<T>(strip, i, y, rows, p, grad[0] + at, grad[1] + at, values, plan.step, t[0] + logit,
                t[1] + logit);
      for (int z = 0; z < rows; z++) {  // P, and dS = scale P (dP - sum P dP)
        T *weight = s[z] + logit, *dweight = t[z] + logit;
        const Vec<T> inverse = powers<T>(weight, count);
        Vec<T> delta{};
        for (int o = 0; o < count; o++) {
          const Vec<T> w = load(weight + o * L) * inverse;
          store(weight + o * L, w);
          delta += w * load(dweight + o * L);
        }
        for (int o = 0; o < count; o++) {
          const Vec<T> ds = load(weight + o * L) * (load(dweight + o * L) - delta);
          store(dweight + o * L, ds * T(scale));
        }
      }
    }
    for (int z = 0; z < rows; z++) {
      const long w0 = window_start(y + z, p.h, p.k);
      pack<T>(q + (y + z) * qs.h + x0 * qs.w, qs.w, strip.n, p.e, plain_query);
      pack<T>(g + (y + z) * gs.h + x0 * gs.w, gs.w, strip.n, p.e, plain_grad);
      gather_strip<T>(strip, t[z], plain, w0, p.e, p.k, ones, dq + (y + z) * dqs.h + x0 * dqs.w,
                      dqs.w, [&](int at) __attribute__((always_inline)) {
                        if (z < soon) {
                          prefetch_keys(strip, k, ks, have + z, p.e, at);
                          prefetch_keys(strip, v, vs, have + z, p.e, at);
                          prefetch_keys(strip, dk, dks, held + z, p.e, at);
                          prefetch_keys(strip, dv, dvs, held + z, p.e, at);
                        }
                        if (y + 2 + z < y1) {
                          prefetch_queries(strip, q, qs, y + 2 + z, p.e, at);
                          prefetch_queries(strip, g, gs, y + 2 + z, p.e, at);
                          prefetch_queries(strip, dq, dqs, y + 2 + z, p.e, at);
                        }
                      });
      scatter_strip<T>(strip, s[z], dvalues, w0, p.e, p.k, plain_grad);
      scatter_strip<T>(strip, t[z], dkeys, w0, p.e, p.k, plain_query);
    }
  }
  for (; held < have; held++) {
    flush(strip, dkeys, held, p.e, dk, dks);
    flush(strip, dvalues, held, p.e, dv, dvs);
  }
}

// ---- over the image, in parallel ----------------------------------------------------------------

constexpr long BACKWARD_TASKS = 32;  // for as many threads, in two turns

// Number of bands of rows, none lower than two windows, that makes of `tasks` tasks about `wanted`.
long bands(const Shape &p, long tasks, long wanted) {
  return std::max(1L, std::min((wanted + tasks - 1) / tasks, p.h / std::max(2 * p.k, 16)));
}

template <class T, class S> void forward(const Threads &threads, const Shape &p, double scale,
                                         const S *q, Strides qs, const S *k, Strides ks, const S *v,
                                         Strides vs, S *out, Strides os) {
  const long strips = (p.w + STRIP<T> - 1) / STRIP<T>;
  const long nb = bands(p, p.b * p.n * strips, 4 * threads.number);
  for_each(threads, p.b * p.n * strips * nb, [&](long task) {
    const long band = task % nb, strip = task / nb % strips, head = task / nb / strips;
    const long b = head / p.n, n = head % p.n;
    forward_strip<T, S>(p, int(strip * STRIP<T>), band * p.h / nb, (band + 1) * p.h / nb, scale,
                        q + b * qs.b + n * qs.n, qs, k + b * ks.b + n * ks.n, ks,
                        v + b * vs.b + n * vs.n, vs, out + b * os.b + n * os.n, os);
  });
}

// dk and dv are added to. Bands that lie next to each other share rows of keys, so those of even
// number come first: no two threads ever add to one place. How many there are depends on the shape
// alone, and so does the order of sums.
template <class T, class S> void backward(const Threads &threads, const Shape &p, double scale,
                                          const S *q, Strides qs, const S *k, Strides ks,
                                          const S *v, Strides vs, const S *g, Strides gs, S *dq,
                                          Strides dqs, T *dk, Strides dks, T *dv, Strides dvs) {
  const long nb = bands(p, p.b * p.n, BACKWARD_TASKS);
  for (long parity = 0; parity < std::min(nb, 2L); parity++) {
    const long count = (nb + 1 - parity) / 2;
    for_each(threads, p.b * p.n * count, [&](long task) {
      const long band = task % count * 2 + parity, head = task / count;
      const long b = head / p.n, n = head % p.n;
      for (int x0 = 0; x0 < p.w; x0 += STRIP<T>)
        backward_strip<T, S>(p, x0, band * p.h / nb, (band + 1) * p.h / nb, scale,
                             q + b * qs.b + n * qs.n, qs, k + b * ks.b + n * ks.n, ks,
                             v + b * vs.b + n * vs.n, vs, g + b * gs.b + n * gs.n, gs,
                             dq + b * dqs.b + n * dqs.n, dqs, dk + b * dks.b + n * dks.n, dks,
                             dv + b * dvs.b + n * dvs.n, dvs);
    });
  }
}

Shape shape(const long *s) { return {s[0], s[1], s[2], s[3], int(s[4]), int(s[5])}; }
Strides strides(const long *s) { return {s[0], s[1], s[2], s[3]}; }

}  // namespace

// shape: b h w n e k; strides: b h w n of each tensor in turn, in elements; e lies together.
#define FORWARD(NAME, T, S)                                                                        \
  extern "C" void neighborhood_forward_##NAME(Parallel parallel, int threads, const long *sizes,   \
                                              const long *st, double scale, const S *q,            \
                                              const S *k, const S *v, S *out) {                    \
    forward<T, S>({parallel, threads}, shape(sizes), scale, q, strides(st), k, strides(st + 4), v, \
                  strides(st + 8), out, strides(st + 12));                                         \
  }
#define BACKWARD(NAME, T, S)                                                                       \
  extern "C" void neighborhood_backward_##NAME(                                                    \
      Parallel parallel, int threads, const long *sizes, const long *st, double scale, const S *q, \
      const S *k, const S *v, const S *g, S *dq, T *dk, T *dv) {                                   \
    backward<T, S>({parallel, threads}, shape(sizes), scale, q, strides(st), k, strides(st + 4),   \
                   v, strides(st + 8), g, strides(st + 12), dq, strides(st + 16), dk,              \
                   strides(st + 20), dv, strides(st + 24));                                        \
  }
FORWARD(float32, float, float)
FORWARD(float64, double, double)
FORWARD(bfloat16, float, bfloat16)
BACKWARD(float32, float, float)
BACKWARD(float64, double, double)
BACKWARD(bfloat16, float, bfloat16)
