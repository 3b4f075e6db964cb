// Pieces as arrays, for any processor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace tandem {

inline int byte_of(int output, int input) { return output / 8 * 16 + output % 4 * 4 + input; }
struct Piece { int8_t w[PANEL][PIECE_INPUTS]; };
struct WidePiece { int16_t w[PANEL][PIECE_INPUTS]; };
struct Sums { int32_t v[PANEL]; };
struct WideSums : Sums {};
template <class T>
constexpr int int_tile_rows = 4;
constexpr int WEIGHT_OFFSET = 0;
inline void clear(Sums& sums, int32_t) { sums = {}; }
inline Piece load_int8(const int8_t* p) {
    Piece piece;
    for (int o = 0; o < PANEL; o++)
        for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = p[o / 4 % 2 * PIECE_BYTES + byte_of(o, i)];
    return piece;
}
inline const Piece& copied(const Piece& p) { return p; }
inline const WidePiece& copied(const WidePiece& p) { return p; }
inline int code_of(const uint8_t* p, int output, int input) {
    return p[byte_of(output, input)] >> (output / 4 % 2 * 4) & 15;
}
// Codes through a table of 16 numbers.
template <class T, class P>
struct LookUp {
    const T* table;
    explicit LookUp(const T* numbers) : table(numbers) {}
    P load(const uint8_t* p) const {
        P piece;
        for (int o = 0; o < PANEL; o++)
            for (int i = 0; i < PIECE_INPUTS; i++) piece.w[o][i] = table[code_of(p, o, i)];
        return piece;
    }
};
using Codebook8 = LookUp<int8_t, Piece>;
using Codebook16 = LookUp<int16_t, WidePiece>;
template <class P, class T>
inline void add_products(const P& piece, const T* four, Sums& sums) {
    for (int o = 0; o < PANEL; o++)
        for (int i = 0; i < PIECE_INPUTS; i++) sums.v[o] += int32_t(piece.w[o][i]) * four[i];
}
inline const Sums& added_up(const Sums& sums) { return sums; }
inline Sums added_up(const WideSums& sums) { return sums; }
inline WidePiece widened(const Piece& piece) {
    WidePiece wide;
    std::copy_n(piece.w[0], PANEL * PIECE_INPUTS, wide.w[0]);
    return wide;
}
inline void to_floats(const Sums& sums, f8& first, f8& second) {
    for (int i = 0; i < LANES; i++) first.v[i] = float(sums.v[i]), second.v[i] = float(sums.v[LANES + i]);
}
}  // namespace tandem
