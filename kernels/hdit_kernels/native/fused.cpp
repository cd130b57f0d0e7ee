// The elementwise parts of a transformer's blocks, each in one pass over its tensors. Arithmetic is
// in float32. Sums over tokens go by chunks of a fixed size and then over the chunks in order, so
// that a result does not depend on which thread did what.
#include "simd.h"

namespace {

constexpr int L = LANES<float>;
constexpr long CHUNK = 64;  // tokens of one task
typedef Vec<float> V;

long chunks(long tokens) { return (tokens + CHUNK - 1) / CHUNK; }

// body(i, load_at, store_at) over a row of d elements, whole vectors first.
template <class Body> INLINE void row(long d, const Body &body) {
  long i = 0;
  for (; i + L <= d; i += L) body(i, L);
  if (i < d) body(i, int(d - i));
}

// The first n elements from p, zero beyond them.
template <class S> INLINE V get(const S *p, int n) {
  if (n == L) return load(p);
  V v{};
  for (int i = 0; i < n; i++) v[i] = widen(p[i]);
  return v;
}
template <class S> INLINE void put(S *p, V v, int n) {
  if (n == L) return store(p, v);
  for (int i = 0; i < n; i++) narrow(v[i], p + i);
}
template <class S> INLINE V get_or(const S *p, long i, int n, float otherwise) {
  return p ? get(p + i, n) : splat(otherwise);
}

// A row's mean (0 where it is not taken off) and 1 over its root mean square about that.
struct Moments {
  float mean, factor;
};
template <bool CENTRE, class S> INLINE Moments moments(const S *x, long d, float eps) {
  V total{}, square{};
  float mean = 0;
  if (CENTRE) {
    row(d, [&](long i, int n) __attribute__((always_inline)) { total += get(x + i, n); });
    mean = sum<float>(total) / float(d);
  }
  row(d, [&](long i, int n) __attribute__((always_inline)) {
    V v = get(x + i, n) - mean;
    if (CENTRE && n < L)
      for (int j = n; j < L; j++) v[j] = 0;
    square += v * v;
  });
  return {mean, 1.f / std::sqrt(sum<float>(square) / float(d) + eps)};
}

// ---- norms: y = scale * (x - mean) / rms + shift, scale and shift of an image -------------------

// x: images of `tokens` rows of d; scale, shift: a row for each image, `stride` apart (0: one for
// all), or null.
template <bool CENTRE, class S> void norm(const Threads &threads, long images, long tokens, long d,
                                          float eps, const S *x, const float *scale,
                                          const float *shift, long stride, S *out) {
  const long per = chunks(tokens);
  for_each(threads, images * per, [&](long task) {
    const long image = task / per, first = task % per * CHUNK;
    const float *a = scale ? scale + image * stride : nullptr;
    const float *b = shift ? shift + image * stride : nullptr;
    for (long t = first; t < std::min(tokens, first + CHUNK); t++) {
      const S *from = x + (image * tokens + t) * d;
      S *to = out + (image * tokens + t) * d;
      const Moments m = moments<CENTRE>(from, d, eps);
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V v = (get(from + i, n) - m.mean) * m.factor;
        put(to + i, v * get_or(a, i, n, 1) + get_or(b, i, n, 0), n);
      });
    }
  });
}

// dx, and for each chunk of tokens its part of dscale and dshift: (images, chunks, d), or null.
template <bool CENTRE, class S> void norm_backward(const Threads &threads, long images, long tokens,
                                                   long d, float eps, const S *g, const S *x,
                                                   const float *scale, long stride, S *dx,
                                                   float *dscale, float *dshift) {
  const long per = chunks(tokens);
  for_each(threads, images * per, [&](long task) {
    const long image = task / per, first = task % per * CHUNK;
    const float *a = scale ? scale + image * stride : nullptr;
    float *da = dscale ? dscale + task * d : nullptr, *db = dshift ? dshift + task * d : nullptr;
    if (da) std::fill_n(da, d, 0.f);
    if (db) std::fill_n(db, d, 0.f);
    for (long t = first; t < std::min(tokens, first + CHUNK); t++) {
      const long at = (image * tokens + t) * d;
      const Moments m = moments<CENTRE>(x + at, d, eps);
      V along{}, total{};  // sums of the gradient of the normalised row: with that row, and alone
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V grad = get(g + at + i, n), unit = (get(x + at + i, n) - m.mean) * m.factor;
        const V inner = grad * get_or(a, i, n, 1);
        along += inner * unit;
        total += inner;
        if (da) put(da + i, get(da + i, n) + grad * unit, n);
        if (db) put(db + i, get(db + i, n) + grad, n);
      });
      const float slope = sum<float>(along) / float(d);
      const float mean = CENTRE ? sum<float>(total) / float(d) : 0;
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V unit = (get(x + at + i, n) - m.mean) * m.factor;
        const V inner = get(g + at + i, n) * get_or(a, i, n, 1);
        put(dx + at + i, (inner - mean - unit * slope) * m.factor, n);
      });
    }
  });
}

// ---- gated residual: out = x + gate * branch, the gate of an image ------------------------------

template <class S> void gated(const Threads &threads, long images, long tokens, long d, const S *x,
                              const S *branch, const float *gate, long stride, S *out) {
  const long per = chunks(tokens);
  for_each(threads, images * per, [&](long task) {
    const long image = task / per, first = task % per * CHUNK;
    for (long t = first; t < std::min(tokens, first + CHUNK); t++) {
      const long at = (image * tokens + t) * d;
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V scaled = get(gate + image * stride + i, n) * get(branch + at + i, n);
        put(out + at + i, get(x + at + i, n) + scaled, n);
      });
    }
  });
}

// dbranch, and for each chunk of tokens its part of dgate: (images, chunks, d).
template <class S> void gated_backward(const Threads &threads, long images, long tokens, long d,
                                       const S *g, const S *branch, const float *gate, long stride,
                                       S *dbranch, float *dgate) {
  const long per = chunks(tokens);
  for_each(threads, images * per, [&](long task) {
    const long image = task / per, first = task % per * CHUNK;
    float *total = dgate + task * d;
    std::fill_n(total, d, 0.f);
    for (long t = first; t < std::min(tokens, first + CHUNK); t++) {
      const long at = (image * tokens + t) * d;
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V grad = get(g + at + i, n);
        put(dbranch + at + i, grad * get(gate + image * stride + i, n), n);
        put(total + i, get(total + i, n) + grad * get(branch + at + i, n), n);
      });
    }
  });
}

// ---- GEGLU: value * gelu(gate) of rows [value | gate] -------------------------------------------

// The normal distribution: its integral up to x, from a fit of the Mills ratio (relative error
// 4e-9 before rounding), and its density.
struct Normal {
  V integral, density;
};
INLINE Normal normal(V x) {
  const V a = x < 0.f ? -x : x;
  const V t = splat(1.f) / (a * 0.3f + 1.f);
  V p = splat(-0.0208782614f);
  p = p * t + 0.113806516f;
  p = p * t - 0.231400286f;
  p = p * t + 0.195974185f;
  p = p * t - 0.0828475503f;
  p = p * t + 0.0979556972f;
  p = p * t + 0.0777838585f;
  p = p * t + 0.110361191f;
  p = p * t + 0.119557241f;
  p = p * t + 0.119687407f;
  const V power = exp2(a * a * float(-0.5 * LOG2E));
  const V tail = t * p * power;
  return {x < 0.f ? tail : 1.f - tail, power * 0.398942280f};
}

template <class S> void geglu(const Threads &threads, long tokens, long d, const S *up, S *out) {
  for_each(threads, chunks(tokens), [&](long task) {
    for (long t = task * CHUNK; t < std::min(tokens, (task + 1) * CHUNK); t++)
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V value = get(up + t * 2 * d + i, n), gate = get(up + t * 2 * d + d + i, n);
        put(out + t * d + i, value * gate * normal(gate).integral, n);
      });
  });
}

template <class S>
void geglu_backward(const Threads &threads, long tokens, long d, const S *g, const S *up, S *dup) {
  for_each(threads, chunks(tokens), [&](long task) {
    for (long t = task * CHUNK; t < std::min(tokens, (task + 1) * CHUNK); t++)
      row(d, [&](long i, int n) __attribute__((always_inline)) {
        const V value = get(up + t * 2 * d + i, n), gate = get(up + t * 2 * d + d + i, n);
        const V grad = get(g + t * d + i, n);
        const Normal at = normal(gate);
        put(dup + t * 2 * d + i, grad * gate * at.integral, n);
        put(dup + t * 2 * d + d + i, grad * value * (at.integral + gate * at.density), n);
      });
  });
}

// ---- dropout ------------------------------------------------------------------------------------

INLINE uint64_t mixed(uint64_t x) {  // SplitMix64 (Steele et al., 2014)
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Each element times `factor`, or 0 where a hash of the seed and its place is below `threshold`.
template <class S> void dropout(const Threads &threads, long count, uint64_t seed,
                                uint32_t threshold, float factor, const S *x, S *out) {
  constexpr long PIECE = 1 << 14;
  typedef Types<uint32_t>::Vec U;
  U lane;
  for (int i = 0; i < L; i++) lane[i] = i;
  for_each(threads, (count + PIECE - 1) / PIECE, [&](long task) {
    const long first = task * PIECE;
    const uint64_t key = mixed(seed + mixed(uint64_t(task)));
    const uint32_t begin = uint32_t(key), end = uint32_t(key >> 32);
    row(std::min(PIECE, count - first), [&](long i, int n) __attribute__((always_inline)) {
      U h = lane + (begin + uint32_t(i));
      h = (h ^ (h >> 16)) * 0x7feb352du;
      h = (h ^ (h >> 15)) * 0x846ca68bu;
      h = (h ^ (h >> 16)) ^ end;
      const V kept = get(x + first + i, n) * factor;
      put(out + first + i, h >= threshold ? kept : V{}, n);
    });
  });
}

// ---- cosine similarity and axial RoPE of q and k ------------------------------------------------

// Eight floats: with heads of 64, half of which turn, the angles of y are eight, and those of x.
typedef float V8 __attribute__((vector_size(32)));
INLINE V8 get8(const float *p) {
  V8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void put8(float *p, V8 v) { memcpy(p, &v, sizeof v); }

// Turns the pairs (x[i], x[i + f]), i < f, by the angles whose cosines and sines are given: the
// first half of f by those of y, the second by those of x. SIGN -1 turns back.
template <int SIGN> INLINE void turn(float *x, int f, const float *cos_y, const float *sin_y,
                                     const float *cos_x, const float *sin_x) {
  for (int half = 0; half < 2; half++) {
    const float *c = half ? cos_x : cos_y, *s = half ? sin_x : sin_y;
    float *a = x + half * f / 2, *b = a + f;
    int i = 0;
    for (; i + 8 <= f / 2; i += 8) {
      const V8 u = get8(a + i), v = get8(b + i), cosine = get8(c + i);
      const V8 sine = float(SIGN) * get8(s + i);
      put8(a + i, u * cosine - v * sine);
      put8(b + i, v * cosine + u * sine);
    }
    for (; i < f / 2; i++) {
      const float u = a[i], v = b[i], sine = SIGN * s[i];
      a[i] = u * c[i] - v * sine;
      b[i] = v * c[i] + u * sine;
    }
  }
}

// Sizes of qkv (b h w 3 n e) and of the turning part of a head: 2 f elements.
struct Heads {
  long b, h, w, n, e, f;
};

// Cosines and sines (h + w, 2, n, f / 2) of rows, then columns, or null: no turn.
struct Tables {
  const float *memory;
  const Heads &p;
  const float *at(long position, int sine, long n) const {
    return memory + ((position * 2 + sine) * p.n + n) * (p.f / 2);
  }
};

INLINE float norm_factor(const float *x, long e) {
  V square{};
  row(e, [&](long i, int n) __attribute__((always_inline)) {
    const V v = get(x + i, n);
    square += v * v;
  });
  return 1.f / std::sqrt(sum<float>(square) + 1e-6f);
}

// q and k of qkv, of length root[n] each and then turned, heads last: (b h w n e).
template <class S> void prologue(const Threads &threads, const Heads &p, const S *qkv,
                                 const float *root, const float *table, S *q, S *k) {
  const Tables tables{table, p};
  for_each(threads, p.b * p.h, [&](long task) {
    const long y = task % p.h, width = p.n * p.e;
    float *head = static_cast<float *>(scratch((p.e + L) * sizeof(float)));
    for (long x = 0; x < p.w; x++) {
      const long token = task * p.w + x;
      for (int which = 0; which < 2; which++)
        for (long n = 0; n < p.n; n++) {
          const S *from = qkv + token * 3 * width + which * width + n * p.e;
          S *to = (which ? k : q) + token * width + n * p.e;
          row(p.e, [&](long i, int c)
                       __attribute__((always_inline)) { put(head + i, get(from + i, c), c); });
          const float factor = root[n] * norm_factor(head, p.e);
          if (table)
            turn<1>(head, int(p.f), tables.at(y, 0, n), tables.at(y, 1, n),
                    tables.at(p.h + x, 0, n), tables.at(p.h + x, 1, n));
          row(p.e, [&](long i, int c) __attribute__((always_inline)) {
            put(to + i, get(head + i, c) * factor, c);
          });
        }
    }
  });
}

struct Strides {
  long b, h, w, n;
};

// The gradient of qkv, of which v's is copied; and for each row of tokens its part of that of root:
// (b h, n).
template <class S> void prologue_backward(const Threads &threads, const Heads &p, const S *gq,
                                          Strides qs, const S *gk, Strides ks, const S *gv,
                                          Strides vs, const S *qkv, const float *root,
                                          const float *table, S *dqkv, float *droot) {
  const Tables tables{table, p};
  for_each(threads, p.b * p.h, [&](long task) {
    const long b = task / p.h, y = task % p.h, width = p.n * p.e;
    float *grad = static_cast<float *>(scratch(2 * (p.e + L) * sizeof(float)));
    float *head = grad + (p.e + L - 1) / L * L;
    std::fill_n(droot + task * p.n, p.n, 0.f);
    for (long x = 0; x < p.w; x++) {
      const long token = task * p.w + x;
      for (int which = 0; which < 2; which++)
        for (long n = 0; n < p.n; n++) {
          const long at = token * 3 * width + which * width + n * p.e;
          const Strides st = which ? ks : qs;
          const S *from = (which ? gk : gq) + b * st.b + y * st.h + x * st.w + n * st.n;
          row(p.e, [&](long i, int c) __attribute__((always_inline)) {
            put(grad + i, get(from + i, c), c);
            put(head + i, get(qkv + at + i, c), c);
          });
          if (table)
            turn<-1>(grad, int(p.f), tables.at(y, 0, n), tables.at(y, 1, n),
                     tables.at(p.h + x, 0, n), tables.at(p.h + x, 1, n));
          const float r = norm_factor(head, p.e);
          V along{};
          row(p.e, [&](long i, int c) __attribute__((always_inline)) {
            along += get(head + i, c) * get(grad + i, c);
          });
          const float dot = sum<float>(along);
          droot[task * p.n + n] += dot * r;
          const float factor = root[n] * r, slope = factor * dot * r * r;
          row(p.e, [&](long i, int c) __attribute__((always_inline)) {
            put(dqkv + at + i, get(grad + i, c) * factor - get(head + i, c) * slope, c);
          });
        }
      for (long n = 0; n < p.n; n++)
        memcpy(dqkv + token * 3 * width + 2 * width + n * p.e,
               gv + b * vs.b + y * vs.h + x * vs.w + n * vs.n, p.e * sizeof(S));
    }
  });
}

}  // namespace

#define FUNCTIONS(NAME, S)                                                                        \
  extern "C" void norm_##NAME(Parallel parallel, int threads, long centre, long images,           \
                              long tokens, long d, double eps, const S *x, const float *scale,    \
                              const float *shift, long stride, S *out) {                          \
    (centre ? norm<true, S> : norm<false, S>)({parallel, threads}, images, tokens, d, float(eps), \
                                              x, scale, shift, stride, out);                      \
  }                                                                                               \
  extern "C" void norm_backward_##NAME(Parallel parallel, int threads, long centre, long images,  \
                                       long tokens, long d, double eps, const S *g, const S *x,   \
                                       const float *scale, long stride, S *dx, float *dscale,     \
                                       float *dshift) {                                           \
    (centre ? norm_backward<true, S>                                                              \
            : norm_backward<false, S>)({parallel, threads}, images, tokens, d, float(eps), g, x,  \
                                       scale, stride, dx, dscale, dshift);                        \
  }                                                                                               \
  extern "C" void gated_##NAME(Parallel parallel, int threads, long images, long tokens, long d,  \
                               const S *x, const S *branch, const float *gate, long stride,       \
                               S *out) {                                                          \
    gated<S>({parallel, threads}, images, tokens, d, x, branch, gate, stride, out);               \
  }                                                                                               \
  extern "C" void gated_backward_##NAME(Parallel parallel, int threads, long images, long tokens, \
                                        long d, const S *g, const S *branch, const float *gate,   \
                                        long stride, S *dbranch, float *dgate) {                  \
    gated_backward<S>({parallel, threads}, images, tokens, d, g, branch, gate, stride, dbranch,   \
                      dgate);                                                                     \
  }                                                                                               \
  extern "C" void dropout_##NAME(Parallel parallel, int threads, long count, double p,            \
                                 const int64_t *seed, const S *x, S *out) {                       \
    dropout<S>({parallel, threads}, count, uint64_t(*seed), uint32_t(p * 4294967296.0),           \
               float(1 / (1 - p)), x, out);                                                       \
  }                                                                                               \
  extern "C" void geglu_##NAME(Parallel parallel, int threads, long tokens, long d, const S *up,  \
                               S *out) {                                                          \
    geglu<S>({parallel, threads}, tokens, d, up, out);                                            \
  }                                                                                               \
  extern "C" void geglu_backward_##NAME(Parallel parallel, int threads, long tokens, long d,      \
                                        const S *g, const S *up, S *dup) {                        \
    geglu_backward<S>({parallel, threads}, tokens, d, g, up, dup);                                \
  }                                                                                               \
  extern "C" void prologue_##NAME(Parallel parallel, int threads, const long *s, const S *qkv,    \
                                  const float *root, const float *table, S *q, S *k) {            \
    prologue<S>({parallel, threads}, {s[0], s[1], s[2], s[3], s[4], s[5]}, qkv, root, table, q,   \
                k);                                                                               \
  }                                                                                               \
  extern "C" void prologue_backward_##NAME(                                                       \
      Parallel parallel, int threads, const long *s, const long *st, const S *gq, const S *gk,    \
      const S *gv, const S *qkv, const float *root, const float *table, S *dqkv, float *droot) {  \
    prologue_backward<S>({parallel, threads}, {s[0], s[1], s[2], s[3], s[4], s[5]}, gq,           \
                         {st[0], st[1], st[2], st[3]}, gk, {st[4], st[5], st[6], st[7]}, gv,      \
                         {st[8], st[9], st[10], st[11]}, qkv, root, table, dqkv, droot);          \
  }
FUNCTIONS(float32, float)
FUNCTIONS(bfloat16, bfloat16)

// Multiply-adds that wait for nothing but each other's latency: what the processor can do at most.
extern "C" void fma_loop(Parallel parallel, int threads, long rounds, float *sink) {
  for_each({parallel, threads}, threads, [&](long task) {
    V a[16];
    for (int i = 0; i < 16; i++) a[i] = splat(float(i) * 1e-3f);
    const V x = splat(0.999f), y = splat(1e-4f);
    for (long round = 0; round < rounds; round++)
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) a[i] = a[i] * x + y;
    V total{};
    for (int i = 0; i < 16; i++) total += a[i];
    sink[task] = sum<float>(total);
  });
}
