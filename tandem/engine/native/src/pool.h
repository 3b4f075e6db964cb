// Threads that run one function together and meet at barriers.
#pragma once

#include <atomic>
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

// A team of fixed size; the caller is member 0. Members sleep between runs.
class Team {
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
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++)
            spins < SPINS ? relax() : std::this_thread::yield();  // a member may have lost its core
    }

   private:
    static constexpr int SPINS = 2000;

    void serve(int member) {
        unsigned seen = 0;
        for (;;) {
            for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
                seen = generation_.load();
                if (is_closing_) return;
            }
            (*work_)(member);
            barrier();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> generation_{0};
    const std::function<void(int)>* work_ = nullptr;
    bool is_closing_ = false;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> phase_{0};
};

// The share of `total` items, in whole multiples of `grain`, that a member takes: [first, last).
struct Share {
    int first, last;
    Share(int total, int member, int size, int grain = 1) {
        int grains = (total + grain - 1) / grain;
        first = std::min(total, grains * member / size * grain);
        last = std::min(total, grains * (member + 1) / size * grain);
    }
};

}  // namespace tandem
