// Numbers in bfloat16, two by two. Products of two of them are exact in single precision, and the odd one is added
// first: vdpbf16ps does both in one instruction, with the bits that two fused multiply-adds have.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"
#include "unrolled.h"

namespace tandem {

struct Pair { uint32_t bits; };  // the one with the even index in the lower half
constexpr uint32_t ODD = 0xffff0000u;

// The nearest bfloat16 (to even). What is too small for a normal float becomes zero, as by the instruction.
inline bfloat16 to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t size = bits & 0x7fffffff, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint32_t number = size < 0x00800000 ? bits >> 16 & 0x8000 : rounded;
    return {uint16_t(size > 0x7f800000 ? bits >> 16 | 0x40 : number)};
}

#if TANDEM_AVX512

struct pairs16 { __m512i v; };  // of 16 outputs
inline pairs16 load16(const Pair* p) { return {_mm512_loadu_si512(p)}; }

#if defined(__AVX512BF16__)
struct pair_b16 { __m512i v; };  // one pair in every lane
inline pair_b16 broadcast16(const Pair* p) { return {_mm512_set1_epi32(int(p->bits))}; }
inline p16 fma(pairs16 w, pair_b16 x, p16 acc) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
    return acc;
}
#else
inline __m512 evens(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 odds(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(ODD))));
}
struct pair_b16 { __m512 even, odd; };
inline pair_b16 broadcast16(const Pair* p) {
    const __m512i bits = _mm512_set1_epi32(int(p->bits));
    return {evens(bits), odds(bits)};
}
inline p16 fma(pairs16 w, pair_b16 x, p16 acc) {
    return {_mm512_fmadd_ps(evens(w.v), x.even, _mm512_fmadd_ps(odds(w.v), x.odd, acc.v))};
}
#endif

#else

#if TANDEM_AVX2
inline __m256i load_bits(const Pair* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline f8 evens(const Pair* p) { return {_mm256_castsi256_ps(_mm256_slli_epi32(load_bits(p), 16))}; }
inline f8 odds(const Pair* p) {
    return {_mm256_castsi256_ps(_mm256_and_si256(load_bits(p), _mm256_set1_epi32(int(ODD))))};
}
#else
inline float of_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline f8 evens(const Pair* p) {
    f8 r;
    for (int i = 0; i < LANES; i++) r.v[i] = of_bits(p[i].bits << 16);
    return r;
}
inline f8 odds(const Pair* p) {
    f8 r;
    for (int i = 0; i < LANES; i++) r.v[i] = of_bits(p[i].bits & ODD);
    return r;
}
#endif

struct pairs16 { p16 even, odd; };
struct pair_b16 { b16 even, odd; };
inline pairs16 load16(const Pair* p) { return {{evens(p), evens(p + LANES)}, {odds(p), odds(p + LANES)}}; }
inline pair_b16 broadcast16(const Pair* p) {
    const uint32_t bits[] = {p->bits << 16, p->bits & ODD};
    float numbers[2];
    std::memcpy(numbers, bits, sizeof numbers);
    return {broadcast16(numbers), broadcast16(numbers + 1)};
}
inline p16 fma(pairs16 w, pair_b16 x, p16 acc) { return fma(w.even, x.even, fma(w.odd, x.odd, acc)); }

#endif

// --- floats and rows of bfloat16 as pairs ---

inline Pair pair_of(bfloat16 even, bfloat16 odd) { return {even.bits | uint32_t(odd.bits) << 16}; }
#if TANDEM_AVX2
inline __m256i load_words(const bfloat16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_words(Pair* p, __m256i words) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words); }
#endif
inline bool is_finite(Pair p) { return (p.bits & 0x7f80) != 0x7f80 && (p.bits & 0x7f800000) != 0x7f800000; }

// Sixteen floats and the sixteen behind them: neighbours with each other.
inline void store_pairs(Pair* to, p16 first, p16 second) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
#else
    float numbers[2 * PANEL];
    store16(numbers, first), store16(numbers + PANEL, second);
    for (int i = 0; i < PANEL; i++) to[i] = pair_of(to_bfloat16(numbers[2 * i]), to_bfloat16(numbers[2 * i + 1]));
#endif
}

// The same of a row; an odd one with zero.
inline void pair_up(const float* from, int count, Pair* to) {
    int i = 0;
    for (; i + 2 * PANEL <= count; i += 2 * PANEL)
        store_pairs(to + i / 2, load16(from + i), load16(from + i + PANEL));
    for (; i < count; i += 2)
        to[i / 2] = pair_of(to_bfloat16(from[i]), i + 1 < count ? to_bfloat16(from[i + 1]) : bfloat16{0});
}

// Numbers of two rows with each other, panels of 16, `stride` from one to the next. Whether all are finite.
inline bool pair_rows(const bfloat16* even, const bfloat16* odd, int count, Pair* to, size_t stride) {
    bool are_finite = true;
    int i = 0;
#if TANDEM_AVX2
    const __m256i exponent = _mm256_set1_epi16(0x7f80);
    __m256i endless = _mm256_setzero_si256();
    for (; i + PANEL <= count; i += PANEL, to += stride) {
        const __m256i a = load_words(even + i), b = load_words(odd + i);
        for (const __m256i x : {a, b})
            endless = _mm256_or_si256(endless, _mm256_cmpeq_epi16(_mm256_and_si256(x, exponent), exponent));
        const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
        store_words(to, _mm256_permute2x128_si256(low, high, 0x20));
        store_words(to + LANES, _mm256_permute2x128_si256(low, high, 0x31));
    }
    are_finite = _mm256_testz_si256(endless, endless);
#endif
    for (; i < count; i += PANEL, to += stride)
        for (int j = 0; j < PANEL; j++) {
            to[j] = i + j < count ? pair_of(even[i + j], odd[i + j]) : Pair{0};
            are_finite &= is_finite(to[j]);
        }
    return are_finite;
}

// Numbers of 16 rows, an even `count` of each, to [count / 2][16].
inline void turn_over(const bfloat16* const* rows, int count, Pair* to) {
    int first = 0;
#if TANDEM_AVX2
    for (; first + PANEL <= count; first += PANEL, to += LANES * PANEL)
        for (int half = 0; half < PANEL; half += LANES) {
            __m256i a[LANES], b[LANES];
            unrolled<LANES>([&](auto i) INLINE { a[i] = load_words(rows[half + i] + first); });
            unrolled<LANES / 2>([&](auto i) INLINE {
                b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
            });
            unrolled<LANES / 4>([&](auto n) INLINE {  // of four rows the first to fourth pair of each half
                constexpr int i = 4 * n;
                a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
                a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
            });
            unrolled<4>([&](auto i) INLINE {
                store_words(to + i * PANEL + half, _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
                store_words(to + (4 + i) * PANEL + half, _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
            });
        }
#endif
    for (; first < count; first += 2, to += PANEL)
        for (int i = 0; i < PANEL; i++) to[i] = pair_of(rows[i][first], rows[i][first + 1]);
}

}  // namespace tandem
