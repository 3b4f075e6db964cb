// The AVX-512 instructions the kernels use, out of AVX2's, so that their AVX-512 code runs on any machine of the
// tests. Put in front of everything with -include. By Intel's description of each, not by how AVX2 code does it.
#pragma once

#include <immintrin.h>

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
