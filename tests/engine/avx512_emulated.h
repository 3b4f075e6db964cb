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
inline float16 from_ints(int16 i) { return {_mm256_cvtepi32_ps(i.lo), _mm256_cvtepi32_ps(i.hi)}; }

inline float16 twice(__m256d a) { return {_mm256_castpd_ps(a), _mm256_castpd_ps(a)}; }
inline float16 add(float16 a, float16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline float16 sub(float16 a, float16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline float16 mul(float16 a, float16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline float16 max(float16 a, float16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline float16 min(float16 a, float16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline int16 add(int16 a, int16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline int16 shift_left(int16 a, unsigned n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
inline int16 set1(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
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
inline __m256i dpbusd(__m256i sums, __m256i without_sign, __m256i with_sign) {
    int32_t s[8];
    uint8_t a[32];
    int8_t b[32];
    std::memcpy(s, &sums, 32), std::memcpy(a, &without_sign, 32), std::memcpy(b, &with_sign, 32);
    for (int i = 0; i < 32; i++) s[i / 4] += int(a[i]) * int(b[i]);
    std::memcpy(&sums, s, 32);
    return sums;
}

// Two products of signed words added to each int.
inline __m256i dpwssd(__m256i sums, __m256i a, __m256i b) {
    int32_t s[8];
    int16_t x[16], y[16];
    std::memcpy(s, &sums, 32), std::memcpy(x, &a, 32), std::memcpy(y, &b, 32);
    for (int i = 0; i < 16; i++) s[i / 2] += int(x[i]) * int(y[i]);
    std::memcpy(&sums, s, 32);
    return sums;
}

}  // namespace emulated

#define __AVX512F__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
#define __m512 emulated::float16
#define __m512i emulated::int16
#define _mm512_loadu_ps emulated::loadu
#define _mm512_storeu_ps emulated::storeu
#define _mm512_setzero_ps() emulated::set1(0.0f)
#define _mm512_set1_ps emulated::set1
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_cvtph_ps emulated::from_halves
#define _mm512_cvtepi8_epi32 emulated::from_bytes
#define _mm512_cvtepi32_ps emulated::from_ints
#define _mm256_dpbusd_epi32 emulated::dpbusd
#define _mm256_dpwssd_epi32 emulated::dpwssd
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
#define _mm512_set1_epi32 emulated::set1
#define _mm512_cvtps_epi32 emulated::to_ints
#define _mm512_castsi512_ps emulated::bits_of
#define _mm512_roundscale_ps emulated::roundscale
#define _mm512_cmp_ps_mask emulated::not_less
#define _mm512_maskz_mov_ps emulated::maskz_mov
#define _mm512_shuffle_ps emulated::shuffle
#define _mm512_shuffle_f32x4 emulated::shuffle_lanes
