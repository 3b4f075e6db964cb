// Causal attention of a few query vectors over the paged cache, reading blocks where they lie.
//
// A query vector's result depends on its own context only: scores are dot products in lanes of 8 summed in
// one tree; the softmax's sum takes keys in lanes of 8 by position; values are added in order of position.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace tandem {

// Keys and values of one layer and one KV head of one sequence.
struct Context {
    const float* keys;      // block 0 of this head; a block is [block_size, dim]
    const float* values;
    const int32_t* blocks;  // the sequence's block table
    int block_bits, dim;    // block_size = 1 << block_bits

    size_t offset(int position) const {
        const int inside = position & ((1 << block_bits) - 1);
        return ((size_t(blocks[position >> block_bits]) << block_bits) + inside) * dim;
    }
    const float* key(int position) const { return keys + offset(position); }
    const float* value(int position) const { return values + offset(position); }
};

constexpr int VALUE_TILE = 64;  // positions whose values are read for all vectors before going on
constexpr int MAX_VECTORS = 32;

// V query vectors against four keys.
template <int V>
inline void dot_tile(const float* const* q, const float* const* keys, int dim, float* const* out) {
    f8 acc[V][4];
    for (int v = 0; v < V; v++)
        for (int i = 0; i < 4; i++) acc[v][i] = zero();
    for (int d = 0; d < dim; d += LANES) {
        f8 k[4];
        for (int i = 0; i < 4; i++) k[i] = load(keys[i] + d);
        for (int v = 0; v < V; v++) {
            f8 query = load(q[v] + d);
            for (int i = 0; i < 4; i++) acc[v][i] = fma(query, k[i], acc[v][i]);
        }
    }
    for (int v = 0; v < V; v++) sum4(acc[v][0], acc[v][1], acc[v][2], acc[v][3], out[v]);
}

// V vectors' outputs of `dims` · 8 dimensions, over positions [first, last).
template <int V, int D>
inline void value_tile(const Context& context, const float* const* weights, int first, int last, int d,
                       float* const* out) {
    f8 acc[V][D];
    for (int v = 0; v < V; v++)
        for (int j = 0; j < D; j++) acc[v][j] = load(out[v] + d + j * LANES);
    for (int position = first; position < last; position++) {
        const float* value = context.value(position) + d;
        f8 values[D];
        for (int j = 0; j < D; j++) values[j] = load(value + j * LANES);
        for (int v = 0; v < V; v++) {
            f8 weight = set1(weights[v][position]);
            for (int j = 0; j < D; j++) acc[v][j] = fma(weight, values[j], acc[v][j]);
        }
    }
    for (int v = 0; v < V; v++)
        for (int j = 0; j < D; j++) store(out[v] + d + j * LANES, acc[v][j]);
}

template <int V>
inline void add_values(const Context& context, const float* const* weights, int first, int last, float* const* out) {
    int d = 0;
    if constexpr (V == 1)  // one vector needs twice the dimensions to fill the multipliers
        for (; d + 8 * LANES <= context.dim; d += 8 * LANES) value_tile<V, 8>(context, weights, first, last, d, out);
    for (; d + 4 * LANES <= context.dim; d += 4 * LANES) value_tile<V, 4>(context, weights, first, last, d, out);
    for (; d < context.dim; d += LANES) value_tile<V, 1>(context, weights, first, last, d, out);
}

// In place: scores of positions [first, last) to e^(score - max); returns the sum. `first` is a multiple of
// 8, scores before `begin` count as hidden, and so does what lies past `last` up to a multiple of 8.
inline float soften(float* scores, int first, int begin, int last) {
    const float hidden = -std::numeric_limits<float>::infinity();
    for (int i = first; i < begin; i++) scores[i] = hidden;
    for (int i = last; i < round_up(last, LANES); i++) scores[i] = hidden;
    f8 highest = set1(hidden);
    for (int i = first; i < last; i += LANES) highest = max(highest, load(scores + i));
    float lanes[LANES];
    store(lanes, highest);
    f8 top = set1(*std::max_element(lanes, lanes + LANES));
    f8 total = zero();
    for (int i = first; i < last; i += LANES) {
        f8 e = exp(sub(load(scores + i), top));
        store(scores + i, e);
        total = add(total, e);
    }
    return sum(total);
}

// The query vectors of consecutive rows of one sequence that share a KV head.
struct Queries {
    int rows, group;         // vectors: rows · group
    int position;            // of the first row
    int window;              // how far a row looks back, itself included; 0: everything
    const float* q;          // vector (row, head): q + row · q_stride + head · dim
    float* out;              // likewise
    size_t q_stride, out_stride;
};

// `scores` holds MAX_VECTORS runs of `scores_stride` floats.
inline void attend(const Context& context, const Queries& queries, float* scores, size_t scores_stride) {
    const int vectors = queries.rows * queries.group, dim = context.dim;
    const int last = queries.position + queries.rows;
    auto begin_of = [&](int position) { return queries.window ? std::max(0, position + 1 - queries.window) : 0; };
    const int first = begin_of(queries.position) / LANES * LANES;
    const float* q[MAX_VECTORS];
    float *out[MAX_VECTORS], *run[MAX_VECTORS];
    for (int v = 0; v < vectors; v++) {
        const size_t row = v / queries.group, head = size_t(v % queries.group) * dim;
        q[v] = queries.q + row * queries.q_stride + head;
        out[v] = queries.out + row * queries.out_stride + head;
        run[v] = scores + v * scores_stride;
    }
    for (int position = first; position < last; position += 4) {
        const float* keys[4];
        float* to[MAX_VECTORS];
        for (int i = 0; i < 4; i++) keys[i] = context.key(std::min(position + i, last - 1));
        for (int v = 0; v < vectors; v++) to[v] = run[v] + position;
        int v = 0;
        for (; vectors - v == 3 || vectors - v > 4; v += 3) dot_tile<3>(q + v, keys, dim, to + v);
        for (; vectors - v >= 2; v += 2) dot_tile<2>(q + v, keys, dim, to + v);
        if (v < vectors) dot_tile<1>(q + v, keys, dim, to + v);
    }
    float total[MAX_VECTORS];
    for (int v = 0; v < vectors; v++) {
        int position = queries.position + v / queries.group, begin = begin_of(position);
        total[v] = soften(run[v], begin / LANES * LANES, begin, position + 1);
        std::fill(out[v], out[v] + dim, 0.0f);
    }
    for (int tile = first / VALUE_TILE * VALUE_TILE; tile < last; tile += VALUE_TILE)
        for (int row = 0; row < queries.rows; row++) {
            int position = queries.position + row;
            int from = std::max(tile, begin_of(position)), to = std::min(tile + VALUE_TILE, position + 1);
            if (from >= to) continue;
            int v = row * queries.group, stop = v + queries.group;
            for (; v + 2 <= stop; v += 2) add_values<2>(context, run + v, from, to, out + v);
            if (v < stop) add_values<1>(context, run + v, from, to, out + v);
        }
    for (int v = 0; v < vectors; v++) {
        f8 divisor = set1(total[v]);
        for (int d = 0; d < dim; d += LANES) store(out[v] + d, div(load(out[v] + d), divisor));
    }
}

}  // namespace tandem
