// Noise by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
// one stream for each key: see hdit_kernels/philox.py.
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using V = Vec<float>;
typedef Types<int32_t>::Vec I;
typedef Types<uint32_t>::Vec U;
typedef Types<uint64_t>::Vec W;

constexpr int L = LANES<float>, H = L / 2;  // numbers of 32 bits in a vector, and of 64
constexpr long STEP = 4 * L;                // elements of L blocks
constexpr long PIECE = 128 * STEP;          // elements that one thread makes at a time

// The two operations for which vector extensions have no word.

// Products of the lower halves of 64-bit lanes; their upper halves may hold anything.
INLINE W product(W a, W b) {
#if defined(__AVX512F__)
  return (W)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (W)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

INLINE V root(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < L; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// -2 ln u: relative error below 2e-7 for u in [2^-33, 1], and 0 at 1.
INLINE V minus_two_log(V u) {
  const I bits = (I)u;
  const I exponent = (bits - 0x3f3504f3) >> 23;  // leaves a mantissa in [sqrt(1/2), sqrt(2))
  const V f = (V)(bits - (exponent << 23)) - 1.f;
  V p = splat(-0.0763442991f);  // fit of (ln(1 + f) - f + f^2 / 2) / f^3
  p = p * f + 0.127615504f;
  p = p * f - 0.131601951f;
  p = p * f + 0.142017625f;
  p = p * f - 0.166233565f;
  p = p * f + 0.200012267f;
  p = p * f - 0.250008211f;
  p = p * f + 0.333333317f;
  const V log = f + f * f * (p * f - 0.5f);
  return -2.f * (__builtin_convertvector(exponent, V) * 0.693147181f + log);
}

// Cosines and sines of angles in units of a turn / 2^32, in [-2^31, 2^31].
INLINE void cos_sin(V angle, V &cosine, V &sine) {
  const V shifted = angle * 0x1p-30f + 12582912.f;  // quarter turns, in the low bits
  const I quarter = (I)shifted;
  const V x = (angle - (shifted - 12582912.f) * 0x1p30f) * 1.46291807926716e-9f;
  const V y = x * x;
  V s = splat(-0.000195172336f);  // fit of (sin x - x) / x^3 on [-pi/4, pi/4]
  s = s * y + 0.00833217768f;
  s = s * y - 0.166666549f;
  s = x + x * y * s;
  V c = splat(2.44383776e-5f);  // fit of (cos x - 1 + x^2 / 2) / x^4
  c = c * y - 0.00138873669f;
  c = c * y + 0.0416666469f;
  c = 1.f + y * (c * y - 0.5f);
  const I odd = -(quarter & 1);
  const I cosine_bits = ((I)c & ~odd) | ((I)s & odd), sine_bits = ((I)s & ~odd) | ((I)c & odd);
  cosine = (V)(cosine_bits ^ (((quarter + 1) & 2) << 30));
  sine = (V)(sine_bits ^ ((quarter & 2) << 30));
}

// Two independent standard normal numbers of two words (Box and Muller, 1958).
INLINE void box_muller(U &first, U &second) {
  const V u = __builtin_convertvector(first, V) * 0x1p-32f + 0x1p-33f;
  const V radius = root(minus_two_log(u));
  V cosine, sine;
  cos_sin(__builtin_convertvector((I)second, V), cosine, sine);
  first = (U)(radius * cosine);
  second = (U)(radius * sine);
}

struct Schedule {
  W first[10], second[10];  // the key of each round
  W draw_low, draw_high;
};

// The four words of each of H blocks, two lanes a block: in the lower half of each.
INLINE void philox(const Schedule &s, W block, W (&words)[4]) {
  const W m0 = W{} + 0xD2511F53u, m1 = W{} + 0xCD9E8D57u;
  W c0 = block, c1 = block >> 32, c2 = s.draw_low, c3 = s.draw_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const W p0 = product(c0, m0), p1 = product(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ s.first[round];
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ s.second[round];
    c3 = p0;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// `count` elements of a draw of a stream, from this block on.
template <bool NORMAL> void fill(const Schedule &s, uint64_t first, long count, uint32_t *out) {
  W lane;
  for (int i = 0; i < H; i++) lane[i] = 2 * i;
  for (long i = 0; i < count; i += STEP) {
    const W block = lane + (first + uint64_t(i) / 4);
    W even[4], odd[4];
    philox(s, block, even);
    philox(s, block + 1, odd);
    V x[4];
    for (int j = 0; j < 4; j++) x[j] = (V)((even[j] & 0xffffffff) | (odd[j] << 32));
    if (NORMAL) {
      U a = (U)x[0], b = (U)x[1], c = (U)x[2], d = (U)x[3];
      box_muller(a, b);
      box_muller(c, d);
      x[0] = (V)a, x[1] = (V)b, x[2] = (V)c, x[3] = (V)d;
    }
    V ac[2], bd[2], y[4];
    interleave<float>(x[0], x[2], ac[0], ac[1]);
    interleave<float>(x[1], x[3], bd[0], bd[1]);
    interleave<float>(ac[0], bd[0], y[0], y[1]);
    interleave<float>(ac[1], bd[1], y[2], y[3]);
    memcpy(out + i, y, std::min(STEP, count - i) * sizeof(float));
  }
}

// out (n, count): the draw of each key's stream, from this block on.
template <bool NORMAL> void noise(const Threads &threads, long n, long count, uint64_t draw,
                                  uint64_t block, const uint64_t *keys, uint32_t *out) {
  const long pieces = (count + PIECE - 1) / PIECE;
  const long together = std::max(1L, PIECE / count);  // short streams that one task makes
  for_each(threads, (n * pieces + together - 1) / together, [&](long task) {
    for (long i = task * together; i < std::min((task + 1) * together, n * pieces); i++) {
      const long stream = i / pieces, first = i % pieces * PIECE;
      Schedule s;
      s.draw_low = W{} + draw, s.draw_high = W{} + (draw >> 32);
      for (uint32_t round = 0; round < 10; round++) {
        s.first[round] = W{} + uint32_t(keys[stream] + round * 0x9E3779B9u);
        s.second[round] = W{} + uint32_t((keys[stream] >> 32) + round * 0xBB67AE85u);
      }
      fill<NORMAL>(s, block + uint64_t(first) / 4, std::min(PIECE, count - first),
                   out + stream * count + first);
    }
  });
}

}  // namespace

extern "C" void philox_words(Parallel parallel, int threads, long n, long count, long draw,
                             long block, const uint64_t *keys, uint32_t *out) {
  noise<false>({parallel, threads}, n, count, uint64_t(draw), uint64_t(block), keys, out);
}
extern "C" void philox_normal(Parallel parallel, int threads, long n, long count, long draw,
                              long block, const uint64_t *keys, uint32_t *out) {
  noise<true>({parallel, threads}, n, count, uint64_t(draw), uint64_t(block), keys, out);
}
