// The AVX-512 instructions the kernels use, out of AVX2's, so that their AVX-512 code runs on any machine of the
// tests. Put in front of everything with -include. By Intel's description of each, not by how AVX2 code does it.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct float16 { __m256 lo, hi; };
struct int16 { __m256i lo, hi; };

inline float16 loadu(const void* p) {
    const float* from = static_cast<const float*>(p);
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline void storeu(void* p, float16 a) {
    float* to = static_cast<float*>(p);
    _mm256_storeu_ps(to, a.lo), _mm256_storeu_ps(to + 8, a.hi);
}
inline float16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline float16 fmadd(float16 a, float16 b, float16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline float16 from_halves(__m256i h) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
inline int16 from_bytes(__m128i b) {
    return {_mm256_cvtepi8_epi32(b), _mm256_cvtepi8_epi32(_mm_srli_si128(b, 8))};
}
inline int16 from_words(__m256i w) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(w)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(w, 1))};
}
inline float16 from_ints(int16 i) { return {_mm256_cvtepi32_ps(i.lo), _mm256_cvtepi32_ps(i.hi)}; }

inline int16 loadu_ints(const void* p) {
    const __m256i* from = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline int16 both(__m256i half) { return {half, half}; }
inline int16 insert(int16 a, __m256i half, int which) { return which ? int16{a.lo, half} : int16{half, a.hi}; }
template <class F>
inline int16 each(int16 a, int16 b, F f) {
    return {f(a.lo, b.lo), f(a.hi, b.hi)};
}
#define TANDEM_EACH_HALF(name, half) \
    inline int16 name(int16 a, int16 b) { \
        return each(a, b, [](__m256i x, __m256i y) { return half(x, y); }); \
    }
TANDEM_EACH_HALF(add, _mm256_add_epi32)
TANDEM_EACH_HALF(sub_words, _mm256_sub_epi16)
TANDEM_EACH_HALF(bits_of_one, _mm256_xor_si256)
TANDEM_EACH_HALF(bits_of_both, _mm256_and_si256)
TANDEM_EACH_HALF(shuffle_bytes, _mm256_shuffle_epi8)
TANDEM_EACH_HALF(unpack_low, _mm256_unpacklo_epi8)
TANDEM_EACH_HALF(unpack_high, _mm256_unpackhi_epi8)
#undef TANDEM_EACH_HALF

inline int16 as_ints(float16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline float16 twice(__m256d a) { return {_mm256_castpd_ps(a), _mm256_castpd_ps(a)}; }
inline float16 add(float16 a, float16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline float16 sub(float16 a, float16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline float16 mul(float16 a, float16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline float16 max(float16 a, float16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline float16 min(float16 a, float16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline int16 shift_left(int16 a, unsigned n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
inline int16 to_ints(float16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline float16 bits_of(int16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

struct Numbers { float of[16]; };
inline Numbers numbers(float16 a) { Numbers n; storeu(n.of, a); return n; }

// To whole numbers; the upper half of `how` is how many fractional bits stay.
inline float16 roundscale(float16 a, int how) {
    Numbers n = numbers(a);
    for (float& x : n.of) x = std::ldexp(std::nearbyint(std::ldexp(x, how >> 4)), -(how >> 4));
    return loadu(n.of);
}
// A bit for each lane where a < b does not hold, or a or b is no number.
inline uint16_t not_less(float16 a, float16 b, int) {
    const Numbers x = numbers(a), y = numbers(b);
    uint16_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint16_t(!(x.of[i] < y.of[i])) << i;
    return mask;
}
inline float16 maskz_mov(uint16_t mask, float16 a) {
    Numbers n = numbers(a);
    for (int i = 0; i < 16; i++) n.of[i] = mask >> i & 1 ? n.of[i] : 0.0f;
    return loadu(n.of);
}
// In each lane of 128 bits: two of a, then two of b.
inline float16 shuffle(float16 a, float16 b, int which) {
    const Numbers x = numbers(a), y = numbers(b);
    Numbers n;
    for (int i = 0; i < 16; i++) n.of[i] = (i & 2 ? y : x).of[(i & 12) + (which >> 2 * (i & 3) & 3)];
    return loadu(n.of);
}
// Lanes of 128 bits: two of a, then two of b.
inline float16 shuffle_lanes(float16 a, float16 b, int which) {
    const Numbers x = numbers(a), y = numbers(b);
    Numbers n;
    for (int i = 0; i < 16; i++) n.of[i] = (i & 8 ? y : x).of[4 * (which >> 2 * (i / 4) & 3) + i % 4];
    return loadu(n.of);
}
inline __m128 lane(float16 a, int which) { return _mm_loadu_ps(numbers(a).of + 4 * which); }

// Four products of an unsigned and a signed byte added to each int, without saturation.
inline int16 dpbusd(int16 sums, int16 without_sign, int16 with_sign) {
    uint32_t s[16];
    uint8_t a[64];
    int8_t b[64];
    std::memcpy(s, &sums, 64), std::memcpy(a, &without_sign, 64), std::memcpy(b, &with_sign, 64);
    for (int i = 0; i < 64; i++) s[i / 4] += uint32_t(int(a[i]) * int(b[i]));
    std::memcpy(&sums, s, 64);
    return sums;
}

// Two products of signed words added to each int.
inline int16 dpwssd(int16 sums, int16 a, int16 b) {
    uint32_t s[16];
    int16_t x[32], y[32];
    std::memcpy(s, &sums, 64), std::memcpy(x, &a, 64), std::memcpy(y, &b, 64);
    for (int i = 0; i < 32; i++) s[i / 2] += uint32_t(int(x[i]) * int(y[i]));
    std::memcpy(&sums, s, 64);
    return sums;
}

}  // namespace emulated

#define TANDEM_EMULATED 1  // no instructions written by hand
#define __AVX512F__ 1
#define __m512 emulated::float16
#define __m512i emulated::int16
#define _mm512_loadu_ps emulated::loadu
#define _mm512_storeu_ps emulated::storeu
#define _mm512_setzero_ps() emulated::set1(0.0f)
#define _mm512_set1_ps emulated::set1
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_cvtph_ps emulated::from_halves
#define _mm512_cvtepi8_epi32 emulated::from_bytes
#define _mm512_cvtepu16_epi32 emulated::from_words
#define _mm512_cvtepi32_ps emulated::from_ints
#define _mm512_loadu_si512 emulated::loadu_ints
#define _mm512_setzero_si512() emulated::both(_mm256_setzero_si256())
#define _mm512_set1_epi8(x) emulated::both(_mm256_set1_epi8(x))
#define _mm512_set1_epi16(x) emulated::both(_mm256_set1_epi16(x))
#define _mm512_set1_epi32(x) emulated::both(_mm256_set1_epi32(x))
#define _mm512_set1_epi64(x) emulated::both(_mm256_set1_epi64x(x))
#define _mm512_broadcast_i32x4(x) emulated::both(_mm256_broadcastsi128_si256(x))
#define _mm512_castsi256_si512 emulated::both
#define _mm512_inserti64x4 emulated::insert
#define _mm512_castps_si512 emulated::as_ints
#define _mm512_sub_epi16 emulated::sub_words
#define _mm512_xor_si512 emulated::bits_of_one
#define _mm512_and_si512 emulated::bits_of_both
#define _mm512_shuffle_epi8 emulated::shuffle_bytes
#define _mm512_unpacklo_epi8 emulated::unpack_low
#define _mm512_unpackhi_epi8 emulated::unpack_high
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_dpwssd_epi32 emulated::dpwssd
#define _mm512_castps512_ps256(a) ((a).lo)
#define _mm512_castps512_ps128(a) emulated::lane(a, 0)
#define _mm512_extractf32x4_ps emulated::lane
#define _mm512_castps_pd(a) (a)
#define _mm512_castpd_ps(a) (a)
#define _mm512_extractf64x4_pd(a, half) _mm256_castps_pd((half) ? (a).hi : (a).lo)
#define _mm512_broadcast_f64x4 emulated::twice
#define _mm512_add_ps emulated::add
#define _mm512_sub_ps emulated::sub
#define _mm512_mul_ps emulated::mul
#define _mm512_max_ps emulated::max
#define _mm512_min_ps emulated::min
#define _mm512_add_epi32 emulated::add
#define _mm512_slli_epi32 emulated::shift_left
#define _mm512_cvtps_epi32 emulated::to_ints
#define _mm512_castsi512_ps emulated::bits_of
#define _mm512_roundscale_ps emulated::roundscale
#define _mm512_cmp_ps_mask emulated::not_less
#define _mm512_maskz_mov_ps emulated::maskz_mov
#define _mm512_shuffle_ps emulated::shuffle
#define _mm512_shuffle_f32x4 emulated::shuffle_lanes
