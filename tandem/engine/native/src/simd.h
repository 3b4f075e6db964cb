// Lanes of floats with the same bits on every machine.
//
// All arithmetic here is IEEE single precision in an order fixed by the code, with explicit fused
// multiply-adds, so AVX-512, AVX2 and plain C++ give equal results (compile with -ffp-contract=off).
//
//   f8    8 lanes   attention, norms, activations
//   p16   16 lanes  one panel of a linear layer's outputs
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TANDEM_AVX2 1
#include <immintrin.h>
#if defined(__AVX512F__)
#define TANDEM_AVX512 1
#endif
#endif

namespace tandem {

constexpr int LANES = 8;
constexpr int PANEL = 16;

constexpr int CACHE_LINE = 64;  // bytes

// A number in bfloat16: a float's upper half.
struct bfloat16 { uint16_t bits; };

inline int divide_up(int n, int by) { return (n + by - 1) / by; }
inline int round_up(int n, int multiple) { return divide_up(n, multiple) * multiple; }

#if TANDEM_AVX2

struct f8 { __m256 v; };
inline f8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, f8 a) { _mm256_storeu_ps(p, a.v); }
inline f8 set1(float x) { return {_mm256_set1_ps(x)}; }
inline f8 add(f8 a, f8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline f8 sub(f8 a, f8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline f8 mul(f8 a, f8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline f8 div(f8 a, f8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline f8 fma(f8 a, f8 b, f8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// If `b` is not a number these return it, as minps and maxps do.
inline f8 max(f8 a, f8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline f8 min(f8 a, f8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline f8 round_even(f8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// Lanes of `a` where x < limit become zero.
inline f8 zero_below(f8 a, f8 x, f8 limit) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ), a.v)};
}
// a · 2^n for whole n in [-126, 127].
inline f8 scale_by_power(f8 a, f8 n) {
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}
// The float that these bits are, shifted left.
inline f8 shifted(f8 a, int by) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), by))};
}
inline f8 load_bytes(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline f8 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline f8 load(const bfloat16* p) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
inline void store(uint16_t* p, f8 a) {
    const __m128i halves = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
// Whole numbers that fit.
inline __m128i words_of(f8 a) {
    const __m256i ints = _mm256_cvtps_epi32(a.v);
    return _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
}
inline void store_ints(int16_t* p, f8 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words_of(a)); }
inline void store_ints(int8_t* p, f8 a) {
    const __m128i words = words_of(a);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
// ((0+1)+(2+3)) + ((4+5)+(6+7)) of four vectors at once, to four floats.
inline void sum4(f8 a, f8 b, f8 c, f8 d, float* out) {
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
inline float largest(f8 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#else

struct f8 { float v[LANES]; };
#define TANDEM_EACH(expression) f8 r; for (int i = 0; i < LANES; i++) r.v[i] = (expression); return r
inline f8 load(const float* p) { f8 r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline void store(float* p, f8 a) { std::memcpy(p, a.v, sizeof a.v); }
inline f8 set1(float x) { TANDEM_EACH(x); }
inline f8 add(f8 a, f8 b) { TANDEM_EACH(a.v[i] + b.v[i]); }
inline f8 sub(f8 a, f8 b) { TANDEM_EACH(a.v[i] - b.v[i]); }
inline f8 mul(f8 a, f8 b) { TANDEM_EACH(a.v[i] * b.v[i]); }
inline f8 div(f8 a, f8 b) { TANDEM_EACH(a.v[i] / b.v[i]); }
inline f8 fma(f8 a, f8 b, f8 c) { TANDEM_EACH(std::fma(a.v[i], b.v[i], c.v[i])); }
inline f8 max(f8 a, f8 b) { TANDEM_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline f8 min(f8 a, f8 b) { TANDEM_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline f8 round_even(f8 a) { TANDEM_EACH(std::nearbyint(a.v[i])); }
inline f8 zero_below(f8 a, f8 x, f8 limit) { TANDEM_EACH(x.v[i] < limit.v[i] ? 0.0f : a.v[i]); }
inline f8 scale_by_power(f8 a, f8 n) { TANDEM_EACH(std::isnan(n.v[i]) ? n.v[i] : std::ldexp(a.v[i], int(n.v[i]))); }
inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(mantissa), -24);
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
inline f8 load_half(const uint16_t* p) { TANDEM_EACH(half_to_float(p[i])); }
inline f8 load(const bfloat16* p) {
    f8 r;
    for (int i = 0; i < LANES; i++) {
        const uint32_t bits = uint32_t(p[i].bits) << 16;
        std::memcpy(&r.v[i], &bits, sizeof bits);
    }
    return r;
}
inline uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00 | (size >> 13 & 0x1ff));  // no number
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);                        // rounds to infinity
    if (size < 0x38800000) return uint16_t(sign | uint32_t(std::nearbyint(std::ldexp(std::fabs(f), 24))));
    return uint16_t(sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13);
}
inline void store(uint16_t* p, f8 a) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(a.v[i]);
}
inline float shifted(float a, int by) {
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    bits <<= by;
    std::memcpy(&a, &bits, sizeof bits);
    return a;
}
inline f8 shifted(f8 a, int by) { TANDEM_EACH(shifted(a.v[i], by)); }
inline f8 load_bytes(const int8_t* p) { TANDEM_EACH(float(p[i])); }
template <class T>
inline void store_ints(T* p, f8 a) {
    for (int i = 0; i < LANES; i++) p[i] = T(a.v[i]);
}
inline float sum_of(f8 a) {
    return ((a.v[0] + a.v[1]) + (a.v[2] + a.v[3])) + ((a.v[4] + a.v[5]) + (a.v[6] + a.v[7]));
}
inline void sum4(f8 a, f8 b, f8 c, f8 d, float* out) {
    out[0] = sum_of(a), out[1] = sum_of(b), out[2] = sum_of(c), out[3] = sum_of(d);
}
inline float largest(f8 a) { return *std::max_element(a.v, a.v + LANES); }
#undef TANDEM_EACH

#endif

inline f8 load(const uint16_t* p) { return load_half(p); }
inline f8 zero() { return set1(0.0f); }

inline float sum(f8 a) {
    float out[4];
    sum4(a, a, a, a, out);
    return out[0];
}

// The first `n` < 8 floats, then zeros.
inline f8 load_some(const float* p, int n) {
    float padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(float));
    return load(padded);
}

// A number in every lane of an f8 or a p16.
template <class F>
F every(float x);
template <>
inline f8 every<f8>(float x) { return set1(x); }

// e^x within 2 units in the last place; 0 below -87.3; x above 88 counts as 88; NaN stays.
template <class F>
inline F exp(F x) {
    const F low = every<F>(-87.3f);
    F clamped = min(every<F>(88.0f), max(low, x));
    F n = round_even(mul(clamped, every<F>(1.44269504f)));
    F r = fma(n, every<F>(-0.693359375f), clamped);
    r = fma(n, every<F>(2.12194440e-4f), r);
    F p = every<F>(1.9875691500e-4f);
    p = fma(p, r, every<F>(1.3981999507e-3f));
    p = fma(p, r, every<F>(8.3334519073e-3f));
    p = fma(p, r, every<F>(4.1665795894e-2f));
    p = fma(p, r, every<F>(1.6666665459e-1f));
    p = fma(p, r, every<F>(5.0000001201e-1f));
    p = fma(mul(r, r), p, add(r, every<F>(1.0f)));
    return zero_below(scale_by_power(p, n), x, low);
}

// 2^x for x <= 0 within one part of 13,000, of which bfloat16 sees nothing; 0 below -126.5; NaN stays.
template <class F>
inline F small_power_of_two(F x) {
    const F magic = every<F>(12582912.0f + 127.0f);  // rounds to whole numbers, with their exponent in the last bits
    const F clamped = max(every<F>(-127.0f), x), n = add(clamped, magic), r = sub(clamped, sub(n, magic));
    F p = every<F>(5.5171669e-2f);
    p = fma(p, r, every<F>(2.4261115e-1f));
    p = fma(p, r, every<F>(6.9326099e-1f));
    p = fma(p, r, every<F>(9.9992807e-1f));
    return mul(shifted(n, 23), p);
}

#if TANDEM_AVX512

struct p16 { __m512 v; };
struct b16 { __m512 v; };  // one number in every lane
inline p16 load16(const float* p) { return {_mm512_loadu_ps(p)}; }
inline p16 load16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline p16 load16(const bfloat16* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
inline p16 load16(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store16(float* p, p16 a) { _mm512_storeu_ps(p, a.v); }
inline p16 zero16() { return {_mm512_setzero_ps()}; }
inline b16 broadcast16(const float* p) { return {_mm512_set1_ps(*p)}; }
inline p16 fma(p16 w, b16 x, p16 acc) { return {_mm512_fmadd_ps(w.v, x.v, acc.v)}; }

// The same as of f8, and of both halves.
template <>
inline p16 every<p16>(float x) { return {_mm512_set1_ps(x)}; }
inline p16 load_twice(const float* p) {
    return {_mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(p))))};
}
inline p16 load_twice(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline f8 low_half(p16 a) { return {_mm512_castps512_ps256(a.v)}; }
inline f8 high_half(p16 a) { return {_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1))}; }
inline p16 add(p16 a, p16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline p16 sub(p16 a, p16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline p16 mul(p16 a, p16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline p16 fma(p16 a, p16 b, p16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline p16 max(p16 a, p16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline p16 min(p16 a, p16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline p16 round_even(p16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline p16 zero_below(p16 a, p16 x, p16 limit) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), a.v)};
}
inline p16 scale_by_power(p16 a, p16 n) {
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(bits))};
}
inline p16 shifted(p16 a, int by) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), by))};
}
inline p16 add_pairs(p16 a, p16 b) {
    return {_mm512_add_ps(_mm512_shuffle_ps(a.v, b.v, 0x88), _mm512_shuffle_ps(a.v, b.v, 0xdd))};
}
inline void sum4(p16 a, p16 b, p16 c, p16 d, float* low, float* high) {
    const __m512 quads = add_pairs(add_pairs(a, b), add_pairs(c, d)).v;
    const __m512 sums = _mm512_add_ps(quads, _mm512_shuffle_f32x4(quads, quads, 0xb1));  // each half with its other
    _mm_storeu_ps(low, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(high, _mm512_extractf32x4_ps(sums, 2));
}

#else

struct p16 { f8 lo, hi; };
struct b16 { f8 v; };
inline p16 load16(const float* p) { return {load(p), load(p + LANES)}; }
inline p16 load16(const uint16_t* p) { return {load_half(p), load_half(p + LANES)}; }
inline p16 load16(const bfloat16* p) { return {load(p), load(p + LANES)}; }
inline p16 load16(const int8_t* p) { return {load_bytes(p), load_bytes(p + LANES)}; }
inline void store16(float* p, p16 a) { store(p, a.lo), store(p + LANES, a.hi); }
inline p16 zero16() { return {zero(), zero()}; }
inline b16 broadcast16(const float* p) { return {set1(*p)}; }
inline p16 fma(p16 w, b16 x, p16 acc) { return {fma(w.lo, x.v, acc.lo), fma(w.hi, x.v, acc.hi)}; }

template <>
inline p16 every<p16>(float x) { return {set1(x), set1(x)}; }
inline f8 low_half(p16 a) { return a.lo; }
inline f8 high_half(p16 a) { return a.hi; }
inline p16 add(p16 a, p16 b) { return {add(a.lo, b.lo), add(a.hi, b.hi)}; }
inline p16 sub(p16 a, p16 b) { return {sub(a.lo, b.lo), sub(a.hi, b.hi)}; }
inline p16 mul(p16 a, p16 b) { return {mul(a.lo, b.lo), mul(a.hi, b.hi)}; }
inline p16 max(p16 a, p16 b) { return {max(a.lo, b.lo), max(a.hi, b.hi)}; }
inline p16 exp(p16 x) { return {exp(x.lo), exp(x.hi)}; }
inline p16 small_power_of_two(p16 x) { return {small_power_of_two(x.lo), small_power_of_two(x.hi)}; }

#endif

}  // namespace tandem
