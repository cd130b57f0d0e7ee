// Vectors of the machine's width, in the vector extensions of GCC and Clang, and a parallel loop.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#else  // without AVX2 the compiler makes two of each
constexpr int VECTOR_BYTES = 32;
#endif

constexpr double LOG2E = 1.44269504088896340736;

#define INLINE static inline __attribute__((always_inline))

template <class T> constexpr int LANES = VECTOR_BYTES / int(sizeof(T));

template <class T> struct Types {
  typedef T Vec __attribute__((vector_size(VECTOR_BYTES)));
};
struct bfloat16 {
  uint16_t bits;
};
template <> struct Types<bfloat16> {};  // it is loaded as float
template <class T> using Vec = typename Types<T>::Vec;
template <class T> struct IntOf;
template <> struct IntOf<float> {
  using type = int32_t;
};
template <> struct IntOf<double> {
  using type = int64_t;
};
template <class T> using Int = typename IntOf<T>::type;

template <class T> INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

template <class T> INLINE Vec<T> load(const T *p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Vec<float> load(const bfloat16 *p) {
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Half half;
  memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Types<uint32_t>::Vec) << 16);
}
template <class T> INLINE void store(T *p, Vec<T> v) { memcpy(p, &v, sizeof v); }
INLINE void store(bfloat16 *p, Vec<float> v) {  // to the nearest, ties to even
  typedef uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  auto bits = (Types<uint32_t>::Vec)v;
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  auto nan = (Types<uint32_t>::Vec)(v != v);
  Half half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Half);
  memcpy(p, &half, sizeof half);
}

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE void narrow(float x, float *p) { *p = x; }
INLINE void narrow(double x, double *p) { *p = x; }
INLINE void narrow(float x, bfloat16 *p) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// What arithmetic is done in, for what is stored.
template <class S> struct ComputeOf {
  using type = S;
};
template <> struct ComputeOf<bfloat16> {
  using type = float;
};
template <class S> using Compute = typename ComputeOf<S>::type;

template <class T> INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

// 2^x: relative error below 2e-7 for x in [-126, 127], to which others are clamped; NaN is NaN.
INLINE Vec<float> exp2(Vec<float> x) {
  x = x < -126.f ? splat(-126.f) : x;  // in this order NaN stays
  x = x > 127.f ? splat(127.f) : x;
  const Vec<float> shifted = x + 12582912.f;  // the integer part, in the low bits
  const Vec<float> r = x - (shifted - 12582912.f);
  Vec<float> p = splat(1.54614475e-4f);  // fit of (2^r - 1) / r on [-1/2, 1/2]
  p = p * r + 1.33908674e-3f;
  p = p * r + 9.61805667e-3f;
  p = p * r + 5.55035710e-2f;
  p = p * r + 2.40226509e-1f;
  p = p * r + 6.93147188e-1f;
  p = p * r + 1.f;
  auto exponent = ((Vec<int32_t>)shifted << 23) + 0x3f800000;
  return p * (Vec<float>)exponent;
}
INLINE Vec<double> exp2(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < LANES<double>; i++) y[i] = std::exp2(x[i]);
  return y;
}

// Lane i of the result is lane index[i] of v.
template <class T> INLINE Vec<T> permute(Vec<T> v, Vec<Int<T>> index) {
#if defined(__clang__)
  Vec<T> y;
  for (int i = 0; i < LANES<T>; i++) y[i] = v[index[i]];
  return y;
#else
  return __builtin_shuffle(v, index);
#endif
}

template <class T> INLINE T sum(Vec<T> v) {
#pragma GCC unroll 4
  for (int apart = LANES<T> / 2; apart; apart /= 2) {
    Vec<Int<T>> index;
    for (int i = 0; i < LANES<T>; i++) index[i] = i ^ apart;
    v += permute<T>(v, index);
  }
  return v[0];
}

// Lanes of a and b in turn: of their first halves, and of their second.
template <class T> INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T> &low, Vec<T> &high) {
#if defined(__clang__)
  for (int i = 0; i < LANES<T>; i++) {
    low[i] = i % 2 ? b[i / 2] : a[i / 2];
    high[i] = i % 2 ? b[(i + LANES<T>) / 2] : a[(i + LANES<T>) / 2];
  }
#else
  Vec<Int<T>> index;
  for (int i = 0; i < LANES<T>; i++) index[i] = i % 2 * LANES<T> + i / 2;
  low = __builtin_shuffle(a, b, index);
  high = __builtin_shuffle(a, b, index + LANES<T> / 2);
#endif
}

// Rows become columns.
template <class T> INLINE void transpose(Vec<T> (&rows)[LANES<T>]) {
  constexpr int n = LANES<T>;
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++)
      interleave<T>(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) rows[i] = next[i];
  }
}

// ---- a parallel loop over the threads that torch has --------------------------------------------

// As libgomp's GOMP_parallel: calls fn(data) on each of `threads` threads.
using Parallel = void (*)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);

struct Threads {
  Parallel parallel;  // null: this thread alone
  int number;
};

// body(task) for each task in [0, tasks), each once, on any thread.
template <class Body> void for_each(const Threads &threads, long tasks, const Body &body) {
  struct Job {
    std::atomic<long> next{0};
    long tasks;
    const Body *body;
  } job;
  job.tasks = tasks;
  job.body = &body;
  auto work = [](void *data) {
    auto &job = *static_cast<Job *>(data);
    for (long task; (task = job.next++) < job.tasks;) (*job.body)(task);
  };
  const int number = int(std::min<long>(threads.number, tasks));
  if (threads.parallel && number > 1) threads.parallel(work, &job, unsigned(number), 0);
  else work(&job);
}

// Memory of this thread, kept for the next call; aligned to a vector.
INLINE void *scratch(size_t bytes) {
  struct Kept {
    void *memory = nullptr;
    size_t bytes = 0;
    ~Kept() { free(memory); }
  };
  static thread_local Kept kept;
  if (kept.bytes < bytes) {
    free(kept.memory);
    kept.bytes = (bytes + 4095) / 4096 * 4096;
    kept.memory = aligned_alloc(64, kept.bytes);
    if (!kept.memory) {
      fprintf(stderr, "hdit_kernels: no memory for %zu bytes of scratch\n", kept.bytes);
      abort();
    }
  }
  return kept.memory;
}
