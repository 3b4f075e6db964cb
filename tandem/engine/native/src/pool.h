// Threads that run one function together and meet at barriers.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// A team of fixed size; the caller is member 0. Between runs members sleep; where runs follow close upon another they
// watch for the next one, as to wake up takes as long as a small model's step.
class Team {
    using Clock = std::chrono::steady_clock;

   public:
    explicit Team(int size) : size_(size) {
        for (int member = 1; member < size; member++) threads_.emplace_back([this, member] { serve(member); });
    }

    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            is_closing_ = true;
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return size_; }

    // Run `work(member)` on every member; returns when all are done.
    void run(const std::function<void(int)>& work) {
        if (size_ == 1) return work(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work;
            called_ = Clock::now();
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        work(0);
        barrier();
    }

    // Wait for all members. Everything written before is visible after.
    void barrier() {
        if (size_ == 1) return;
        unsigned phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            taken_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
            spins < SPINS ? relax() : std::this_thread::yield();  // a member may have lost its core
    }

    // Items [0, total) for whoever comes for them, as `work(first, last)` with multiples of `grain`: large pieces first
    // and small ones last, so that members are done together though one was slower or had lost its core.
    // There is a barrier between two calls.
    template <class F>
    void divide(int total, int grain, const F& work) {
        if (size_ == 1) return work(0, total);
        int first = taken_.load(std::memory_order_relaxed);
        while (first < total) {
            const int piece = std::max((total - first) / (2 * size_) / grain, 1) * grain;
            const int last = std::min(total, first + piece);
            if (!taken_.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
            work(first, last);
            first = taken_.load(std::memory_order_relaxed);
        }
    }

   private:
    static constexpr int SPINS = 2000;
    static constexpr std::chrono::microseconds WATCH{150}, GLANCE{20};

    void serve(int member) {
        unsigned seen = 0;
        auto patience = WATCH;
        for (;;) {
            const auto began = Clock::now();
            watch(seen, began + patience);
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                seen = generation_.load();
                if (is_closing_) return;
                patience = called_ - began < WATCH ? WATCH : GLANCE;  // not counting how long it took to wake up
            }
            (*work_)(member);
            barrier();
        }
    }

    // Until there is another run, or no longer than that.
    void watch(unsigned seen, Clock::time_point until) const {
        do {
            for (int spins = 0; spins < 16; spins++) {
                if (generation_.load(std::memory_order_acquire) != seen) return;
                relax();
            }
        } while (Clock::now() < until);
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> generation_{0};
    const std::function<void(int)>* work_ = nullptr;
    Clock::time_point called_;
    bool is_closing_ = false;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
    alignas(64) std::atomic<int> taken_{0};  // of the items that are being divided
};

// The share of `total` items that a member takes: [first, last).
struct Share {
    int first, last;
    Share(int total, int member, int size) : first(total * member / size), last(total * (member + 1) / size) {}
};

}  // namespace tandem
