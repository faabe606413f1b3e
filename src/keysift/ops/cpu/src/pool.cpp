// A pool of std::threads. Jobs stand in a list; idle workers take tasks of any job that still has some.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>

#include "abi.h"

namespace ks {
namespace {

constexpr int MOST_WORKERS = 255;
constexpr auto SPIN = std::chrono::microseconds(20);    // about what a wake-up costs
constexpr auto LINGER = std::chrono::microseconds(300);  // a layer's next step, or another's, comes this soon

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits without going to sleep, after a few microseconds in favour of whoever else wants the core; true as soon as
// `done` holds.
template <class Done>
bool spin_until(Done&& done) {
  const auto begin = std::chrono::steady_clock::now();
  for (auto now = begin; now < begin + LINGER; now = std::chrono::steady_clock::now()) {
    for (int i = 0; i < 64; i++) {
      if (done()) return true;
      relax();
    }
    if (now > begin + SPIN) std::this_thread::yield();
  }
  return false;
}

// Takes a lock that is held for some dozens of nanoseconds at a time. Workers that saw a job at the same moment would
// put each other to sleep in turn if they asked the system for it.
void take(std::unique_lock<std::mutex>& lock) {
  for (int i = 0; i < 1000; i++) {
    if (lock.try_lock()) return;
    relax();
  }
  lock.lock();
}

// A fault that a test asked for: the task of that index fails, in the next job of the thread.
struct Fault {
  int kind = 0;  // 0 none, 1 out of memory in a task, 2 an exception in a task, 3 out of memory in scratch()
  int64_t task = 0;
};
thread_local Fault planned;

[[noreturn]] void fail(int kind) {
  if (kind == 2) throw std::runtime_error("a worker failed, as a test asked");
  throw std::bad_alloc();
}

struct Job {
  Task task;
  void* context;
  int64_t n;
  Fault fault;
  int helpers;                    // workers that may still join; under the pool's mutex
  int inside = 0;                 // workers at it; under the pool's mutex
  bool closed = false;            // the caller waits for the last of them; under the pool's mutex
  Job* next = nullptr;            // in the list; under the pool's mutex
  std::atomic<int64_t> taken{0};  // tasks handed out
  std::atomic<bool> left{false};  // whether the last worker has gone; the caller spins on it
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first failure; written once, by whom set `failed`

  void work() noexcept {
    for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < n;) {
      try {
        if (fault.kind == 1 || fault.kind == 2) {
          if (i == fault.task) fail(fault.kind);
        }
        task(context, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        taken.store(n, std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    const int wanted = job.helpers;
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    take(lock);
    grow(wanted);
    job.next = jobs_;
    jobs_ = &job;
    generation_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    for (int i = 0; i < wanted; i++) wake_.notify_one();
    job.work();
    take(lock);
    remove(job);  // nobody joins from here on
    if (job.inside == 0) return;
    job.closed = true;
    lock.unlock();
    if (spin_until([&] { return job.left.load(std::memory_order_acquire); })) {
      lock.lock();  // the worker that set it has to be out of the mutex before the job dies
      return;
    }
    lock.lock();
    gone_.wait(lock, [&] { return job.inside == 0; });
  }

 private:
  void grow(int wanted) {
    while (workers_ < wanted && workers_ < MOST_WORKERS) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {
        return;  // those that there are do the work
      }
      workers_++;
    }
  }

  void remove(Job& job) {
    for (Job** at = &jobs_; *at; at = &(*at)->next) {
      if (*at == &job) {
        *at = job.next;
        return;
      }
    }
  }

  Job* open() {
    for (Job* job = jobs_; job; job = job->next) {
      if (job->helpers > 0 && job->taken.load(std::memory_order_relaxed) < job->n) return job;
    }
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = open();
      if (!job) {
        const int64_t seen = generation_.load(std::memory_order_relaxed);
        lock.unlock();
        spin_until([&] { return generation_.load(std::memory_order_relaxed) != seen; });
        take(lock);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        continue;
      }
      job->helpers--;
      job->inside++;
      lock.unlock();
      job->work();
      take(lock);
      if (--job->inside == 0 && job->closed) {
        job->left.store(true, std::memory_order_release);
        gone_.notify_all();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, gone_;
  std::atomic<int64_t> generation_{0};  // jobs so far
  Job* jobs_ = nullptr;
  int workers_ = 0;
};

// Never destroyed: workers may still be asleep in it when the process ends. A child of fork() has none of the workers,
// and perhaps a locked mutex, so it begins with a pool of its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const int registered = [] {
    current.store(new Pool);
    return pthread_atfork(nullptr, nullptr, [] { current.store(new (std::nothrow) Pool); });
  }();
  (void)registered;
  Pool* p = current.load(std::memory_order_acquire);
  if (!p) throw std::bad_alloc();
  return *p;
}

class Kept {
 public:
  ~Kept() { std::free(at_); }

  void* ask(int64_t bytes) {
    if (bytes > size_ || (size_ > MOST_KEPT && bytes <= MOST_KEPT)) {
      std::free(at_);
      at_ = nullptr;
      size_ = 0;
      const int64_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      if (bytes < 0 || size < bytes || !(at_ = std::aligned_alloc(64, size_t(size)))) throw std::bad_alloc();
      size_ = size;
    }
    return at_;
  }

 private:
  static constexpr int64_t MOST_KEPT = int64_t(64) << 20;
  void* at_ = nullptr;
  int64_t size_ = 0;
};

thread_local Kept kept[3];

}  // namespace

void run_tasks(int64_t n, int threads, Task task, void* context) {
  Job job;
  job.task = task;
  job.context = context;
  job.n = n;
  job.fault = planned;
  if (planned.kind == 1 || planned.kind == 2) planned = Fault();
  const int64_t helpers = n - 1 < threads - 1 ? n - 1 : threads - 1;
  job.helpers = int(helpers < MOST_WORKERS ? helpers : MOST_WORKERS);
  if (job.helpers > 0) {
    pool().run(job);
  } else {
    job.work();
  }
  if (job.failed.load()) std::rethrow_exception(job.error);
}

void* scratch(int slot, int64_t bytes) {
  if (planned.kind == 3) {
    planned = Fault();
    fail(3);
  }
  return kept[slot].ask(bytes > 0 ? bytes : 1);
}

}  // namespace ks

// For tests: a fault in the next call of the same thread.
struct ks_fail_next_args {
  KS_ARGS_HEAD
  int64_t kind, task;
};

extern "C" KS_EXPORT int ks_fail_next(const ks_fail_next_args* args) {
  return ks::guarded(args, [&](ks::Isa) {
    ks::require(args->kind >= 0 && args->kind <= 3, "kind has to be 0 to 3");
    ks::planned.kind = int(args->kind);
    ks::planned.task = args->task;
  });
}
