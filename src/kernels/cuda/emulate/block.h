// Memory that faults beyond its end, and the fibers that are the threads of a block.
// Included by cuda.h.
#pragma once
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "build with -U_FORTIFY_SOURCE: its longjmp check takes a switch of fibers for an error"
#endif

namespace emulate {

// ---- memory: pages of its own, the end against a page that faults, all bytes 0xFF (NaN) at first
constexpr size_t GUARD = 1 << 20;
struct Pages {
  char *map = nullptr, *begin = nullptr;
  size_t bytes = 0, mapped = 0;
  std::string name;
  pthread_t owner = pthread_self();

  static std::map<const char*, Pages*>& all() { static auto* m = new std::map<const char*, Pages*>; return *m; }
  static std::mutex& lock() { static auto* m = new std::mutex; return *m; }

  Pages(const char* name, size_t bytes, bool poison = true) : bytes(bytes), name(name) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), padded = (bytes + 15) / 16 * 16;
    mapped = (padded + page - 1) / page * page + 2 * GUARD;
    map = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED) { perror("mmap"); abort(); }
    mprotect(map, GUARD, PROT_NONE);
    mprotect(map + mapped - GUARD, GUARD, PROT_NONE);
    begin = map + mapped - GUARD - padded;
    if (poison) memset(map + GUARD, 0xFF, mapped - 2 * GUARD);
    std::lock_guard<std::mutex> hold(lock());
    all()[map] = this;
  }
  ~Pages() {
    { std::lock_guard<std::mutex> hold(lock()); all().erase(map); }
    munmap(map, mapped);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  bool edges_intact() const {  // the bytes between the data and the faulting pages, never written
    auto blank = [](const char* p, const char* end) { while (p < end && *p == char(0xFF)) ++p; return p >= end; };
    return blank(std::max(map + GUARD, begin - 64), begin) && blank(begin + bytes, map + mapped - GUARD);
  }
  static std::string describe(const char* address) {
    std::lock_guard<std::mutex> hold(lock());
    auto at = all().upper_bound(address);
    char text[200];
    if (at != all().begin() && address < (--at)->first + at->second->mapped)
      snprintf(text, sizeof text, "out of bounds: byte %td of '%s', which has %zu", address - at->second->begin,
               at->second->name.c_str(), at->second->bytes);
    else
      snprintf(text, sizeof text, "bad address %p", static_cast<const void*>(address));
    return text;
  }
};

// ---- fibers
enum State { READY, AT_BARRIER, AT_COLLECTIVE, ENDED };
struct Packet { uint64_t word[4]; };  // what a lane gives to a collective

struct Copy { void* to; const void* from; int group; };

struct Fiber {
  State state = ENDED;
  bool started = false;
  jmp_buf where;
  dim3 index;
  const char* op = "";  // the barrier or collective it waits in, with its line and mask
  int line = 0;
  unsigned mask = 0;
  Packet given;
  std::vector<Copy> copies;  // cp.async not yet waited for
  int group = 0;
};

enum Order { FORWARD, REVERSE, SHUFFLED };
inline thread_local Order order = FORWARD;  // in which threads and blocks take turns
inline thread_local std::string error;      // of the last launch on this OS thread

constexpr size_t STACK = 256 * 1024, MAX_THREADS = 1024, MAX_SHARED = 99 * 1024;  // what every card has from 8.0 on (8.6 and 8.9 have no more)

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Pages>> stacks;
  std::map<const void*, std::unique_ptr<Pages>> shared;  // static arrays, by the address of their key
  std::unique_ptr<Pages> dynamic;
  void* dynamic_shared = nullptr;
  unsigned threads = 0, current = 0;
  void (*call)(void*) = nullptr;
  void* closure = nullptr;
  const char* fault = nullptr;
  int fault_signal = 0;
  jmp_buf scheduler, launcher;
};
inline thread_local Block block;
inline thread_local bool running = false;  // not in Block: a signal handler may not be the first to build that

[[noreturn]] inline void fail(const char* format, ...) {
  char text[400];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  error = text;
  _longjmp(block.launcher, 1);
}

inline void yield() {
  if (!_setjmp(block.fibers[block.current].where)) _longjmp(block.scheduler, 1);
}

inline void fiber_main() {
  for (;;) {
    block.call(block.closure);
    block.fibers[block.current].state = ENDED;
    yield();
  }
}

inline void resume(unsigned thread) {
  Fiber& fiber = block.fibers[thread];
  block.current = thread;
  threadIdx = fiber.index;
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = block.stacks[thread]->begin;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

inline const Fiber& wait(State state, const char* op, unsigned mask, int line) {
  Fiber& me = block.fibers[block.current];
  me.state = state, me.op = op, me.mask = mask, me.line = line;
  yield();
  return me;
}

// Every lane of the mask gives a packet; when all have, each may read those of the others.
inline thread_local Packet seen[MAX_THREADS];
inline const Packet* exchange(const char* op, unsigned mask, const void* data, size_t bytes, int line) {
  Fiber& me = block.fibers[block.current];
  if (!(mask >> (block.current % 32) & 1)) fail("%s in line %d: the mask lacks the calling lane", op, line);
  memcpy(&me.given, data, bytes);
  wait(AT_COLLECTIVE, op, mask, line);
  return seen + block.current / 32 * 32;
}

inline bool finish_collectives(unsigned first) {
  bool any = false;
  const unsigned lanes = std::min(32u, block.threads - first);
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Fiber& one = block.fibers[first + lane];
    if (one.state != AT_COLLECTIVE) continue;
    bool all = true;
    for (unsigned i = 0; i < 32 && all; ++i) {
      if (!(one.mask >> i & 1)) continue;
      if (i >= lanes) { all = false; break; }
      const Fiber& other = block.fibers[first + i];
      all = other.state == AT_COLLECTIVE && other.mask == one.mask && other.line == one.line && other.op == one.op;
    }
    if (!all) continue;
    const unsigned mask = one.mask;
    for (unsigned i = 0; i < lanes; ++i)
      if (mask >> i & 1) seen[first + i] = block.fibers[first + i].given, block.fibers[first + i].state = READY;
    any = true;
  }
  return any;
}

inline void take_turns(unsigned n, std::vector<unsigned>& turn) {
  static thread_local uint32_t random = 1;
  turn.resize(n);
  for (unsigned i = 0; i < n; ++i) turn[i] = order == REVERSE ? n - 1 - i : i;
  if (order == SHUFFLED)
    for (unsigned i = n; i > 1; --i) std::swap(turn[i - 1], turn[((random = random * 1664525u + 1013904223u) >> 8) % i]);
}

inline std::string place(unsigned thread) {
  const Fiber& f = block.fibers[thread];
  char text[160];
  snprintf(text, sizeof text, f.state == ENDED ? "thread (%u,%u,%u) ended" : f.state == AT_BARRIER ? "thread (%u,%u,%u) waits in %s, line %d"
           : "thread (%u,%u,%u) waits in %s, line %d, mask %08x", f.index.x, f.index.y, f.index.z, f.op, f.line, f.mask);
  return text;
}

inline void run_block() {
  static thread_local std::vector<unsigned> warp_turn, lane_turn;
  for (unsigned t = 0; t < block.threads; ++t) {
    Fiber& f = block.fibers[t];
    f.state = READY, f.copies.clear(), f.group = 0;
  }
  for (auto& array : block.shared) memset(array.second->begin, 0xFF, array.second->bytes);
  if (block.dynamic) memset(block.dynamic->begin, 0xFF, block.dynamic->bytes);
  for (;;) {
    take_turns((block.threads + 31) / 32, warp_turn);
    take_turns(32, lane_turn);
    for (unsigned warp : warp_turn) {  // a warp runs until all its lanes wait for others or ended
      do {
        for (unsigned lane : lane_turn) {
          const unsigned t = warp * 32 + lane;
          if (t < block.threads && block.fibers[t].state == READY) resume(t);
        }
      } while (finish_collectives(warp * 32));
    }
    const Fiber& zero = block.fibers[0];
    unsigned odd = 0;
    for (unsigned t = 0; t < block.threads; ++t) {
      const Fiber& f = block.fibers[t];
      if (f.state == AT_COLLECTIVE) {
        for (unsigned other = t / 32 * 32; other < block.threads && other < t / 32 * 32 + 32; ++other) {
          const Fiber& o = block.fibers[other];
          if ((f.mask >> other % 32 & 1) && (o.state != f.state || o.mask != f.mask || o.line != f.line || o.op != f.op))
            fail("warp divergence: %s, but %s", place(t).c_str(), place(other).c_str());
        }
        fail("warp divergence: %s, which names lanes that do not exist", place(t).c_str());
      }
      if (f.state != zero.state || (f.state == AT_BARRIER && f.line != zero.line)) odd = t;
    }
    if (odd) fail("barrier divergence: %s, but %s", place(0).c_str(), place(odd).c_str());
    if (zero.state == ENDED) break;
    for (unsigned t = 0; t < block.threads; ++t) block.fibers[t].state = READY;
  }
  for (auto& array : block.shared)
    if (!array.second->edges_intact()) fail("shared array '%s' was written outside its bounds", array.second->name.c_str());
}

inline void* static_shared(const void* key, const char* name, size_t bytes) {
  auto& slot = block.shared[key];
  if (!slot) slot.reset(new Pages(name, bytes));
  return slot->begin;
}

inline bool is_shared(const void* p) {
  auto in = [p](const Pages& a) { return p >= a.begin && p < a.begin + a.bytes; };
  if (block.dynamic && in(*block.dynamic)) return true;
  return std::any_of(block.shared.begin(), block.shared.end(), [&](auto& a) { return in(*a.second); });
}

// A fault inside a kernel ends the launch; any other goes to the handler that was there before.
inline struct sigaction old_actions[65];
inline void on_signal(int number, siginfo_t* info, void* context) {
  if (running) {
    block.fault = static_cast<const char*>(info->si_addr), block.fault_signal = number;
    _longjmp(block.launcher, 2);
  }
  struct sigaction& old = old_actions[number];
  if (old.sa_flags & SA_SIGINFO) old.sa_sigaction(number, info, context);
  else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) old.sa_handler(number);
  else sigaction(number, &old, nullptr);
}
inline void prepare_os_thread() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE}) sigaction(number, &action, &old_actions[number]);
  });
  stack_t stack = {};
  sigaltstack(nullptr, &stack);
  if (stack.ss_flags & SS_DISABLE) {  // never freed: an OS thread may end while it is in use
    stack.ss_sp = malloc(stack.ss_size = 64 * 1024), stack.ss_flags = 0;
    sigaltstack(&stack, nullptr);
  }
}

__attribute__((noinline)) inline void run_grid(size_t shared_bytes) {
  const dim3 g = gridDim;
  if (!block.threads || block.threads > MAX_THREADS) fail("%u threads in a block", block.threads);
  if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535) fail("bad grid (%u,%u,%u)", g.x, g.y, g.z);
  while (block.stacks.size() < block.threads) block.stacks.emplace_back(new Pages("stack of a thread", STACK, false));
  for (unsigned t = 0; t < block.threads; ++t)
    block.fibers[t].index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
  running = true;
  const unsigned blocks = g.x * g.y * g.z;
  for (unsigned b = 0; b < blocks; ++b) {
    const unsigned i = order == REVERSE ? blocks - 1 - b : b;
    blockIdx = dim3(i % g.x, i / g.x % g.y, i / g.x / g.y);
    run_block();
  }
  size_t used = shared_bytes;
  for (auto& array : block.shared) used += array.second->bytes;
  if (used > MAX_SHARED) fail("%zu bytes of shared memory", used);
  std::lock_guard<std::mutex> hold(Pages::lock());
  for (auto& one : Pages::all())
    if (pthread_equal(one.second->owner, pthread_self()) && !one.second->edges_intact())
      error = "'" + one.second->name + "' was written outside its bounds";
}
__attribute__((noinline)) inline int report(const char* kernel, int jump) {
  running = false;
  if (jump)
    for (Fiber& fiber : block.fibers) fiber.started = false;  // they are in the middle of the kernel
  if (jump == 2) error = block.fault_signal == SIGSEGV || block.fault_signal == SIGBUS ? Pages::describe(block.fault)
      : "trap (signal " + std::to_string(block.fault_signal) + "): undefined behaviour or division by zero";
  if (error.empty()) return 0;
  char text[300];
  snprintf(text, sizeof text, "%s, block (%u,%u,%u), thread (%u,%u,%u): ", kernel, blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x, threadIdx.y, threadIdx.z);
  error = text + error;
  return 1;
}
inline int run(const char* kernel, dim3 grid, dim3 threads, size_t shared_bytes, void (*call)(void*), void* closure) {
  prepare_os_thread();
  error.clear();
  block.call = call, block.closure = closure;
  block.threads = threads.x * threads.y * threads.z;
  gridDim = grid, blockDim = threads, blockIdx = threadIdx = dim3(0, 0, 0);
  block.shared.clear();
  block.dynamic.reset(shared_bytes ? new Pages("dynamic shared memory", shared_bytes) : nullptr);
  block.dynamic_shared = block.dynamic ? block.dynamic->begin : nullptr;
  block.fibers.resize(MAX_THREADS);
  const int jump = _setjmp(block.launcher);
  if (jump == 0) run_grid(shared_bytes);
  return report(kernel, jump);
}
}  // namespace emulate
