// Threads that share the parts of one step. The caller's thread works too; helpers spin only while a step runs, and sleep between
// steps. Parts are taken one at a time, so that a helper which the system has put aside delays nothing but the part it holds.
//
// Engines of one machine see each other through a page of shared memory (`Cores`) and divide the cores among those that compute
// right now: a lone engine uses all of them, two on two cores use one each.
#pragma once

#include <fcntl.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <thread>
#include <vector>

namespace baton {

inline int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Which engines of this machine compute now. Each has a slot that tells until when it is to be taken for computing: a little beyond
// the part under way, so that one killed in the middle of a step is soon forgotten, and a little beyond the step, so that the pause
// between two steps gives nobody's core away.
class Cores {
 public:
  explicit Cores(const char* path) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    sched_getaffinity(0, sizeof(cores), &cores);
    num_cores_ = std::max(1, CPU_COUNT(&cores));
    if (path == nullptr) return;
    const int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    if (file < 0) return;
    struct stat found;
    // Whoever else could cut the file would end this process, and so would a page for which the file system has no room.
    const bool ours = fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_uid == geteuid() && (found.st_mode & 022) == 0;
    if (ours && posix_fallocate(file, 0, BYTES) == 0) {
      void* page = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
      if (page != MAP_FAILED) slots_ = static_cast<Slot*>(page);
    }
    close(file);
    if (slots_ != nullptr) claim();
  }

  ~Cores() {
    if (mine_ != nullptr) {
      mine_->until_ns.store(0, std::memory_order_relaxed);
      mine_->owner.store(0, std::memory_order_release);
    }
    if (slots_ != nullptr) munmap(slots_, BYTES);
  }

  Cores(const Cores&) = delete;
  Cores& operator=(const Cores&) = delete;

  void sign(bool computing) {
    if (mine_ == nullptr) return;
    mine_->until_ns.store(monotonic_ns() + (computing ? PART_NS : PAUSE_NS), std::memory_order_relaxed);
  }

  // How many of `wanted` threads this engine may use now. Alone it has them all.
  int share(int wanted) const {
    if (mine_ == nullptr) return wanted;
    const int64_t now = monotonic_ns();
    int computing = 1;
    for (int i = 0; i < SLOTS; ++i) {
      computing += &slots_[i] != mine_ && now < slots_[i].until_ns.load(std::memory_order_relaxed);
    }
    return computing == 1 ? wanted : std::clamp(num_cores_ / computing, 1, wanted);
  }

 private:
  static constexpr int SLOTS = 64;
  static constexpr size_t BYTES = 4096;
  static constexpr int64_t PART_NS = 50000000;
  static constexpr int64_t PAUSE_NS = 1000000;

  struct alignas(64) Slot {
    std::atomic<int64_t> owner;
    std::atomic<int64_t> until_ns;
  };
  static_assert(sizeof(Slot) * SLOTS <= BYTES);

  void claim() {
    for (int i = 0; i < SLOTS && mine_ == nullptr; ++i) {
      int64_t owner = slots_[i].owner.load();
      const bool dead = owner != 0 && getpgid((pid_t)(owner >> 16)) < 0;
      if (owner != 0 && !dead) continue;
      // One process may hold several engines.
      const int64_t me = ((int64_t)getpid() << 16) | (i + 1);
      if (slots_[i].owner.compare_exchange_strong(owner, me)) mine_ = &slots_[i];
    }
  }

  int num_cores_;
  Slot* slots_ = nullptr;
  Slot* mine_ = nullptr;
};

class Team {
 public:
  using Part = void (*)(void* context, int part, int thread);

  Team(int num_threads, const char* cores_path)
      : cores_(cores_path), size_(num_threads), helpers_(num_threads - 1) {
    CPU_ZERO(&allowed_cores_);
    sched_getaffinity(0, sizeof(allowed_cores_), &allowed_cores_);
    try {
      for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { help(i); });
    } catch (...) {
      stop();
      throw;
    }
  }

  ~Team() { stop(); }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // A step, from its beginning to its end, however that comes: helpers are there.
  class Step {
   public:
    explicit Step(Team& team) : team_(team) { team_.begin(); }
    ~Step() { team_.end(); }
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

   private:
    Team& team_;
  };

  // As many homes as rows of a batch are divided into: what a thread writes it reads again in the next phase, from its own cache.
  int homes(int rows) const { return std::clamp(rows / HOME_ROWS, 1, std::min(size_, MOST_HOMES)); }

  // As `run`: parts [0, count) of each home. A thread takes those of its own home first, then others'.
  template <class Body>
  void run_at_home(int homes, int count, Body&& body) {
    for (int home = 0; home < homes; ++home) next_[home].part.store(0, std::memory_order_relaxed);
    run(homes * count, [&](int, int thread) {
      for (int i = 0; i < homes; ++i) {
        const int home = (thread + i) % homes;
        if (next_[home].part.load(std::memory_order_relaxed) >= count) continue;
        const int part = next_[home].part.fetch_add(1, std::memory_order_relaxed);
        if (part < count) return body(home, part, thread);
      }
    });
  }

  // Computes parts [0, count), each once, and returns when all are done. The body throws nothing.
  template <class Body>
  void run(int count, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    if (count <= 0) return;
    if (count == 1 || size_ == 1) {
      cores_.sign(true);
      for (int part = 0; part < count; ++part) {
        body(part, 0);
        if (renews(part)) cores_.sign(true);
      }
      return;
    }
    divide();
    call_ = [](void* context, int part, int thread) { (*static_cast<Plain*>(context))(part, thread); };
    context_ = const_cast<void*>(static_cast<const void*>(&body));
    done_.store(0, std::memory_order_relaxed);
    phase_ = (phase_ + 1) & 0xFFFF;
    ticket_.store(phase_ << 48 | (uint64_t)count << 24, std::memory_order_release);
    work(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) {
      _mm_pause();
      if (spins > PATIENT_SPINS) {
        separate();
        sched_yield();
        spins = 0;
      }
    }
  }

 private:
  void begin() {
    active_.store(true, std::memory_order_seq_cst);
    divide();
  }

  void end() {
    active_.store(false, std::memory_order_relaxed);
    cores_.sign(false);
  }

  void stop() {
    stopping_.store(true);
    wake();
    for (auto& thread : threads_) thread.join();
  }

  static constexpr int HOME_ROWS = 128;
  static constexpr int MOST_HOMES = 64;

  // Which part of a home is next.
  struct alignas(64) Next {
    std::atomic<int> part{0};
  };

  static constexpr int PATIENT_SPINS = 2000;
  static constexpr int64_t LINGER_NS = 60000;

  // At which parts the cores are divided anew: a phase may take longer than an engine is remembered.
  static bool renews(int part) { return (part & 7) == 7; }

  // Finds out how many threads may work now, and sees that they are awake.
  void divide() {
    cores_.sign(true);
    const int allowed = cores_.share(size_);
    allowed_.store(allowed, std::memory_order_seq_cst);
    if (size_ - asleep_.load(std::memory_order_seq_cst) < allowed) wake();
  }

  // A helper that the system has put on the caller's core, where each waits for the other, is sent to the others.
  void separate() {
    const int here = sched_getcpu();
    for (const Helper& helper : helpers_) {
      if (helper.core.load(std::memory_order_relaxed) != here) continue;
      cpu_set_t cores = allowed_cores_;
      CPU_CLR(here, &cores);
      if (CPU_COUNT(&cores) > 0) sched_setaffinity(helper.id.load(std::memory_order_relaxed), sizeof(cores), &cores);
    }
  }

  // Takes parts until none is left.
  void work(int thread) {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      const int part = (int)(ticket & 0xFFFFFF), count = (int)(ticket >> 24 & 0xFFFFFF);
      if (part >= count || thread >= allowed_.load(std::memory_order_relaxed)) return;
      // Fails where another took the part. Where it succeeds the phase waits for it, so what describes the phase stays.
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      if (renews(part)) divide();
      call_(context_, part, thread);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  struct Helper {
    std::atomic<pid_t> id{0};
    std::atomic<int> core{-1};
  };

  void help(int thread) {
    Helper& me = helpers_[thread - 1];
    pthread_setname_np(pthread_self(), "baton-helper");
    me.id.store((pid_t)syscall(SYS_gettid), std::memory_order_relaxed);
    int64_t idle_since_ns = 0;
    while (!stopping_.load(std::memory_order_relaxed)) {
      const uint32_t calls = calls_.load(std::memory_order_acquire);
      if (active_.load(std::memory_order_relaxed) && thread < allowed_.load(std::memory_order_relaxed)) {
        me.core.store(sched_getcpu(), std::memory_order_relaxed);
        work(thread);
        idle_since_ns = 0;
        _mm_pause();
        continue;
      }
      const int64_t now_ns = monotonic_ns();
      if (idle_since_ns == 0) idle_since_ns = now_ns;
      if (now_ns - idle_since_ns < LINGER_NS && thread < allowed_.load(std::memory_order_relaxed)) {
        for (int i = 0; i < 32; ++i) _mm_pause();
        continue;
      }
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      if (!active_.load(std::memory_order_seq_cst) || thread >= allowed_.load(std::memory_order_relaxed)) {
        if (!stopping_.load()) syscall(SYS_futex, &calls_, FUTEX_WAIT_PRIVATE, calls, nullptr, nullptr, 0);
      }
      asleep_.fetch_sub(1, std::memory_order_seq_cst);
      idle_since_ns = 0;
    }
  }

  void wake() {
    calls_.fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &calls_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  Cores cores_;
  const int size_;
  uint64_t phase_ = 0;
  Part call_ = nullptr;
  void* context_ = nullptr;
  // The phase's number, its number of parts, and the next part: one word, so that they always belong together.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<int> allowed_{1};
  std::atomic<bool> active_{false};
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> calls_{0};
  std::atomic<int> asleep_{0};
  Next next_[MOST_HOMES];
  cpu_set_t allowed_cores_;
  std::vector<Helper> helpers_;
  std::vector<std::thread> threads_;
};

}  // namespace baton
