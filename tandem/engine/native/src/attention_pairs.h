// Attention in bfloat16: queries, keys, values and weights by pairs, which some processors multiply twice as fast.
//
// Positions go by tiles at fixed places. What was added up so far shrinks where a tile has a higher score than those
// before it (online softmax: Milakov and Gimelshein 2018, FlashAttention: Dao et al. 2022), so nothing grows with the
// context. A query vector's result depends on its own context only: products are summed as linear layers sum theirs,
// sums of weights are kept in 16 lanes by position, and what is hidden has weight zero.
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"
#include "linear.h"

namespace tandem {

constexpr int MAX_PAIR_VECTORS = 192;  // so many share a tile that was brought into pairs
constexpr float LOG2_E = 1.44269504f;  // scores are powers of two
constexpr int MOST_ROWS = 6;           // of a product, beside as many panels as go with them

// The positions that some rows see.
struct Extent {
    Context<bfloat16> context;
    int begin, end;
};

class PairAttention {
   public:
    // Of floats, for heads of so many dimensions.
    static size_t size_for(int dim) {
        const int width = round_up(dim, PANEL);
        return size_t(MAX_PAIR_VECTORS) * (dim / 2 + 3 * TILE_POSITIONS / 2 + width + PANEL) +
               size_t(TILE_POSITIONS) * (dim / 2 + width) + width + 2 * PANEL;
    }

    // `coming` is read after this, by the same thread: its first tile is asked for during the last one here.
    PairAttention(const Context<bfloat16>& context, const Queries& queries, const Extent& coming, float* buffer)
        : c(context), q(queries), coming(coming), vectors(queries.rows * queries.group), half(c.dim / 2),
          width(round_up(c.dim, PANEL)) {
        free = buffer + -(reinterpret_cast<uintptr_t>(buffer) / sizeof(float)) % PANEL;
        keys = take<Pair>(TILE_POSITIONS * half), values = take<Pair>(TILE_POSITIONS / 2 * width);
        seen = take<Pair>(TILE_POSITIONS / 2 * width), scores = take<float>(vectors * TILE_POSITIONS);
        weights = take<Pair>(vectors * TILE_POSITIONS / 2), out = take<float>(vectors * width);
        totals = take<float>(vectors * PANEL), zeros = take<bfloat16>(width);
        asked = take<Pair>(vectors * half);
    }

    void run() {
        begin = q.begin_of(0), end = q.end_of(q.rows - 1);
        start();
        for (tile = tile_of(begin); tile < end; tile += TILE_POSITIONS) {
            count = std::min(TILE_POSITIONS, end - tile);
            bring_keys();
            std::fill_n(scores, vectors * TILE_POSITIONS, 0.0f);
            multiply_pairs(vectors, divide_up(count, PANEL), {asked, half}, {keys, size_t(half) * PANEL}, half,
                           {scores, TILE_POSITIONS});
            for (int v = 0; v < vectors; v++) weigh(v);
            add_values(bring_values());
        }
        for (int v = 0; v < vectors; v++) finish(v);
    }

   private:
    const Context<bfloat16>& c;
    const Queries& q;
    const Extent& coming;
    const int vectors, half, width;  // half: of the dimensions; width: these as whole panels
    float* free;
    Pair *asked, *keys, *values, *seen, *weights;
    float *scores, *out, *totals;
    bfloat16* zeros;
    float highest[MAX_PAIR_VECTORS];
    int begin, end, tile, count;  // positions of some row; of this tile's the ones before `end`

    template <class U>
    U* take(int size) {
        U* taken = reinterpret_cast<U*>(free);
        free += size;
        return taken;
    }

    // y += x · w, all panels.
    static void multiply_pairs(int rows, int panels, Rows<const Pair> x, Panels<Pair> w, int in, Rows<float> y) {
        const int most = tile_rows(rows, MOST_ROWS), together = tile_panels(most);
        for (int panel = 0; panel < panels; panel += together)
            multiply_panels<Pair>(rows, most, std::min(together, panels - panel), x, {w.panel(panel), w.stride}, in,
                                  {y.at + panel * PANEL, y.stride});
    }

    const float* asks(int v) const { return q.q + v / q.group * q.q_stride + size_t(v % q.group) * c.dim; }
    float* answers(int v) const { return q.out + v / q.group * q.out_stride + size_t(v % q.group) * c.dim; }

    void start() {
        for (int v = 0; v < vectors; v++) {
            for (int d = 0; d < c.dim; d += LANES) store(out + d, mul(load(asks(v) + d), set1(LOG2_E)));
            pair_up(out, c.dim, asked + v * half);
        }
        std::fill_n(out, vectors * width, 0.0f);
        std::fill_n(totals, vectors * PANEL, 0.0f);
        std::fill_n(zeros, width, bfloat16{});
        std::fill_n(highest, vectors, std::numeric_limits<float>::lowest());
    }

    using Vectors = const bfloat16* Context<bfloat16>::*;

    // Where the vectors of a tile are; zeros for what no row may see.
    void find(const Extent& in, Vectors which, int first, const bfloat16** rows) const {
        for (int position = first; position < first + TILE_POSITIONS;) {
            const bfloat16* from = zeros;
            int stop = first + TILE_POSITIONS, step = 0;
            if (position < in.begin) stop = std::min(stop, in.begin);
            else if (position < in.end) {
                stop = std::min({stop, in.end, in.context.end_of_block(position)});
                from = in.context.*which + in.context.offset(position), step = in.context.dim;
            }
            for (; position < stop; position++, from += step) *rows++ = from;
        }
    }
    void find_next(Vectors which, const bfloat16** rows) const {
        const int next = tile + TILE_POSITIONS;
        if (next < end) find({c, begin, end}, which, next, rows);
        else find(coming, which, tile_of(coming.begin), rows);
    }
    static int tile_of(int position) { return position / TILE_POSITIONS * TILE_POSITIONS; }

    // Panels of 16 positions: [panels][dim / 2][16].
    void bring_keys() {
        const bfloat16 *rows[TILE_POSITIONS], *ahead[TILE_POSITIONS];
        find({c, begin, end}, &Context<bfloat16>::keys, tile, rows), find_next(&Context<bfloat16>::keys, ahead);
        for (int i = 0; i < count; i += PANEL) {
            for (int j = i; j < i + PANEL; j++) ask_for(ahead[j], c.dim);
            turn_over(rows + i, c.dim, keys + i * half);
        }
    }

    // Panels of 16 dimensions: [panels][32 pairs of positions][16]. Whether all of them are finite.
    bool bring_values() {
        const bfloat16 *rows[TILE_POSITIONS], *ahead[TILE_POSITIONS];
        find({c, begin, end}, &Context<bfloat16>::values, tile, rows), find_next(&Context<bfloat16>::values, ahead);
        bool are_finite = true;
        for (int i = 0; i < count; i += 2) {
            ask_for(ahead[i], c.dim), ask_for(ahead[i + 1], c.dim);
            are_finite &= pair_rows(rows[i], rows[i + 1], c.dim, values + i / 2 * PANEL, TILE_POSITIONS / 2 * PANEL);
        }
        return are_finite;
    }

    // Scores of a vector to weights.
    void weigh(int v) {
        const float hidden = -std::numeric_limits<float>::infinity();
        const int row = v / q.group;
        const int from = std::max(q.begin_of(row) - tile, 0), to = std::min(q.end_of(row) - tile, TILE_POSITIONS);
        float* score = scores + v * TILE_POSITIONS;
        Pair* weight = weights + v * (TILE_POSITIONS / 2);
        if (from >= to) return std::fill(weight, weight + TILE_POSITIONS / 2, Pair{0});
        std::fill(score, score + from, hidden);
        std::fill(score + to, score + TILE_POSITIONS, hidden);
        p16 most = load16(score);
        for (int i = PANEL; i < TILE_POSITIONS; i += PANEL) most = max(most, load16(score + i));
        const float top = std::max(highest[v], largest(max(low_half(most), high_half(most))));
        p16 total = load16(totals + v * PANEL);
        if (top > highest[v]) {
            const p16 factor = small_power_of_two(every<p16>(highest[v] - top));
            for (int d = 0; d < width; d += PANEL) store16(out + v * width + d, mul(load16(out + v * width + d), factor));
            total = mul(total, factor);
            highest[v] = top;
        }
        for (int i = 0; i < TILE_POSITIONS; i += 2 * PANEL) {
            const p16 first = small_power_of_two(sub(load16(score + i), every<p16>(top)));
            const p16 second = small_power_of_two(sub(load16(score + i + PANEL), every<p16>(top)));
            total = add(add(total, first), second);
            store_pairs(weight + i / 2, first, second);
        }
        store16(totals + v * PANEL, total);
    }

    // Times weight zero, what is hidden from a row adds nothing, unless it is no finite number.
    void add_values(bool are_finite) {
        const int pairs = divide_up(count, 2), panels = width / PANEL;
        const size_t stride = size_t(TILE_POSITIONS) / 2 * PANEL;
        auto add = [&](int first, int some, const Pair* from) {
            multiply_pairs(some, panels, {weights + first * (TILE_POSITIONS / 2), TILE_POSITIONS / 2}, {from, stride},
                           pairs, {out + first * width, width});
        };
        if (are_finite || q.rows == 1) return add(0, vectors, values);
        for (int row = 0; row < q.rows; row++) {
            hide_from(row);
            add(row * q.group, q.group, seen);
        }
    }

    // `seen` becomes the tile's values with zeros for what a row may not see.
    void hide_from(int row) {
        auto mask = [&](int i, uint32_t which) {
            return q.begin_of(row) <= tile + i && tile + i < q.end_of(row) ? which : 0;
        };
        for (int i = 0; i < count; i += 2)
            for (int panel = 0; panel < width / PANEL; panel++) {
                const int at = (panel * TILE_POSITIONS / 2 + i / 2) * PANEL;
                for (int d = at; d < at + PANEL; d++) seen[d].bits = values[d].bits & (mask(i, ~ODD) | mask(i + 1, ODD));
            }
    }

    void finish(int v) {
        const f8 total = set1(sum(tandem::add(load(totals + v * PANEL), load(totals + v * PANEL + LANES))));
        for (int d = 0; d < c.dim; d += LANES) store(answers(v) + d, div(load(out + v * width + d), total));
    }
};

}  // namespace tandem
