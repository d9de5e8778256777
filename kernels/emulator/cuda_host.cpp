// cuda_host.cpp: blocks, barriers, collectives, asynchronous copies, and the report when none of them can go on.
#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace cuhost {

__thread Block* block = nullptr;

// NaN in f32, f64 and bf16; -1 or the largest value in integers: what memory holds that nobody has written.
static constexpr int POISON = 0xFF;
static constexpr size_t CANARY = 16;

static const char* file_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

// The first fault of a launch is its error; later ones are its echo.
static void report(Launch* launch, const char* text) {
  uint32_t none = 0;
  if (launch->failed.compare_exchange_strong(none, 1)) snprintf(launch->error, sizeof launch->error, "%s", text);
}

void fault(Site site, const char* format, ...) {
  Block* b = block;
  Fiber& f = *b->current;
  char text[1536];
  if (!site.file) site.file = f.site.file, site.line = f.site.line;
  int used = site.file ? snprintf(text, sizeof text, "%s:%d: ", file_name(site.file), site.line) : 0;
  used += snprintf(text + used, sizeof text - used, "block (%u,%u,%u) thread (%u,%u,%u): %s%s", b->index.x, b->index.y,
                   b->index.z, f.thread.x, f.thread.y, f.thread.z, site.what ? site.what : "", site.what ? ": " : "");
  va_list list;
  va_start(list, format);
  vsnprintf(text + used, sizeof text - used, format, list);
  va_end(list);
  report(b->launch, text);
  b->residents->abandoned = true;
  switch_to_main(f);
  __builtin_unreachable();
}

// ---- the scheduler

// The next runnable fiber: of the current warp first, then of the warps after it, round and round. Under EAGER the warps take
// turns instead, which shows warps that share what each should have alone.
static Fiber* next_runnable(Block& b) {
  unsigned start = b.current ? b.current->linear / WARP + b.eager : (b.reversed ? b.warps - 1 : 0);
  for (unsigned i = 0; i < b.warps; i++) {
    unsigned w = b.reversed ? (start + b.warps - i) % b.warps : (start + i) % b.warps;
    uint32_t runnable = b.warp[w].runnable;
    if (runnable) {
      int l = b.reversed ? 31 - __builtin_clz(runnable) : __builtin_ctz(runnable);
      return &b.fiber[w * WARP + l];
    }
  }
  return nullptr;
}

// Fibers whose counter has come to its value.
static bool wake_for_counters(Residents& r) {
  bool any = false;
  for (Block* b : r.block)
    for (Fiber& f : b->fiber)
      if (f.counter && f.state == State::waiting && __atomic_load_n(f.counter, __ATOMIC_ACQUIRE) == f.counter_value) {
        f.counter = nullptr;
        wake(*b, f.linear / WARP, 1u << (f.linear % WARP));
        any = true;
      }
  return any;
}

// The next fiber of this block, or else of those after it; makes its block the current one.
static Fiber* next_anywhere() {
  Residents& r = *block->residents;
  unsigned n = r.block.size(), start = block->seat + (block->eager && n > 1);
  do
    for (unsigned i = 0; i < n; i++) {
      Block& b = *r.block[(start + i) % n];
      if (Fiber* next = next_runnable(b)) {
        block = &b;
        b.current = next;
        return next;
      }
    }
  while (wake_for_counters(r));
  return nullptr;
}

// Leaves the current fiber, which waits or is done, for whoever can run.
static void give_way() {
  Fiber* self = block->current;
  if (Fiber* next = next_anywhere())
    switch_to_fiber(self, *next);
  else
    switch_to_main(*self);
}

void wait_here() {
  Fiber& f = fiber();
  Warp& w = warp();
  f.state = State::waiting;
  w.runnable &= ~(1u << (f.linear % WARP));
  give_way();
  f.state = State::runnable;
}

void wake(Block& b, unsigned w, uint32_t lanes) { b.warp[w].runnable |= lanes & b.warp[w].live; }

// ---- barriers

static unsigned expected_at(const Block& b, const Barrier& r) { return r.expected ? r.expected : b.live; }

static bool complete(Block& b, unsigned id) {
  Barrier& r = b.barrier[id];
  if (r.arrived == 0 || r.arrived < expected_at(b, r)) return false;
  r.result_votes = r.votes;
  r.result_threads = r.arrived;
  r.arrived = r.votes = 0;
  for (unsigned t = 0; t < b.threads; t++) {
    Fiber& f = b.fiber[t];
    if (f.barrier != (int)id) continue;
    f.barrier = -1;
    wake(b, t / WARP, 1u << (t % WARP));
  }
  return true;
}

// Counts the current thread in; true where it has to wait.
static bool enter_barrier(unsigned id, unsigned expected, bool vote, Site site) {
  Block& b = *block;
  if (id >= BARRIERS) fault(site, "barrier %u; there are %d", id, BARRIERS);
  if (expected % WARP || expected > b.threads) fault(site, "%u threads expected in a block of %u", expected, b.threads);
  fiber().site = site;
  Barrier& r = b.barrier[id];
  if (r.arrived == 0) {
    r.site = site;
    r.expected = expected;
  } else if (id == 0 && (r.site.line != site.line || strcmp(r.site.file, site.file))) {
    fault(site, "%u of %u threads already wait at another one, %s:%d; all threads of a block must meet the same",
          r.arrived, b.live, file_name(r.site.file), r.site.line);
  } else if (r.expected != expected) {
    fault(site, "barrier %u expects %u threads here and %u at %s:%d", id, expected, r.expected, file_name(r.site.file),
          r.site.line);
  }
  r.arrived++;
  r.votes += vote;
  return !complete(b, id);
}

Votes barrier(unsigned id, unsigned expected, bool vote, Site site) {
  if (enter_barrier(id, expected, vote, site)) {
    fiber().barrier = (int)id;
    wait_here();
  }
  const Barrier& r = block->barrier[id];
  return {r.result_votes, r.result_threads};
}

void barrier_arrive(unsigned id, unsigned expected, Site site) { enter_barrier(id, expected, false, site); }

// ---- warp collectives

static void finish_group(Block& b, unsigned w, int g) {
  Warp& warp = b.warp[w];
  Group group = warp.group[g];
  warp.group[g] = warp.group[--warp.groups];
  b.current->site = group.site;  // of whoever completes it, which may be a thread that leaves
  if (group.combine) group.combine(warp.lane_data, group.arrived);
  wake(b, w, group.arrived);
}

void collective(uint32_t mask, void* data, void (*combine)(void* const*, uint32_t), Site site) {
  Block& b = *block;
  Warp& w = warp();
  unsigned l = lane(), number = fiber().linear / WARP;
  fiber().site = site;
  if (!(mask >> l & 1)) fault(site, "lane %u is not in its own mask %08x", l, mask);
  int g = 0;
  while (g < w.groups && w.group[g].mask != mask) g++;
  // Overlapping masks may stand side by side: lanes that ran ahead wait for those that still meet in a smaller group. Masks
  // that never come together end as a deadlock.
  if (g == w.groups) w.group[w.groups++] = Group{mask, 0, site, combine};
  Group& group = w.group[g];
  if (group.combine != combine || strcmp(group.site.what, site.what))
    fault(site, "lanes %08x of the same mask wait at another collective, %s:%d (%s)", group.arrived,
          file_name(group.site.file), group.site.line, group.site.what);
  group.arrived |= 1u << l;
  w.lane_data[l] = data;
  if (group.arrived == (mask & w.live))
    finish_group(b, number, g);
  else
    wait_here();
}

// ---- shared memory

#ifdef CUHOST_ASAN
// The gaps between SHARED arrays and behind dynamic shared memory are out of bounds for AddressSanitizer too.
static void forbid(void* at, size_t bytes) { __asan_poison_memory_region(at, bytes); }
static void allow(void* at, size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
static void forbid(void*, size_t) {}
static void allow(void*, size_t) {}
#endif

void* static_shared(const void* declaration, size_t bytes, Site site) {
  Block& b = *block;
  for (const SharedSlot& s : b.slot)
    if (s.site == declaration) return b.static_shared + s.offset;
  size_t offset = b.static_used, taken = (bytes + 15) / 16 * 16 + CANARY;
  if (offset + taken > MAX_STATIC_SHARED) fault(site, "more than %zu bytes of static shared memory", MAX_STATIC_SHARED);
  b.static_used += taken;
  b.slot.push_back({declaration, offset, bytes});
  forbid(b.static_shared + offset + bytes, taken - bytes);
  return b.static_shared + offset;
}

static bool untouched(const unsigned char* from, const unsigned char* to) {
  return std::all_of(from, to, [](unsigned char c) { return c == POISON; });
}

// ---- asynchronous copies

static void land(const Copy& c) {
  memcpy(c.to, c.from, c.bytes_read);
  memset((char*)c.to + c.bytes_read, 0, c.bytes - c.bytes_read);
}

void copy_async(void* to, const void* from, unsigned bytes, unsigned bytes_read, Site site) {
  if (((uintptr_t)to | (bytes_read ? (uintptr_t)from : 0)) % bytes)
    fault(site, "misaligned: %u bytes from %p to %p", bytes, from, to);
  if (bytes_read > bytes) fault(site, "%u of %u bytes to read", bytes_read, bytes);
  Copy c{to, from, (uint16_t)bytes, (uint16_t)bytes_read};
  fiber().site = site;
  if (block->eager)
    land(c);
  else
    fiber().open.push_back(c);
}

void copy_commit() {
  Fiber& f = fiber();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void copy_wait(unsigned groups_left) {
  auto& groups = fiber().groups;
  while (groups.size() > groups_left) {
    for (const Copy& c : groups.front()) land(c);
    groups.erase(groups.begin());
  }
}

// ---- blocks

static void leave() {
  Block& b = *block;
  Fiber& f = *b.current;
  unsigned number = f.linear / WARP;
  Warp& w = b.warp[number];
  if (const char* what = unfinished(f, w)) fault({what, nullptr, 0}, "the thread returns while it is in flight");
  f.state = State::done;
  b.live--;
  w.live &= ~(1u << (f.linear % WARP));
  w.runnable &= w.live;
  // A thread that has left is no longer waited for.
  for (int g = 0; g < w.groups;)
    if ((w.group[g].mask & w.live) && w.group[g].arrived == (w.group[g].mask & w.live))
      finish_group(b, number, g);
    else
      g++;
  if (b.live) complete(b, 0);
  give_way();
  __builtin_unreachable();
}

static void entry() {
  entered(*block->current);
  block->launch->kernel->call(block->launch->arguments);
  leave();
}

// Who waits where, equal sites together.
static void report_deadlock(Block& b) {
  char text[1536];
  int used = snprintf(text, sizeof text, "deadlock in block (%u,%u,%u), %u of %u threads live:", b.index.x, b.index.y,
                      b.index.z, b.live, b.threads);
  for (unsigned t = 0; t < b.threads && used < (int)sizeof text - 160;) {
    const Fiber& f = b.fiber[t];
    unsigned last = t;
    auto same = [&](const Fiber& o) {
      return o.state == f.state && (f.state == State::done || (o.site.line == f.site.line && o.site.what == f.site.what));
    };
    while (last + 1 < b.threads && same(b.fiber[last + 1])) last++;
    used += snprintf(text + used, sizeof text - used, " threads %u..%u ", t, last);
    if (f.state == State::done)
      used += snprintf(text + used, sizeof text - used, "have returned;");
    else
      used += snprintf(text + used, sizeof text - used, "wait at %s:%d (%s);", file_name(f.site.file), f.site.line,
                       f.site.what);
    t = last + 1;
  }
  report(b.launch, text);
}

static size_t rounded_dynamic(const Block& b) { return (b.launch->shared_bytes + 1023) / 1024 * 1024; }

// Block number n of the launch, with all its threads at their start.
static void start_block(Block& b, uint64_t n, bool dirty) {
  b.index = {unsigned(n % b.grid.x), unsigned(n / b.grid.x % b.grid.y), unsigned(n / ((uint64_t)b.grid.x * b.grid.y))};
  size_t dynamic = b.launch->shared_bytes, rounded = rounded_dynamic(b);
  allow(b.dynamic_shared, rounded);
  allow(b.static_shared, b.static_used);
  memset(b.dynamic_shared, POISON, rounded);
  memset(b.static_shared, POISON, b.static_used);
  forbid(b.dynamic_shared + dynamic, rounded - dynamic);
  b.static_used = 0;
  b.slot.clear();
  b.mbarrier.clear();
  b.live = b.threads;
  b.current = nullptr;
  memset(b.barrier, 0, sizeof b.barrier);
  for (unsigned w = 0; w < b.warps; w++) {
    unsigned lanes = std::min<unsigned>(WARP, b.threads - w * WARP);
    Warp& warp = b.warp[w];
    warp.live = warp.runnable = lanes == WARP ? ~0u : (1u << lanes) - 1;
    warp.groups = 0;
    warp.fenced = false;
    warp.products.clear();
    warp.product_groups.clear();
  }
  for (unsigned t = 0; t < b.threads; t++) {
    Fiber& f = b.fiber[t];
    f.thread = {t % b.dim.x, t / b.dim.x % b.dim.y, t / (b.dim.x * b.dim.y)};
    f.linear = (int)t;
    f.state = State::runnable;
    f.barrier = -1;
    f.mbarrier = nullptr;
    f.counter = nullptr;
    f.site = Site{nullptr, nullptr, 0};
    f.open.clear();
    f.groups.clear();
    f.outgoing.clear();
    f.outgoing_groups.clear();
    prepare(f, entry, dirty);
  }
}

// What a block that came to its end wrote where it should not.
static void check_overruns(Block& b) {
  size_t dynamic = b.launch->shared_bytes, rounded = rounded_dynamic(b);
  allow(b.dynamic_shared, rounded);
  allow(b.static_shared, b.static_used);
  char text[160];
  for (const SharedSlot& s : b.slot) {
    const unsigned char* at = b.static_shared + s.offset;
    if (!untouched(at + s.bytes, at + (s.bytes + 15) / 16 * 16 + CANARY)) {
      snprintf(text, sizeof text, "block (%u,%u,%u) wrote past the end of a SHARED array of %zu bytes", b.index.x,
               b.index.y, b.index.z, s.bytes);
      report(b.launch, text);
    }
  }
  if (!untouched(b.dynamic_shared + dynamic, b.dynamic_shared + rounded)) {
    snprintf(text, sizeof text, "block (%u,%u,%u) wrote past the end of its %zu bytes of dynamic shared memory",
             b.index.x, b.index.y, b.index.z, dynamic);
    report(b.launch, text);
  }
}

// Runs the blocks that were started, side by side, to their ends.
static void run_residents(Residents& r, bool& dirty) {
  r.abandoned = false;
  block = r.block[0];
  switch_to_fiber(nullptr, *next_anywhere());
  auto stuck = std::find_if(r.block.begin(), r.block.end(), [](Block* b) { return b->live; });
  dirty = r.abandoned || stuck != r.block.end();
  if (dirty) {
    if (!r.abandoned) report_deadlock(**stuck);
    return;
  }
  for (Block* b : r.block) check_overruns(*b);
}

// Null, or what a GPU would refuse about this launch.
static const char* refusal(const Launch& l) {
  uint64_t threads = (uint64_t)l.block[0] * l.block[1] * l.block[2];
  if (threads == 0 || threads > MAX_THREADS) return "a block has 1 to 1024 threads";
  if (l.block[2] > 64) return "a block's z is at most 64";
  if (l.kernel->max_threads && threads > (uint64_t)l.kernel->max_threads) return "the block is larger than __launch_bounds__";
  if (l.grid[0] > 0x7FFFFFFFu || l.grid[1] > 65535 || l.grid[2] > 65535) return "the grid is too large";
  if (l.shared_bytes > MAX_DYNAMIC_SHARED) return "more than 227 KB of dynamic shared memory";
  if (l.cooperative && (uint64_t)l.grid[0] * l.grid[1] * l.grid[2] > MAX_RESIDENTS)
    return "more blocks of a cooperative launch than fit side by side";
  return nullptr;
}

int run(Launch* launch) {
  if (const char* why = refusal(*launch)) {
    report(launch, why);
    return 1;
  }
  uint64_t blocks = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
  if (launch->next_block.load(std::memory_order_relaxed) >= blocks) return 0;
  watch_faults();
  Block* outer = block;
  const char* error = nullptr;
  // Sets of stacks are few: who needs several takes them while nobody else does.
  static std::mutex several;
  std::unique_lock<std::mutex> alone(several, std::defer_lock);
  if (launch->cooperative) alone.lock();
  std::vector<Block> blocks_here(launch->cooperative ? blocks : 1);
  std::vector<Stacks*> stacks;
  Residents residents = {};
  for (Block& b : blocks_here) {
    b.launch = launch;
    b.dim = dim3(launch->block[0], launch->block[1], launch->block[2]);
    b.grid = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
    b.threads = b.dim.x * b.dim.y * b.dim.z;
    b.warps = (b.threads + WARP - 1) / WARP;
    b.reversed = launch->schedule == REVERSED;
    b.eager = launch->schedule == EAGER;
    Stacks* own = borrow_stacks(b.threads, &error);
    if (!own) break;
    stacks.push_back(own);
    b.fiber.resize(b.threads);
    b.warp.resize(b.warps);
    for (unsigned t = 0; t < b.threads; t++) b.fiber[t].stack = stack_of(own, t);
    b.dynamic_shared = dynamic_arena_end(own) - rounded_dynamic(b);
    b.static_shared = static_arena(own);
    b.static_used = MAX_STATIC_SHARED;
    b.residents = &residents;
    b.seat = residents.block.size();
    residents.block.push_back(&b);
  }
  if (launch->cooperative) alone.unlock();
  if (error) report(launch, error);
  bool dirty = true;
  uint64_t taken = residents.block.size();
  for (uint64_t i; !launch->failed.load(std::memory_order_relaxed) && (i = launch->next_block.fetch_add(taken)) < blocks;) {
    for (Block* b : residents.block) {
      start_block(*b, b->reversed ? blocks - 1 - i : i, dirty);
      i++;
    }
    run_residents(residents, dirty);
  }
  block = outer;
  for (Stacks* s : stacks) return_stacks(s);
  return launch->failed.load() != 0;
}

}  // namespace cuhost
