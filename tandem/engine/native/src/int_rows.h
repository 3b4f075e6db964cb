// Activations as integers, symmetric, with one scale per row and group of inputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "linear.h"
#include "pieces.h"

namespace tandem {

constexpr int MAX_GROUP = 128;

// Inputs whose activations share a scale.
inline int group_of(const Linear& l) {
    if (l.format == CODE4) return l.group;
    return l.activation_bits == 16 ? MAX_GROUP : l.in;
}
inline int groups_of(const Linear& l) { return (l.in + group_of(l) - 1) / group_of(l); }

// The largest quantized activation: sums over a group stay within 32 bits.
inline int most_of(const Linear& l) {
    if (l.activation_bits < 16) return l.activation_bits == 4 ? 7 : INT8_MAX;
    int weight = INT8_MAX;
    if (l.format == CODE4)
        for (int code = weight = 0; code < 16; code++) weight = std::max(weight, std::abs(l.codebook->words[code]));
    return std::min(INT16_MAX, INT32_MAX / (group_of(l) * weight));
}

// What the weights were divided by.
inline float factor_of(const Linear& l) {
    if (l.format == INT8) return 1.0f;
    return l.activation_bits == 16 ? l.codebook->word_factor : l.codebook->byte_factor;
}

// Rows of a layer as integers. `T` is int8_t or int16_t.
template <class T>
struct IntRows {
    std::vector<T> values;        // [rows, stride]
    std::vector<float> scales;    // [rows, groups]
    std::vector<int32_t> starts;  // [rows, groups] of the sums, against what weights are offset by

    static int stride_of(const Linear& l) { return round_up(l.in, PIECE_BYTES); }

    void make_room(const Linear& l, int rows) {
        grow(values, size_t(rows) * stride_of(l));
        grow(scales, size_t(rows) * groups_of(l)), grow(starts, size_t(rows) * groups_of(l));
    }

    void fill(const Linear& l, Rows<const float> x, int first, int last) {
        const int group = group_of(l), groups = groups_of(l), stride = stride_of(l);
        const float most = float(most_of(l)), factor = factor_of(l);
        for (int r = first; r < last; r++) {
            T* row = &values[size_t(r) * stride];
            for (int g = 0; g < groups; g++) {
                const int begin = g * group, count = std::min(group, l.in - begin);
                const size_t at = size_t(r) * groups + g;
                scales[at] = quantize(x.row(r) + begin, count, most, row + begin) * factor;
                if (WEIGHT_OFFSET && sizeof(T) == 1)
                    starts[at] = -WEIGHT_OFFSET * std::accumulate(row + begin, row + begin + count, 0);
            }
            std::fill(row + l.in, row + stride, T(0));
        }
    }

    // The scale of some numbers; not a number if one of them is none or infinite.
    static float quantize(const float* from, int count, float most, T* to) {
        f8 highest = zero(), check = zero();
        for (int i = 0; i < count; i += LANES) {
            const f8 x = i + LANES <= count ? load(from + i) : load_some(from + i, count - i);
            highest = max(highest, max(x, sub(zero(), x)));
            check = fma(x, zero(), check);
        }
        float lanes[LANES];
        store(lanes, highest);
        const float top = *std::max_element(lanes, lanes + LANES), inverse = most / top;
        const f8 factor = set1(std::isfinite(inverse) ? inverse : 0.0f), limit = set1(most);
        for (int i = 0; i < count; i += LANES) {
            const f8 x = i + LANES <= count ? load(from + i) : load_some(from + i, count - i);
            const f8 whole = round_even(min(max(mul(x, factor), sub(zero(), limit)), limit));
            if (i + LANES <= count) {
                store_ints(to + i, whole);
            } else {
                store(lanes, whole);
                std::copy_n(lanes, count - i, to + i);
            }
        }
        return top / most + sum(check);
    }
};

}  // namespace tandem
