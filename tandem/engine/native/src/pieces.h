// Pieces of quantized weights, and their exact products with quantized activations.
//
// A panel holds 16 outputs. Weights lie in pieces of four inputs: of output o = 8 · (lane) + 4 · (nibble) + i, input
// j, the byte 16 · lane + 4 · i + j of 32; the nibbles of INT8 are bytes, 32 of them after the other.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace tandem {

constexpr int PIECE_INPUTS = 4;
constexpr int PIECE_BYTES = 32;

#if TANDEM_AVX2

struct Piece { __m256i low, high; };  // signed bytes of outputs 0-3 and 8-11, and of 4-7 and 12-15
struct Sums { __m256i low, high; };   // int32, likewise
// Signed words of outputs 0, 1, 8 and 9; 2, 3, 10 and 11; 4, 5, 12 and 13; 6, 7, 14 and 15.
struct WidePiece { __m256i a, b, c, d; };
struct WideSums { __m256i a, b, c, d; };  // int32 of inputs 0 and 1, and of inputs 2 and 3, of these outputs
inline void clear(Sums& sums) { sums.low = sums.high = _mm256_setzero_si256(); }
inline void clear(WideSums& sums) { sums.a = sums.b = sums.c = sums.d = _mm256_setzero_si256(); }

inline Piece load_int8(const int8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + PIECE_BYTES))};
}

// Codes through a table of 16 bytes.
struct Codebook8 {
    __m256i table;
    explicit Codebook8(const int8_t* bytes)
        : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))) {}
    Piece load(const uint8_t* p) const {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
        return {_mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask)),
                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask))};
    }
};

// sums += weights · activations. |w| · (sign of w) a: two products of 7 bits fit 16 bits, so nothing saturates.
inline __m256i dot4(__m256i weights, __m256i activations, __m256i sums) {
    const __m256i size = _mm256_abs_epi8(weights), turned = _mm256_sign_epi8(activations, weights);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, size, turned);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(size, turned), _mm256_set1_epi16(1)));
#endif
}
inline void add_products(const Piece& piece, const int8_t* four, Sums& sums) {
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    const __m256i activations = _mm256_set1_epi32(bytes);
    sums.low = dot4(piece.low, activations, sums.low), sums.high = dot4(piece.high, activations, sums.high);
}

// sums + the products of neighbours, which are added.
inline __m256i dot2(__m256i weights, __m256i activations, __m256i sums) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sums, weights, activations);
#else
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(weights, activations));
    __asm__("" : "+x"(sums));  // here and now: compilers collect all products first, and run out of registers
    return sums;
#endif
}
inline void add_products(const WidePiece& piece, const int16_t* four, WideSums& sums) {
    int64_t words;
    std::memcpy(&words, four, sizeof words);
    const __m256i x = _mm256_set1_epi64x(words);
    sums = {dot2(piece.a, x, sums.a), dot2(piece.b, x, sums.b), dot2(piece.c, x, sums.c), dot2(piece.d, x, sums.d)};
}
inline Sums added_up(const WideSums& s) { return {_mm256_hadd_epi32(s.a, s.b), _mm256_hadd_epi32(s.c, s.d)}; }
inline void to_floats(const Sums& sums, f8& first, f8& second) {
    first = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(sums.low, sums.high, 0x20))};
    second = {_mm256_cvtepi32_ps(_mm256_permute2x128_si256(sums.low, sums.high, 0x31))};
}

// Bytes of a piece, their upper halves apart.
inline WidePiece joined(const Piece& lower, const Piece& upper) {
    return {_mm256_unpacklo_epi8(lower.low, upper.low), _mm256_unpackhi_epi8(lower.low, upper.low),
            _mm256_unpacklo_epi8(lower.high, upper.high), _mm256_unpackhi_epi8(lower.high, upper.high)};
}
inline WidePiece widened(const Piece& piece) {
    const __m256i none = _mm256_setzero_si256();
    return joined(piece, {_mm256_cmpgt_epi8(none, piece.low), _mm256_cmpgt_epi8(none, piece.high)});
}

// Codes through a table of 16 words, whose bytes are looked up apart.
struct Codebook16 {
    Codebook8 lower, upper;
    explicit Codebook16(const int16_t* words) : lower(bytes_of(words, 0).data()), upper(bytes_of(words, 8).data()) {}
    WidePiece load(const uint8_t* p) const { return joined(lower.load(p), upper.load(p)); }

   private:
    static std::array<int8_t, 16> bytes_of(const int16_t* words, int shift) {
        std::array<int8_t, 16> bytes;
        for (int i = 0; i < 16; i++) bytes[i] = int8_t(words[i] >> shift);
        return bytes;
    }
};

#else

inline int byte_of(int output, int input) { return output / 8 * 16 + output % 4 * 4 + input; }
struct Piece { int8_t w[PANEL][PIECE_INPUTS]; };
struct WidePiece { int16_t w[PANEL][PIECE_INPUTS]; };
struct Sums { int32_t v[PANEL]; };
struct WideSums : Sums {};
inline void clear(Sums& sums) { sums = {}; }
inline Piece load_int8(const int8_t* p) {
    Piece piece;
    for (int o = 0; o < PANEL; o++)
        for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = p[o / 4 % 2 * PIECE_BYTES + byte_of(o, i)];
    return piece;
}
inline int code_of(const uint8_t* p, int output, int input) {
    return p[byte_of(output, input)] >> (output / 4 % 2 * 4) & 15;
}
struct Codebook8 {
    const int8_t* table;
    explicit Codebook8(const int8_t* bytes) : table(bytes) {}
    Piece load(const uint8_t* p) const {
        Piece piece;
        for (int o = 0; o < PANEL; o++)
            for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = table[code_of(p, o, i)];
        return piece;
    }
};
template <class P, class T>
inline void add_products(const P& piece, const T* four, Sums& sums) {
    for (int o = 0; o < PANEL; o++)
        for (int i = 0; i < PIECE_INPUTS; i++) sums.v[o] += int32_t(piece.w[o][i]) * four[i];
}
inline Sums added_up(const WideSums& sums) { return sums; }
inline WidePiece widened(const Piece& piece) {
    WidePiece wide;
    std::copy_n(piece.w[0], PANEL * PIECE_INPUTS, wide.w[0]);
    return wide;
}
inline void to_floats(const Sums& sums, f8& first, f8& second) {
    for (int i = 0; i < LANES; i++) first.v[i] = float(sums.v[i]), second.v[i] = float(sums.v[LANES + i]);
}
struct Codebook16 {
    const int16_t* table;
    explicit Codebook16(const int16_t* words) : table(words) {}
    WidePiece load(const uint8_t* p) const {
        WidePiece piece;
        for (int o = 0; o < PANEL; o++)
            for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = table[code_of(p, o, i)];
        return piece;
    }
};

#endif

inline const Sums& added_up(const Sums& sums) { return sums; }

}  // namespace tandem
