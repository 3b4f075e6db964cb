// The most probable token of a row of logits.
#pragma once

#include <cmath>

#include "simd.h"

namespace tandem {

// The first of the largest logits, or -1 where one of them is no finite number.
inline int most_probable(const float* logits, int vocab) {
    f8 largest = set1(-INFINITY), odd = zero();  // x - x is 0 for numbers, NaN for the others
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
    if (rest != 0.0f) return -1;  // also where it is NaN
    int found = 0;
    while (logits[found] != most) found++;
    return found;
}

}  // namespace tandem
