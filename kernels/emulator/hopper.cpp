// hopper.cpp: twins of what Hopper adds: barriers that count bytes, tensor copies, products of a warpgroup, bulk stores.
//
// As with cp.async, each schedule shows faults that another hides. Late (and reversed): a box lands when somebody waits for its
// mbarrier and nothing else is missing, a product is computed when its group is waited for, with the shared memory of that moment,
// and a bulk store reads shared memory at its wait. Eager: all of it at once. Not modelled: a missing async_fence, since nobody sees
// plain writes here; registers.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace cuhost {

// Shared memory starts behind the kilobyte that the system keeps for itself, so that no address is zero.
static constexpr uint32_t SHARED_BASE = 1024;

uint32_t shared_address(const void* p) {
  size_t offset = (const unsigned char*)p - block->dynamic_shared;
  if (offset >= block->launch->shared_bytes)
    fault({"shared address", nullptr, 0}, "%p is not in the block's dynamic shared memory", p);
  return SHARED_BASE + (uint32_t)offset;
}

static unsigned char* shared_bytes_at(uint32_t address, unsigned bytes, Site site) {
  uint64_t offset = (uint64_t)address - SHARED_BASE;
  if (address < SHARED_BASE || offset + bytes > block->launch->shared_bytes)
    fault(site, "bytes %lld to %lld of %llu bytes of dynamic shared memory", (long long)offset, (long long)offset + bytes,
          (unsigned long long)block->launch->shared_bytes);
  return block->dynamic_shared + offset;
}

static uint32_t swizzle(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// ---- mbarriers

static MbarrierState& mbarrier_of(const void* at, Site site) {
  for (MbarrierState& m : block->mbarrier)
    if (m.at == at) return m;
  fault(site, "no mbarrier was initialized at %p", at);
}

void mbarrier_init(void* at, unsigned arrivals, Site site) {
  if ((uintptr_t)at % 8) fault(site, "%p is not aligned to 8 bytes", at);
  if (arrivals == 0 || arrivals >= 1u << 20) fault(site, "%u arrivals", arrivals);
  for (MbarrierState& m : block->mbarrier)
    if (m.at == at) fault(site, "the mbarrier at %p is initialized twice", at);
  block->mbarrier.push_back({at, arrivals, arrivals, 0, 0, site, {}});
}

static void land(const Box& b) {
  const TensorMap& map = b.map;
  for (uint64_t r = 0; r < map.box_rows; r++)
    for (uint64_t c = 0; c < map.box_columns; c++) {
      int64_t row = b.row + (int64_t)r, column = b.column + (int64_t)c;
      uint16_t value = 0;
      if (row >= 0 && column >= 0 && (uint64_t)row < map.rows && (uint64_t)column < map.columns)
        memcpy(&value, (const char*)map.address + row * map.row_bytes + column * 2, 2);
      uint32_t at = swizzle((uint32_t)(r * map.box_columns + c) * 2);  // b.to is at a 1024-byte boundary
      memcpy(b.to + at, &value, 2);
    }
}

// Ends the phase if everything it counts is there; what has been issued may land for it now.
static bool end_phase(MbarrierState& m, bool now) {
  if (m.pending) return false;
  if (now) {
    for (const Box& b : m.boxes) land(b), m.bytes -= (int64_t)b.bytes();
    m.boxes.clear();
  }
  if (m.bytes) return false;
  m.phase++;
  m.pending = m.expected;
  for (Fiber& f : block->fiber)
    if (f.mbarrier == m.at) {
      f.mbarrier = nullptr;
      wake(*block, f.linear / WARP, 1u << (f.linear % WARP));
    }
  return true;
}

static bool awaited(const MbarrierState& m) {
  return std::any_of(block->fiber.begin(), block->fiber.end(), [&](const Fiber& f) { return f.mbarrier == m.at; });
}

void mbarrier_arrive(void* at, unsigned bytes, Site site) {
  MbarrierState& m = mbarrier_of(at, site);
  if (m.pending == 0 && !end_phase(m, true))
    fault(site, "one arrival more than the %u of the phase, which still misses %lld bytes", m.expected, (long long)m.bytes);
  m.site = site;
  m.bytes += bytes;
  m.pending--;
  end_phase(m, block->eager || awaited(m));
}

void mbarrier_wait(void* at, unsigned parity, Site site) {
  if (parity > 1) fault(site, "parity %u", parity);
  fiber().site = site;
  for (;;) {
    MbarrierState& m = mbarrier_of(at, site);
    if ((m.phase & 1) != parity) return;
    if (end_phase(m, true)) continue;
    fiber().mbarrier = at;
    wait_here();
  }
}

void tma_load(void* to, const TensorMap& map, int row, int column, void* mbarrier, Site site) {
  if (map.mark != TensorMap::MARK) fault(site, "this is no tensor map");
  if (map.box_columns * 2 != 128) fault(site, "a box of %llu columns; the swizzle wants 64", (unsigned long long)map.box_columns);
  uint32_t address = shared_address(to);
  if (address % 1024) fault(site, "the swizzled box is not at a 1024-byte boundary of shared memory");
  MbarrierState& m = mbarrier_of(mbarrier, site);
  Box box{(unsigned char*)to, map, row, column};
  shared_bytes_at(address, (unsigned)box.bytes(), site);
  if (block->eager) {
    land(box);
    m.bytes -= (int64_t)box.bytes();
    end_phase(m, true);
    return;
  }
  m.boxes.push_back(box);
  end_phase(m, awaited(m));
}

// ---- bulk stores

static void send(const Outgoing& o) {
  if (o.add)
    for (unsigned i = 0; i < o.bytes / 4; i++) o.to[i] += o.from[i];
  else
    memcpy(o.to, o.from, o.bytes);
}

void bulk_store(float* to, const float* from, unsigned bytes, bool add, Site site) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) % 16) fault(site, "misaligned: %u bytes from %p to %p", bytes, from, to);
  shared_bytes_at(shared_address(from), bytes, site);
  fiber().site = site;
  Outgoing o{to, from, bytes, add};
  if (block->eager)
    send(o);
  else
    fiber().outgoing.push_back(o);
}

void bulk_commit() {
  Fiber& f = fiber();
  f.outgoing_groups.push_back(std::move(f.outgoing));
  f.outgoing.clear();
}

void bulk_wait(unsigned groups_left) {
  auto& groups = fiber().outgoing_groups;
  while (groups.size() > groups_left) {
    for (const Outgoing& o : groups.front()) send(o);
    groups.erase(groups.begin());
  }
}

// ---- counters between blocks

void wait_until(const unsigned* counter, unsigned value, Site site) {
  if (!block->launch->cooperative) fault(site, "blocks wait for one another in cooperative launches alone");
  Fiber& f = fiber();
  f.site = site;
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) != value) {
    f.counter = counter;
    f.counter_value = value;
    wait_here();
  }
  f.counter = nullptr;
}

// ---- products

static void nothing(void* const*, uint32_t) {}

void set_registers(int, Site site) { collective(0xFFFFFFFFu, nullptr, nothing, site); }

// Where element (row, k) of a descriptor's matrix lies: 8 consecutive elements along the inner dimension share a chunk.
struct Operand {
  uint32_t address, leading, stride;
  bool transposed;
  Operand(uint64_t d, bool transposed, Site site)
      : address((d & 0x3FFF) << 4), leading((d >> 16 & 0x3FFF) << 4), stride((d >> 32 & 0x3FFF) << 4), transposed(transposed) {
    if (d >> 62 != 1) fault(site, "a descriptor without the 128-byte swizzle");
  }
  // Eight elements: (outer, inner..inner+8).
  const uint16_t* chunk(int outer, int inner, Site site) const {
    uint32_t at = address + (uint32_t)outer / 8 * stride + (uint32_t)outer % 8 * 128 + (uint32_t)inner / 64 * leading +
                  (uint32_t)inner % 64 * 2;
    return (const uint16_t*)shared_bytes_at(swizzle(at), 16, site);
  }
};

static float widen(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}

static void compute(const Product& p, int quarter, Site site) {
  const int columns = p.tiles * 8;
  static thread_local float a[16][16], b[16][256], d[16][256];
  if (p.from_registers) {
    for (int l = 0; l < WARP; l++)
      for (int i = 0; i < 4; i++) {
        int row = l / 4 + i % 2 * 8, k = l % 4 * 2 + i / 2 * 8;
        a[row][k] = widen((uint16_t)p.fragment[l][i]);
        a[row][k + 1] = widen((uint16_t)(p.fragment[l][i] >> 16));
      }
  } else {
    Operand left(p.a, p.transposed_a, site);
    for (int outer = 0; outer < 16; outer++)
      for (int inner = 0; inner < 16; inner += 8) {
        const uint16_t* from =
            p.transposed_a ? left.chunk(outer, quarter * 16 + inner, site) : left.chunk(quarter * 16 + outer, inner, site);
        for (int i = 0; i < 8; i++) (p.transposed_a ? a[inner + i][outer] : a[outer][inner + i]) = widen(from[i]);
      }
  }
  Operand right(p.b, p.transposed_b, site);
  if (p.transposed_b) {
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < columns; n += 8) {
        const uint16_t* from = right.chunk(k, n, site);
        for (int i = 0; i < 8; i++) b[k][n + i] = widen(from[i]);
      }
  } else {
    for (int n = 0; n < columns; n++)
      for (int k = 0; k < 16; k += 8) {
        const uint16_t* from = right.chunk(n, k, site);
        for (int i = 0; i < 8; i++) b[k + i][n] = widen(from[i]);
      }
  }
  auto element = [&](int l, int i) -> float& { return d[l / 4 + i % 4 / 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2]; };
  for (int l = 0; l < WARP; l++)
    for (int i = 0; i < p.tiles * 4; i++) element(l, i) = p.add ? p.d[l][i] : 0.0f;
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++) {
      float x = a[r][k];
      for (int n = 0; n < columns; n++) d[r][n] += x * b[k][n];
    }
  for (int l = 0; l < WARP; l++)
    for (int i = 0; i < p.tiles * 4; i++) p.d[l][i] = element(l, i);
}

struct WgmmaOperands {
  float* d;
  const uint32_t* fragment;
  uint64_t a, b;
  int tiles;
  bool transposed_a, transposed_b, add;
};

static int quarter() { return block->current->linear / WARP % 4; }
static void all_there(const char* what, uint32_t lanes) {
  if (lanes != ~0u) fault({what, nullptr, 0}, "lanes %08x of the warp take part, not all 32", lanes);
}

static void issue(void* const* data, uint32_t lanes) {
  all_there("wgmma", lanes);
  Warp& w = warp();
  if (!w.fenced) fault({"wgmma", nullptr, 0}, "no wgmma_fence since the last wgmma_wait");
  const WgmmaOperands& first = *static_cast<const WgmmaOperands*>(data[0]);
  Product p = {};
  p.a = first.a, p.b = first.b, p.tiles = first.tiles, p.from_registers = first.fragment, p.add = first.add;
  p.transposed_a = first.transposed_a, p.transposed_b = first.transposed_b;
  for (int l = 0; l < WARP; l++) {
    const WgmmaOperands& o = *static_cast<const WgmmaOperands*>(data[l]);
    if (o.a != p.a || o.b != p.b || o.add != p.add) fault({"wgmma", nullptr, 0}, "lane %d has other operands than lane 0", l);
    p.d[l] = o.d;
    if (o.fragment) memcpy(p.fragment[l], o.fragment, 16);
  }
  if (block->eager)
    compute(p, quarter(), {"wgmma", nullptr, 0});
  w.products.push_back(p);
}

void wgmma(float* d, int tiles, const uint32_t* fragment, uint64_t a, bool transposed_a, uint64_t b, bool transposed_b, bool add,
           Site site) {
  if (tiles > 32) fault(site, "%d columns; at most 256", tiles * 8);
  if (block->threads % 128) fault(site, "a block of %u threads is no whole number of warpgroups", block->threads);
  WgmmaOperands operands{d, fragment, a, b, tiles, transposed_a, transposed_b, add};
  collective(~0u, &operands, issue, site);
}

static void fence(void* const*, uint32_t lanes) {
  all_there("wgmma.fence", lanes);
  warp().fenced = true;
}
void wgmma_fence(Site site) { collective(~0u, nullptr, fence, site); }

static void commit(void* const*, uint32_t lanes) {
  all_there("wgmma.commit_group", lanes);
  Warp& w = warp();
  w.product_groups.push_back(std::move(w.products));
  w.products.clear();
}
void wgmma_commit(Site site) { collective(~0u, nullptr, commit, site); }

static void wait(void* const* data, uint32_t lanes) {
  all_there("wgmma.wait_group", lanes);
  Warp& w = warp();
  while (w.product_groups.size() > *static_cast<const unsigned*>(data[0])) {
    if (!block->eager)
      for (const Product& p : w.product_groups.front()) compute(p, quarter(), {"wgmma", nullptr, 0});
    w.product_groups.erase(w.product_groups.begin());
  }
  w.fenced = false;
}
void wgmma_wait(unsigned groups_left, Site site) { collective(~0u, &groups_left, wait, site); }

const char* unfinished(const Fiber& f, const Warp& w) {
  if (!f.outgoing.empty() || !f.outgoing_groups.empty()) return "a bulk store";
  if (!w.products.empty() || !w.product_groups.empty()) return "a wgmma";
  return nullptr;
}

}  // namespace cuhost
