// A token from a row of logits: the most probable one, or one that is drawn.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "simd.h"

namespace tandem {

// How a token is drawn: parameters, and what its random number depends on (tandem/engine/rng.py).
struct Draw {
    uint64_t seed, position, stream;
    double temperature;  // 0: the most probable token
    double top_p, min_p;
    int64_t top_k;  // 0: all
};

// Also where a temperature is too small for a float: nothing but the largest would be left.
inline bool is_greedy(const Draw& d) { return float(d.temperature) == 0.0f; }

struct Largest {
    float value;
    bool are_finite;  // all logits
};

inline Largest largest_of(const float* logits, int vocab) {
    f8 largest = set1(-INFINITY), odd = zero();  // x - x is 0 for finite numbers, NaN for the others
    int i = 0;
    for (; i + LANES <= vocab; i += LANES) {
        const f8 x = load(logits + i);
        largest = max(x, largest);
        odd = add(odd, sub(x, x));
    }
    float each[LANES], rest = sum(odd), most = -INFINITY;
    store(each, largest);
    for (float x : each) most = x > most ? x : most;
    for (; i < vocab; i++) {
        most = logits[i] > most ? logits[i] : most;
        rest += logits[i] - logits[i];
    }
    return {most, rest == 0.0f};
}

inline int first_of(float value, const float* logits) {
    int found = 0;
    while (logits[found] != value) found++;
    return found;
}

// The first of the largest logits, or -1 where one of them is no finite number.
inline int most_probable(const float* logits, int vocab) {
    const Largest largest = largest_of(logits, vocab);
    return largest.are_finite ? first_of(largest.value, logits) : -1;
}

inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

enum Stream : uint64_t { TOKEN = 0, DRAFT = 1, ACCEPT = 2, RESIDUAL = 3 };  // tandem/engine/rng.py

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

inline uint64_t key_of(const Draw& d, uint64_t stream) {
    return mix((mix((d.seed ^ d.position) + GOLDEN) ^ stream) + GOLDEN);
}

// In [0, 1), with 53 random bits.
inline double chance_of(const Draw& d, uint64_t stream) {
    return double(mix(key_of(d, stream) + GOLDEN) >> 11) * 0x1p-53;
}

// What a draft proposed for a row that speculative sampling judges.
struct Drafted {
    int64_t token_id;    // -1: nothing
    const float* probs;  // [vocab] what it was drawn from; null: the draft was sure
};

// Draws rows of one vocabulary, one after the other.
class Sampler {
   public:
    // -1 where a logit is no finite number; with `masked` some may be -inf.
    int choose(const float* logits, int vocab, const Draw& d, bool masked) {
        const Largest largest = largest_of(logits, vocab);
        if (!(masked || largest.are_finite) || !std::isfinite(largest.value)) return -1;
        if (is_greedy(d)) return first_of(largest.value, logits);
        weigh(logits, vocab, largest.value, d);
        return first_to_arrive(weights_, vocab, key_of(d, d.stream));
    }

    // The draft's token where it is accepted, else one from what the target has more of (decode_worker/acceptance.py).
    int judge(const float* logits, int vocab, const Draw& d, const Drafted& drafted) {
        const int64_t proposed = drafted.token_id;
        if (proposed < 0 || is_greedy(d)) return choose(logits, vocab, d, false);
        const Largest largest = largest_of(logits, vocab);
        if (!largest.are_finite) return -1;
        weigh(logits, vocab, largest.value, d);
        const double total = total_of(vocab), drawn_with = drafted.probs ? drafted.probs[proposed] : 1.0;
        if (drawn_with > 0 && chance_of(d, ACCEPT) * drawn_with < weights_[proposed] / total) return int(proposed);
        double rest = 0;
        sorted_.resize(vocab);
        for (int i = 0; i < vocab; i++) {
            const double theirs = drafted.probs ? drafted.probs[i] : double(i == proposed);
            rest += sorted_[i] = float(std::max(weights_[i] / total - theirs, 0.0));
        }
        return first_to_arrive(rest > TINY ? sorted_ : weights_, vocab, key_of(d, RESIDUAL));
    }

    // The share of the most probable token in what the last draw of a row chose from.
    float confidence(int vocab) const { return float(1 / total_of(vocab)); }

    // What the last draw of a row chose from.
    void copy_probs(float* probs, int vocab) const {
        const double total = total_of(vocab);
        for (int i = 0; i < vocab; i++) probs[i] = float(weights_[i] / total);
    }

   private:
    static constexpr double TINY = 1e-12;  // a residual of less is rounding

    std::vector<float> weights_;  // unnormalized probabilities; the largest is 1
    std::vector<float> sorted_;   // or what the target has more of

    // What the parameters leave of the softmax.
    void weigh(const float* logits, int vocab, float largest, const Draw& d) {
        weights_.resize(round_up(vocab, LANES));
        const f8 most = set1(largest), t = set1(float(d.temperature));
        for (int i = 0; i < vocab; i += LANES) {
            const f8 x = i + LANES <= vocab ? load(logits + i) : load_some(logits + i, vocab - i);
            store(weights_.data() + i, exp(div(sub(x, most), t)));
        }
        if (d.top_k > 0 && d.top_k < vocab) keep_top_k(vocab, int(d.top_k));
        if (d.top_p < 1) keep_top_p(vocab, d.top_p);
        if (d.min_p > 0) drop_below(float(d.min_p), vocab);
    }

    void drop_below(float least, int vocab) {
        for (int i = 0; i < vocab; i++)
            if (weights_[i] < least) weights_[i] = 0.0f;
    }

    // Ties at the border stay.
    void keep_top_k(int vocab, int k) {
        sorted_.assign(weights_.begin(), weights_.begin() + vocab);
        std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.end(), std::greater<float>());
        drop_below(sorted_[k - 1], vocab);
    }

    // The most probable ones, until they reach a share of `p`; ties at the border stay.
    void keep_top_p(int vocab, double p) {
        const double total = total_of(vocab);
        const double surely_out = (1 - p) * total / vocab;  // all that are smaller have less than 1 - p together
        sorted_.clear();
        for (int i = 0; i < vocab; i++)
            if (weights_[i] > 0 && weights_[i] >= surely_out) sorted_.push_back(weights_[i]);
        std::sort(sorted_.begin(), sorted_.end(), std::greater<float>());
        double above = 0;
        float least = sorted_[0];
        for (float weight : sorted_) {
            if (above >= p * total) break;
            least = weight;
            above += weight;
        }
        drop_below(least, vocab);
    }

    double total_of(int vocab) const {
        double total = 0;
        for (int i = 0; i < vocab; i++) total += weights_[i];
        return total;
    }

    // Every token arrives after an exponential time of its own, the sooner the more it weighs: the first is drawn
    // with its probability (the Gumbel-max trick). -log(1 - u) is at least u, so few logarithms are taken.
    static int first_to_arrive(const std::vector<float>& weights, int vocab, uint64_t key) {
        int first = -1;
        double weight = 0, time = 1;  // of the first so far, which arrives after time / weight
        for (int i = 0; i < vocab; i++) {
            const double mine = weights[i];
            if (mine == 0) continue;
            const double u = (double(mix((key ^ uint64_t(i)) + GOLDEN) >> 12) + 0.5) * 0x1p-52;
            if (mine * time <= weight * u) continue;
            const double wait = -std::log1p(-u);
            if (mine * time > weight * wait) first = i, weight = mine, time = wait;
        }
        return first;
    }
};

}  // namespace tandem
