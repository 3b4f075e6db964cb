// Drafting in one call: the most probable token again and again, for all sequences of a batch together.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "linear.h"
#include "model.h"
#include "simd.h"

namespace tandem {

struct Guesses {
    int32_t most;             // tokens of the longest guess
    const int32_t* counts;    // [sequences] tokens wanted, at least 1
    const float* thresholds;  // [sequences] end where the most probable token has less; 0: never
    const float* products;    // [sequences] end after a token with which its probabilities' product is less; 0: never
    const Draw* draws;        // [sequences] how the first token is drawn; null: the most probable
    int32_t* token_ids;       // [sequences, most]
    int32_t* found;           // [sequences] tokens written
    int32_t* is_unsure;       // [sequences] 1 where the threshold ended it
    float* probs;             // [sequences, most, vocab] what tokens of the stream DRAFT were drawn from, or null
};

// The share of a token of the softmax.
inline float confidence(const float* logits, int vocab, int token_id) {
    const f8 most = set1(logits[token_id]);
    f8 total = zero();
    int i = 0;
    for (; i + LANES <= vocab; i += LANES) total = add(total, exp(sub(load(logits + i), most)));
    float rest = 0.0f;
    for (; i < vocab; i++) rest += std::exp(logits[i] - logits[token_id]);
    return 1.0f / (sum(total) + rest);
}

// The rows of one forward: a token for each sequence that goes on.
struct NextRows {
    std::vector<int32_t> token_ids, positions, first_rows, first_blocks, logits_rows;

    Batch batch(const Batch& first, const Guesses& g, const std::vector<int32_t>& alive) {
        const int32_t count = int32_t(alive.size());
        for (auto* each : {&token_ids, &positions, &first_blocks, &logits_rows}) each->resize(count);
        first_rows.assign(1, 0);
        for (int32_t row = 0; row < count; row++) {
            const int s = alive[row], found = g.found[s];
            token_ids[row] = g.token_ids[size_t(s) * g.most + found - 1];
            positions[row] = first.positions[first.first_rows[s + 1] - 1] + found;
            first_blocks[row] = first.first_blocks[s];
            logits_rows[row] = row;
            first_rows.push_back(row + 1);
        }
        return {count, count, count, token_ids.data(), positions.data(), first_rows.data(), first.tables,
                first_blocks.data(), logits_rows.data(), first.angles, first.logits, nullptr, nullptr};
    }
};

inline void keep_probs(float* probs, int vocab, int token_id, const Sampler& sampler) {
    if (token_id >= 0) return sampler.copy_probs(probs, vocab);
    std::fill_n(probs, vocab, 0.0f);  // it had no numbers: the guess is token 0, for sure
    probs[0] = 1.0f;
}

// One more token, if the model is sure enough of it; whether the sequence goes on. `product` is that of the largest
// probabilities so far.
inline bool extend(const Guesses& g, int s, const float* logits, int vocab, Sampler& sampler, float& product) {
    const bool is_drawn = g.draws && !is_greedy(g.draws[s]);
    int token_id;
    if (is_drawn) {
        Draw next = g.draws[s];
        next.position += g.found[s];
        token_id = sampler.choose(logits, vocab, next, false);
    } else {
        token_id = most_probable(logits, vocab);
    }
    if (g.thresholds[s] > 0 || g.products[s] > 0) {
        const float sure = token_id < 0 ? 0.0f : is_drawn ? sampler.confidence(vocab) : confidence(logits, vocab, token_id);
        if ((g.is_unsure[s] = !(sure >= g.thresholds[s]))) return false;
        product *= sure;
    }
    const size_t place = size_t(s) * g.most + g.found[s]++;
    g.token_ids[place] = std::max(token_id, 0);
    if (is_drawn && g.probs && g.draws[s].stream == DRAFT) keep_probs(g.probs + place * vocab, vocab, token_id, sampler);
    return g.found[s] < g.counts[s] && product >= g.products[s];
}

// `forward(batch)` fills a row of logits per sequence. Tables and angles reach as far as the guesses do.
template <class Forward>
void guess(const Batch& first, const Guesses& g, int vocab, Sampler& sampler, Forward forward) {
    std::vector<int32_t> alive(first.sequences), next;
    std::vector<float> products(first.sequences, 1.0f);
    std::iota(alive.begin(), alive.end(), 0);
    std::fill_n(g.found, 2 * first.sequences, 0);  // `is_unsure` lies behind it
    NextRows rows;
    for (Batch batch = first;; batch = rows.batch(first, g, alive)) {
        forward(batch);
        next.clear();
        for (size_t row = 0; row < alive.size(); row++)
            if (extend(g, alive[row], first.logits + row * round_up(vocab, PANEL), vocab, sampler, products[alive[row]]))
                next.push_back(alive[row]);
        if (next.empty()) return;
        alive.swap(next);
    }
}

}  // namespace tandem
