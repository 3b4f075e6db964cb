// Causal attention of a few query vectors over the paged cache, reading blocks where they lie.
//
// A query vector's result depends on its own context only: scores are dot products in lanes of 8 summed in
// one tree; the softmax's sum takes keys in lanes of 8 by position; values are added in order of position.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"
#include "unrolled.h"

namespace tandem {

// Keys and values of one layer and one KV head of one sequence.
template <class T>
struct Context {
    const T* keys;          // block 0 of this head; a block is [block_size, dim]
    const T* values;
    const int32_t* blocks;  // the sequence's block table
    int block_bits, dim;    // block_size = 1 << block_bits
    int last;               // position that is asked for

    size_t offset(int position) const {
        const int inside = position & ((1 << block_bits) - 1);
        return ((size_t(blocks[position >> block_bits]) << block_bits) + inside) * dim;
    }
    int end_of_block(int position) const { return ((position >> block_bits) + 1) << block_bits; }
    // The same place in the next block, or the end.
    size_t offset_ahead(int position) const { return offset(std::min(position + (1 << block_bits), last)); }
    const T* key_ahead(int position) const { return keys + offset_ahead(position); }
    const T* value_ahead(int position) const { return values + offset_ahead(position); }
    const T* key(int position) const { return keys + offset(position); }
    const T* value(int position) const { return values + offset(position); }
};

constexpr int TILE_POSITIONS = 64;  // whose keys or values are read for all vectors before going on
constexpr int KEYS = 4;             // that are scored side by side
constexpr int MAX_VECTORS = 32;

// Tiles with chains enough to fill the multipliers, and few enough for the registers.
#if TANDEM_AVX512
using Queries8 = p16;  // 8 dimensions of two query vectors, and of a key for both
template <class T>
inline Queries8 load_key(const T* p) { return load_twice(p); }
inline Queries8 load_queries(const float* p) { return load16(p); }
inline void put_sums(const Queries8* acc, float* to, size_t stride) {
    sum4(acc[0], acc[1], acc[2], acc[3], to, to + stride);
}
constexpr int SCORE_TILE = 4, VALUE_TILE = 6;
constexpr int value_panels(int) { return 4; }
#else
using Queries8 = f8;
template <class T>
inline Queries8 load_key(const T* p) { return load(p); }
inline Queries8 load_queries(const float* p) { return load(p); }
inline void put_sums(const Queries8* acc, float* to, size_t) { sum4(acc[0], acc[1], acc[2], acc[3], to); }
constexpr int SCORE_TILE = 3, VALUE_TILE = 2;
constexpr int value_panels(int vectors) { return vectors == 1 ? 4 : 2; }
#endif
constexpr int ABREAST = sizeof(Queries8) / sizeof(f8);  // query vectors of a register

// Tiles ask for the next block as they go: blocks lie anywhere, and the hardware's own prefetch ends with each.
template <class T>
inline void ask_for(const T* p, int count) {
    for (int i = 0; i < count; i += CACHE_LINE / int(sizeof(T))) __builtin_prefetch(p + i);
}

// What a member of the team works in: runs of scores, and queries as tiles take them.
struct Scratch {
    float *scores, *queries;  // on cache lines
    size_t stride;            // from run to run: an odd number of cache lines, so that runs meet in no set

    static size_t stride_for(int positions) { return round_up(positions, 2 * PANEL) + PANEL; }
    static size_t size_for(int positions, int dim) { return MAX_VECTORS * (stride_for(positions) + dim) + PANEL; }
    Scratch(float* buffer, int positions) : stride(stride_for(positions)) {
        scores = buffer + -(reinterpret_cast<uintptr_t>(buffer) / sizeof(float)) % PANEL;
        queries = scores + MAX_VECTORS * stride;
    }
};

// U registers of query vectors against the keys of positions [first, last).
template <int U, class T>
__attribute__((noinline)) void score_tile(const Context<T>& context, const float* queries, int first, int last,
                                          bool is_ahead, float* runs, size_t stride) {
    const int dim = context.dim;
    const bool is_whole = 1 << context.block_bits >= KEYS;
    for (int position = first; position < last;) {
        const int stop = std::min(last, std::max(position + KEYS, context.end_of_block(position)));
        const T *key = context.key(position), *ahead = context.key_ahead(position);
        for (; position < stop; position += KEYS, key += KEYS * dim, ahead += KEYS * dim) {
            const T* keys[KEYS];  // those behind the last one lie in its block; nobody reads their scores
            unrolled<KEYS>([&](auto i) INLINE {
                keys[i] = is_whole ? key + i * dim : context.key(std::min(position + i, last - 1));
            });
            Queries8 acc[U][KEYS];
            unrolled<U>([&](auto u) INLINE { unrolled<KEYS>([&](auto i) INLINE { acc[u][i] = every<Queries8>(0.0f); }); });
            if (is_ahead) ask_for(ahead, KEYS * dim);
            const float* query = queries;
            for (int d = 0; d < dim; d += LANES, query += ABREAST * LANES) {
                Queries8 k[KEYS];
                unrolled<KEYS>([&](auto i) INLINE { k[i] = load_key(keys[i] + d); });
                unrolled<U>([&](auto u) INLINE {
                    const Queries8 q = load_queries(query + size_t(u) * dim * ABREAST);
                    unrolled<KEYS>([&](auto i) INLINE { acc[u][i] = fma(q, k[i], acc[u][i]); });
                });
            }
            unrolled<U>([&](auto u) INLINE { put_sums(acc[u], runs + u * ABREAST * stride + position, stride); });
        }
    }
}

// `units` registers of query vectors, at most U.
template <int U, class T>
inline void score(int units, const Context<T>& context, const float* queries, int first, int last, bool is_ahead,
                  float* runs, size_t stride) {
    if constexpr (U > 1)
        if (units < U) return score<U - 1>(units, context, queries, first, last, is_ahead, runs, stride);
    score_tile<U>(context, queries, first, last, is_ahead, runs, stride);
}

// V vectors' outputs of P panels of dimensions from `d` on, over positions [first, last).
template <int V, int P, class T>
__attribute__((noinline)) void value_tile(const Context<T>& context, const float* weights, size_t stride, int first,
                                          int last, bool is_ahead, int d, float* const* out) {
    p16 acc[V][P];
    unrolled<V>([&](auto v) INLINE {
        unrolled<P>([&](auto p) INLINE { acc[v][p] = load16(out[v] + d + p * PANEL); });
    });
    for (int position = first; position < last;) {
        const int stop = std::min(last, context.end_of_block(position));
        const T* value = context.value(position) + d;
        const T* ahead = context.value_ahead(position) + d;
        for (; position < stop; position++, value += context.dim, ahead += context.dim) {
            if (is_ahead) ask_for(ahead, P * PANEL);
            p16 values[P];
            unrolled<P>([&](auto p) INLINE { values[p] = load16(value + p * PANEL); });
            unrolled<V>([&](auto v) INLINE {
                const b16 weight = broadcast16(weights + v * stride + position);
                unrolled<P>([&](auto p) INLINE { acc[v][p] = fma(values[p], weight, acc[v][p]); });
            });
        }
    }
    unrolled<V>([&](auto v) INLINE {
        unrolled<P>([&](auto p) INLINE { store16(out[v] + d + p * PANEL, acc[v][p]); });
    });
}

// `vectors` of them, at most V, and all dimensions.
template <int V, class T>
inline void add_values(int vectors, const Context<T>& context, const float* weights, size_t stride, int first, int last,
                       bool is_ahead, float* const* out) {
    if constexpr (V > 1)
        if (vectors < V) return add_values<V - 1>(vectors, context, weights, stride, first, last, is_ahead, out);
    constexpr int P = value_panels(V);
    int d = 0;
    for (; d + P * PANEL <= context.dim; d += P * PANEL)
        value_tile<V, P>(context, weights, stride, first, last, is_ahead, d, out);
    for (; d + 2 * PANEL <= context.dim; d += 2 * PANEL)
        value_tile<V, 2>(context, weights, stride, first, last, is_ahead, d, out);
    for (; d + PANEL <= context.dim; d += PANEL)
        value_tile<V, 1>(context, weights, stride, first, last, is_ahead, d, out);
    if (d == context.dim) return;
    for (int v = 0; v < V; v++) {
        f8 acc = load(out[v] + d);
        for (int i = first; i < last; i++) acc = fma(load(context.value(i) + d), set1(weights[v * stride + i]), acc);
        store(out[v] + d, acc);
    }
}

// In place: scores of positions [begin, last) to e^(score - max); returns the sum. What lies around them down and up
// to multiples of a panel counts as hidden.
inline float soften(float* scores, int begin, int last) {
    const float hidden = -std::numeric_limits<float>::infinity();
    const int first = begin / PANEL * PANEL;
    std::fill(scores + first, scores + begin, hidden);
    std::fill(scores + last, scores + round_up(last, PANEL), hidden);
    p16 highest = every<p16>(hidden);
    for (int i = first; i < last; i += PANEL) highest = max(highest, load16(scores + i));
    float lanes[PANEL];
    store16(lanes, highest);
    const p16 top = every<p16>(*std::max_element(lanes, lanes + PANEL));
    f8 total = zero();
    for (int i = first; i < last; i += PANEL) {
        const p16 e = exp(sub(load16(scores + i), top));
        store16(scores + i, e);
        total = add(add(total, low_half(e)), high_half(e));
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

    int begin_of(int row) const { return window ? std::max(0, position + row + 1 - window) : 0; }
    int end_of(int row) const { return position + row + 1; }
};

// Values of positions [first, last) to vectors [v, v + count). All of them see the same but for the ends, where each
// row goes by itself: what is hidden from a row may be no number, and may not be touched.
template <class T>
inline void add_visible(const Context<T>& context, const Queries& queries, const Scratch& scratch, int first, int last,
                        int v, int count, bool is_ahead, float* const* out) {
    const int first_row = v / queries.group, last_row = (v + count - 1) / queries.group;
    const int from = std::max(first, queries.begin_of(last_row)), to = std::min(last, queries.end_of(first_row));
    auto add = [&](int vector, int stop, int begin, int end) {
        if (begin < end)
            add_values<VALUE_TILE>(stop - vector, context, scratch.scores + vector * scratch.stride, scratch.stride,
                                   begin, end, is_ahead, out + vector);
    };
    auto add_rows = [&](int begin, int end) {
        for (int row = first_row; row <= last_row; row++)
            add(std::max(v, row * queries.group), std::min(v + count, (row + 1) * queries.group),
                std::max(begin, queries.begin_of(row)), std::min(end, queries.end_of(row)));
    };
    add_rows(first, std::min(from, last));
    add(v, v + count, from, to);
    add_rows(std::max(from, to), last);
}

template <class T>
inline void attend(const Context<T>& context, const Queries& queries, const Scratch& scratch) {
    const int vectors = queries.rows * queries.group, dim = context.dim;
    const int begin = queries.begin_of(0), last = queries.end_of(queries.rows - 1);
    float* out[MAX_VECTORS];
    for (int v = 0; v < round_up(vectors, ABREAST); v++) {
        const int known = std::min(v, vectors - 1);  // the last one twice to fill a register
        const size_t row = known / queries.group, head = size_t(known % queries.group) * dim;
        const float* from = queries.q + row * queries.q_stride + head;
        float* to = scratch.queries + v / ABREAST * dim * ABREAST + v % ABREAST * LANES;
        for (int d = 0; d < dim; d += LANES) store(to + d * ABREAST, load(from + d));
        out[v] = queries.out + row * queries.out_stride + head;
    }
    const int units = divide_up(vectors, ABREAST), most = divide_up(units, divide_up(units, SCORE_TILE));
    for (int tile = begin / KEYS * KEYS; tile < last; tile += TILE_POSITIONS)
        for (int unit = 0; unit < units; unit += most)
            score<SCORE_TILE>(std::min(most, units - unit), context, scratch.queries + unit * dim * ABREAST, tile,
                              std::min(tile + TILE_POSITIONS, last), unit == 0,
                              scratch.scores + unit * ABREAST * scratch.stride, scratch.stride);
    float total[MAX_VECTORS];
    for (int v = 0; v < vectors; v++) {
        const int row = v / queries.group;
        total[v] = soften(scratch.scores + v * scratch.stride, queries.begin_of(row), queries.end_of(row));
        std::fill(out[v], out[v] + dim, 0.0f);
    }
    for (int tile = begin; tile < last; tile += TILE_POSITIONS)
        for (int v = 0; v < vectors; v += VALUE_TILE)
            add_visible(context, queries, scratch, tile, std::min(tile + TILE_POSITIONS, last), v,
                        std::min(VALUE_TILE, vectors - v), v == 0, out);
    for (int v = 0; v < vectors; v++) {
        const f8 divisor = set1(total[v]);
        for (int d = 0; d < dim; d += LANES) store(out[v] + d, div(load(out[v] + d), divisor));
    }
}

}  // namespace tandem
