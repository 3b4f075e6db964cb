// Pieces in one register each, multiplied by AVX-512 VNNI.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace tandem {

// A piece's 64 bytes: outputs 0-3, 8-11, 4-7 and 12-15. Products take one factor without a sign, so weights have 128
// added to them, and sums start from what that adds: -128 times the sum of the activations.
struct Piece { __m512i bytes; };
struct Sums { __m512i v; };  // int32, likewise
struct WidePiece { __m512i a, b; };  // words of the first two of each four outputs, and of the last two
struct WideSums { __m512i a, b; };   // int32 of inputs 0 and 1, and of inputs 2 and 3, of these outputs
template <class T>
constexpr int int_tile_rows = 8;
constexpr int WEIGHT_OFFSET = 128;

inline void clear(Sums& sums, int32_t start) { sums.v = _mm512_set1_epi32(start); }
inline void clear(WideSums& sums, int32_t) { sums.a = sums.b = _mm512_setzero_si512(); }

inline __m512i flipped(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
inline Piece load_int8(const int8_t* p) { return {flipped(_mm512_loadu_si512(p))}; }

// Member by member: compilers copy a struct through the stack.
inline Piece copied(const Piece& p) { return {p.bytes}; }
inline WidePiece copied(const WidePiece& p) { return {p.a, p.b}; }

// Codes through a table of 16 bytes.
struct Table {
    __m512i bytes;
    explicit Table(const int8_t* p)
        : bytes(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
    __m512i load(const uint8_t* p) const {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(codes), _mm256_srli_epi16(codes, 4), 1);
        return _mm512_shuffle_epi8(bytes, _mm512_and_si512(both, _mm512_set1_epi8(15)));
    }
};
struct Codebook8 {
    Table table;
    explicit Codebook8(const int8_t* bytes) : table(bytes) { table.bytes = flipped(table.bytes); }
    Piece load(const uint8_t* p) const { return {table.load(p)}; }
};

// sums + products. Not by intrinsics, for which GCC 12 copies the sums before and after.
#if defined(TANDEM_EMULATED)
inline __m512i plus_bytes(__m512i sums, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sums, a, b); }
inline __m512i plus_words(__m512i sums, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sums, a, b); }
#else
inline __m512i plus_bytes(__m512i sums, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
inline __m512i plus_words(__m512i sums, __m512i a, __m512i b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
#endif

inline void add_products(const Piece& piece, const int8_t* four, Sums& sums) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    sums.v = plus_bytes(sums.v, piece.bytes, _mm512_set1_epi32(bytes));
}
inline void add_products(const WidePiece& piece, const int16_t* four, WideSums& sums) {
    int64_t words;
    std::memcpy(&words, four, sizeof words);
    const __m512i x = _mm512_set1_epi64(words);
    sums.a = plus_words(sums.a, piece.a, x);
    sums.b = plus_words(sums.b, piece.b, x);
}
inline const Sums& added_up(const Sums& sums) { return sums; }
inline Sums added_up(const WideSums& s) {
    const __m512 a = _mm512_castsi512_ps(s.a), b = _mm512_castsi512_ps(s.b);
    return {_mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                             _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)))};
}

// Bytes of a piece, their upper halves apart.
inline WidePiece joined(__m512i lower, __m512i upper) {
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
}
inline WidePiece widened(const Piece& piece) {
    const WidePiece wide = joined(piece.bytes, _mm512_setzero_si512());
    const __m512i offset = _mm512_set1_epi16(WEIGHT_OFFSET);
    return {_mm512_sub_epi16(wide.a, offset), _mm512_sub_epi16(wide.b, offset)};
}

// Sixteen numbers in the order of a piece's outputs, and a row's totals.
struct Scales { __m512 v; };
struct Totals { __m512 v; };
inline __m512 reordered(__m512 v) { return _mm512_shuffle_f32x4(v, v, 0xD8); }  // there and back
inline Scales load_scales(const float* p) { return {reordered(_mm512_loadu_ps(p))}; }
inline void clear(Totals& totals) { totals.v = _mm512_setzero_ps(); }
inline void add_scaled(Totals& totals, const Scales& scales, float factor, const Sums& sums) {
    const __m512 scale = _mm512_mul_ps(scales.v, _mm512_set1_ps(factor));
    totals.v = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sums.v), totals.v);
}
inline void store(float* p, const Totals& totals) { _mm512_storeu_ps(p, reordered(totals.v)); }

}  // namespace tandem
