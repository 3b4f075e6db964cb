// Weights of four and eight bits, with activations quantized to sixteen, eight or four bits per row and group.
//
//   INT8    one scale per output (LLM.int8, Dettmers et al. 2022)
//   CODE4   codes into a codebook of 16, one scale per output and group of inputs (NF4 and FP4: QLoRA,
//           Dettmers et al. 2023; int4 is the codebook -7 … 7)
//   BF16    weights and activations in bfloat16, without scales, by the loops of linear.h
//
// Products and their sums over a group are exact integers, and groups are added in ascending order, so a row's bits
// depend on the row alone here too. Activations are symmetric: sixteen bits lose less than half precision would of
// all but the smallest of a group. Activations of 4 bits are emulated: fifteen values, multiplied as bytes.
#pragma once

#include <cmath>
#include <vector>

#include "clock.h"
#include "int_rows.h"
#include "linear.h"
#include "pieces.h"
#include "unrolled.h"

namespace tandem {

// --- products ---

// Rows that were quantized, and the weights of a panel with the bytes of a piece.
template <class T>
struct Operands {
    const T* values;
    const float* scales;
    const int32_t* starts;
    int stride, groups;
    const uint8_t* weights;
    int piece_bytes;
    const uint8_t* ahead;  // what all rows but the first ask for while a piece is multiplied: the next panel
    int ahead_bytes;       // of them, per piece
};

constexpr int MANY_TILES = 3;  // for which a panel's pieces are loaded before they are multiplied

// R rows against one panel; `load(bytes)` brings a piece. y = Σ_groups (weight scale · row scale) · integer.
// Not inlined: within the loops around it, its own runs at three quarters of the speed.
template <int R, bool IS_FIRST, class T, class Load>
__attribute__((noinline)) void multiply_int_tile(const Linear& l, const Operands<T>& o, int row, int panel,
                                                 Rows<float> y, Load load) {
    const int group = group_of(l), in = l.in, stride = o.stride, step = o.piece_bytes;
    const T* x = o.values + size_t(row) * stride;
    const uint8_t *weights = o.weights, *ahead = o.ahead;
    const float* scales = l.scales + size_t(panel) * (l.format == CODE4 ? o.groups : 1) * PANEL;
    Totals totals[R];
    unrolled<R>([&](auto r) INLINE { clear(totals[r]); });
    for (int g = 0; g < o.groups; g++) {
        SumsOf<T> sums[R];
        unrolled<R>([&](auto r) INLINE { clear(sums[r], o.starts[size_t(row + r) * o.groups + g]); });
        const T* end = x + std::min(group, in - g * group);
        for (; x < end; x += PIECE_INPUTS, weights += step) {
            __builtin_prefetch(IS_FIRST ? weights + AHEAD : ahead);
            if (!IS_FIRST) ahead += o.ahead_bytes;
            const auto piece = load(weights);
            unrolled<R>([&](auto r) INLINE { add_products(piece, x + size_t(r) * stride, sums[r]); });
        }
        const Scales factors = load_scales(scales);
        if (l.format == CODE4) scales += PANEL;
        unrolled<R>([&](auto r) INLINE {
            add_scaled(totals[r], factors, o.scales[size_t(row + r) * o.groups + g], added_up(sums[r]));
        });
    }
    unrolled<R>([&](auto r) INLINE { store(y.row(row + r) + panel * PANEL, totals[r]); });
}

// The tile of so many rows, at most R.
template <int R, bool IS_FIRST, class T, class Load>
inline void multiply_int_tile_of(int rows, const Linear& l, const Operands<T>& o, int row, int panel, Rows<float> y,
                                 Load load) {
    if constexpr (R > 1)
        if (rows < R) return multiply_int_tile_of<R - 1, IS_FIRST>(rows, l, o, row, panel, y, load);
    multiply_int_tile<R, IS_FIRST>(l, o, row, panel, y, load);
}

// How rows go through a panel: so many at a time. The first ask for weights a little further on; the others find theirs
// in the cache, and ask for a share of the next panel each, so that memory and multipliers work side by side.
struct Times {
    int rows, each;
    int pieces, share;  // of the panel; of the next one, bytes per piece

    Times(int rows, int most, int pieces, int panel_bytes) : rows(rows), each(tile_rows(rows, most)), pieces(pieces) {
        const int others = divide_up(rows, each) - 1;
        share = others ? divide_up(panel_bytes, others * pieces) : 0;
    }
};

template <class T, class Load>
inline void multiply_in_tiles(const Linear& l, Operands<T>& o, const Times& times, int panel, const uint8_t* next,
                              Rows<float> y, Load load) {
    constexpr int MOST = int_tile_rows<T>;
    multiply_int_tile_of<MOST, true>(std::min(times.each, times.rows), l, o, 0, panel, y, load);
    o.ahead = next, o.ahead_bytes = times.share;
    for (int row = times.each; row < times.rows; row += times.each, o.ahead += size_t(times.pieces) * times.share)
        multiply_int_tile_of<MOST, false>(std::min(times.each, times.rows - row), l, o, row, panel, y, load);
}

// A panel's pieces as they are multiplied, until this thread's next call.
template <class Load>
inline const uint8_t* loaded(const uint8_t* weights, int piece_bytes, int count, Load load) {
    static thread_local std::vector<decltype(load(weights))> pieces;
    pieces.resize(count);
    for (int i = 0; i < count; i++) pieces[i] = load(weights + size_t(i) * piece_bytes);
    return reinterpret_cast<const uint8_t*>(pieces.data());
}

// All rows against panels [first, last).
template <class T, class Load>
inline void multiply_ints(const Linear& l, const IntRows<T>& x, int rows, Rows<float> y, int first, int last,
                          int piece_bytes, Load load) {
    if (!rows) return;
    using Loaded = decltype(load(nullptr));
    const int pieces = divide_up(l.in, PIECE_INPUTS);
    const uint8_t* weights = static_cast<const uint8_t*>(l.weights);
    Operands<T> operands{x.values.data(), x.scales.data(), x.starts.data(), x.stride_of(l), groups_of(l)};
    const int bytes = pieces * piece_bytes;
    const Times times(rows, int_tile_rows<T>, pieces, bytes);
    for (int panel = first; panel < last; panel++) {
        const uint8_t *stored = weights + size_t(panel) * bytes, *next = stored + bytes;
        if (rows < MANY_TILES * int_tile_rows<T>) {
            operands.weights = stored, operands.piece_bytes = piece_bytes;
            multiply_in_tiles(l, operands, times, panel, next, y, load);
        } else {
            operands.weights = loaded(stored, piece_bytes, pieces, load), operands.piece_bytes = sizeof(Loaded);
            auto as_it_lies = [](const uint8_t* p) { return copied(*reinterpret_cast<const Loaded*>(p)); };
            multiply_in_tiles(l, operands, times, panel, next, y, as_it_lies);
        }
    }
}

// --- inputs that are turned or kept apart first ---

// x times the orthonormal Hadamard matrix of a group's size, group by group.
inline void rotate(float* x, int in, int group) {
    const float scale = 1.0f / std::sqrt(float(group));
    for (float* at = x; at < x + in; at += group) {
        for (int width = 1; width < group; width *= 2)
            for (int begin = 0; begin < group; begin += 2 * width)
                for (int i = begin; i < begin + width; i++) {
                    const float a = at[i], b = at[i + width];
                    at[i] = a + b, at[i + width] = a - b;
                }
        for (int i = 0; i < group; i++) at[i] *= scale;
    }
}

// Whether rows are turned, taken apart or quantized before they are multiplied.
inline bool prepares_rows(const Linear& l) { return l.activation_bits < 32 || l.is_rotated || l.num_outliers; }

// Rows as a layer multiplies them. Members of a team prepare a share each.
struct PreparedRows {
    IntRows<int8_t> bytes;
    IntRows<int16_t> words;
    std::vector<Pair> pairs;    // [rows, in / 2]
    std::vector<float> turned;  // [rows, in], without their outliers
    std::vector<float> apart;   // [rows, outliers]

    // Once for all members.
    void make_room(const Linear& l, int rows) {
        if (is_turned(l)) grow(turned, size_t(rows) * l.in), grow(apart, size_t(rows) * l.num_outliers);
        if (l.format == BF16) grow(pairs, size_t(rows) * inputs_of<Pair>(l));
        else if (l.activation_bits == 16) words.make_room(l, rows);
        else if (l.activation_bits < 16) bytes.make_room(l, rows);
    }

    void fill(const Linear& l, Rows<const float> x, int first, int last) {
        Stopwatch quantizing(QUANTIZE);
        for (int r = first; is_turned(l) && r < last; r++) turn(l, x.row(r), r);
        for (int r = first; l.format == BF16 && r < last; r++)
            pair_up(x.row(r), l.in, &pairs[size_t(r) * inputs_of<Pair>(l)]);
        if (l.format == BF16) return;
        if (l.activation_bits == 16) words.fill(l, floats(l, x), first, last);
        else if (l.activation_bits < 16) bytes.fill(l, floats(l, x), first, last);
    }

    Rows<const float> floats(const Linear& l, Rows<const float> x) const {
        return is_turned(l) ? Rows<const float>{turned.data(), l.in} : x;
    }

   private:
    static bool is_turned(const Linear& l) { return l.is_rotated || l.num_outliers; }

    void turn(const Linear& l, const float* from, int r) {
        float* to = &turned[size_t(r) * l.in];
        std::copy_n(from, l.in, to);
        for (int i = 0; i < l.num_outliers; i++) {
            apart[size_t(r) * l.num_outliers + i] = to[l.outlier_inputs[i]];
            to[l.outlier_inputs[i]] = 0.0f;
        }
        if (l.is_rotated) rotate(to, l.in, l.group);
    }
};

// --- whole layers ---

inline void scale_outputs(const Linear& l, int rows, Rows<float> y, int first, int last) {
    for (int r = 0; r < rows; r++)
        for (int n = first * PANEL; n < last * PANEL; n += LANES)
            store(y.row(r) + n, mul(load(l.scales + n), load(y.row(r) + n)));
}

// Panels [first, last) of rows `x` that are prepared.
inline void multiply_prepared(const Linear& l, const PreparedRows& prepared, Rows<const float> x, int rows,
                              Rows<float> y, int first, int last) {
    const bool is_wide = l.activation_bits == 16;
    auto bytes = [](const uint8_t* p) { return load_int8(reinterpret_cast<const int8_t*>(p)); };
    auto words = [=](const uint8_t* p) { return widened(bytes(p)); };
    if (l.format == BF16) return multiply<Pair>(l, {prepared.pairs.data(), inputs_of<Pair>(l)}, rows, y, first, last);
    if (l.activation_bits == 32) {
        multiply<int8_t>(l, prepared.floats(l, x), rows, y, first, last);  // panels of bytes, [in, 16]
        scale_outputs(l, rows, y, first, last);
    } else if (l.format == INT8) {
        if (is_wide) multiply_ints(l, prepared.words, rows, y, first, last, 2 * PIECE_BYTES, words);
        else multiply_ints(l, prepared.bytes, rows, y, first, last, 2 * PIECE_BYTES, bytes);
    } else if (is_wide) {
        const Codebook16 codebook(l.codebook->words);
        auto look_up = [=](const uint8_t* p) { return codebook.load(p); };
        multiply_ints(l, prepared.words, rows, y, first, last, PIECE_BYTES, look_up);
    } else {
        const Codebook8 codebook(l.codebook->bytes);
        auto look_up = [=](const uint8_t* p) { return codebook.load(p); };
        multiply_ints(l, prepared.bytes, rows, y, first, last, PIECE_BYTES, look_up);
    }
    if (!l.num_outliers) return;
    static thread_local std::vector<float> added;
    Rows<float> more{grow(added, size_t(rows) * y.stride), y.stride};
    multiply<int8_t>(*l.outliers, {prepared.apart.data(), l.num_outliers}, rows, more, first, last);
    scale_outputs(*l.outliers, rows, more, first, last);
    for (int r = 0; r < rows; r++)
        for (int n = first * PANEL; n < last * PANEL; n++) y.row(r)[n] += more.row(r)[n];
}

}  // namespace tandem
