// runtime.h: the emulated machine. One OS thread runs one block at a time; the block's threads are fibers.
//
// A fiber runs until it meets a barrier or a warp collective that others have not reached; then the next runnable fiber
// of its warp, or else of the next warp, goes on. Nothing is pre-empted, so a run is deterministic, and a wait that can
// never end is seen at once: no fiber is runnable. A fault (deadlock, misalignment, access outside every buffer, ...)
// abandons the block and becomes the launch's error text; the process and the other launches go on.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

// Is AddressSanitizer compiled in? g++ and clang++ say it in different ways.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUHOST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUHOST_ASAN 1
#endif
#ifdef CUHOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuhost {

// Limits of sm_90, the larger of the targets; a launch beyond them fails on every GPU.
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_DYNAMIC_SHARED = 227 << 10, MAX_STATIC_SHARED = 48 << 10;
constexpr int WARP = 32, BARRIERS = 16;
// Blocks of a cooperative launch: the multiprocessors of the emulated GPU.
constexpr uint64_t MAX_RESIDENTS = 4;

// The order in which runnable fibers go, and when a cp.async lands: each hides faults that another shows.
enum Schedule : int32_t {
  LATE = 0,      // warps and lanes ascending; a copy lands at its own thread's wait: shows a missing wait
  REVERSED = 1,  // blocks, warps and lanes descending, late copies: shows dependence on order
  EAGER = 2,     // ascending, warps by turns at every wait; a copy lands when it is issued: shows a buffer overwritten too early
};

struct Launch;

// What the generated code publishes per kernel and activation type; `src/cuda/emulated.rs` holds the same layout.
struct Kernel {
  void (*call)(void* const* arguments);
  int (*run)(Launch*);  // of the image that holds the kernel, so that a kernel loaded at run time brings its own runtime
  int max_threads;      // of __launch_bounds__; 0 = none stated
};

// One kernel launch, shared by the OS threads that run its blocks. Layout as in `src/cuda/emulated.rs`.
struct Launch {
  const Kernel* kernel;
  void* const* arguments;
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  int32_t schedule;
  std::atomic<uint32_t> failed;
  std::atomic<uint64_t> next_block;
  uint64_t fault_address;  // 0, or where an access outside every buffer went
  uint64_t cooperative;    // 1: all blocks live side by side, on one OS thread, and may wait for one another
  char error[1536];
};

// Where a fiber waits, or last waited, in the kernel's source.
struct Site {
  const char* what;
  const char* file;
  int line;
};

struct Copy {
  void* to;
  const void* from;
  uint16_t bytes, bytes_read;  // bytes_read < bytes: the rest is zero
};

// A matrix for tma_load: what CUtensorMap says, in plain numbers. `src/cuda/tensor_map.rs` writes it.
struct TensorMap {
  uint64_t address;
  uint64_t rows, columns;  // elements of two bytes; outside is zero
  uint64_t row_bytes;
  uint64_t box_rows, box_columns;
  uint64_t mark;  // MARK
  uint64_t unused[9];
  static constexpr uint64_t MARK = 0x54454E534F524D50ull;
};

// A box on its way to shared memory.
struct Box {
  unsigned char* to;
  TensorMap map;
  int row, column;
  uint64_t bytes() const { return map.box_rows * map.box_columns * 2; }
};

struct MbarrierState {
  const void* at;
  unsigned expected, pending;
  int64_t bytes;  // expected and not landed
  unsigned phase;
  Site site;
  std::vector<Box> boxes;  // issued and not landed
};

// Shared memory on its way to global memory.
struct Outgoing {
  float* to;
  const float* from;
  unsigned bytes;
  bool add;
};

// A wgmma of one warp: 16 of its warpgroup's 64 rows.
struct Product {
  float* d[32];
  uint32_t fragment[32][4];
  uint64_t a, b;
  int tiles;
  bool from_registers, transposed_a, transposed_b, add;
};

enum class State : uint8_t { runnable, waiting, done };

struct Fiber {
  void* stack_pointer;
  char* stack;  // lowest usable address; a guard page lies below
  void* fake_stack;
  uint3 thread;
  int linear;
  State state;
  int barrier;  // the barrier it waits at, or -1
  Site site;
  std::vector<Copy> open;                 // cp.async issued since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Outgoing> outgoing;
  std::vector<std::vector<Outgoing>> outgoing_groups;
  const void* mbarrier;       // it waits at, or null
  const unsigned* counter;    // it waits for, or null
  unsigned counter_value;
};

// A collective that some of the lanes of `mask` have reached.
struct Group {
  uint32_t mask, arrived;
  Site site;
  void (*combine)(void* const* lane_data, uint32_t mask);
};

struct Warp {
  uint32_t live, runnable;
  int groups;
  Group group[WARP];
  void* lane_data[WARP];
  bool fenced;                    // a wgmma.fence since the last wait
  std::vector<Product> products;  // issued since the last commit
  std::vector<std::vector<Product>> product_groups;
};

struct Barrier {
  unsigned expected, arrived;  // expected 0: every live thread of the block (barrier 0)
  unsigned votes, result_votes, result_threads;
  Site site;
};

struct SharedSlot {
  const void* site;
  size_t offset, bytes;
};

struct Block;

// The blocks that one OS thread runs side by side: one, or all of a cooperative launch.
struct Residents {
  std::vector<Block*> block;
  void* main_stack_pointer;
  void* main_fake_stack;
  bool abandoned;
};

// A block being run, with the stacks and the shared memory that its OS thread borrowed.
struct Block {
  Launch* launch;
  uint3 index;
  dim3 dim, grid;
  unsigned threads, warps, live;
  Fiber* current;
  Residents* residents;
  unsigned seat;  // its index there
  std::vector<Fiber> fiber;
  std::vector<Warp> warp;
  Barrier barrier[BARRIERS];
  unsigned char* dynamic_shared;
  unsigned char* static_shared;
  size_t static_used;
  std::vector<SharedSlot> slot;
  std::vector<MbarrierState> mbarrier;
  bool reversed, eager;
};

// Plain `__thread`: no initialisation check at each use of threadIdx.
extern __thread Block* block;

inline Fiber& fiber() { return *block->current; }
inline int lane() { return block->current->linear % WARP; }
inline Warp& warp() { return block->warp[block->current->linear / WARP]; }

// Takes the launch down with a message that names kernel, block, thread and its source line.
[[noreturn]] void fault(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Barrier `id` for `expected` threads (0: all that live); `vote` is counted into what the barrier returns.
struct Votes {
  unsigned yes, threads;
};
Votes barrier(unsigned id, unsigned expected, bool vote, Site site);
void barrier_arrive(unsigned id, unsigned expected, Site site);

// A warp collective: each lane of `mask` hands in a pointer to its own operands; the last to arrive runs `combine` over
// all of them (every fiber's stack is addressable), then all go on.
void collective(uint32_t mask, void* data, void (*combine)(void* const*, uint32_t), Site site);

// Memory of a `SHARED` declaration: the same for all threads of the block, poisoned before the block starts.
void* static_shared(const void* declaration, size_t bytes, Site site);

// cp.async of the current thread.
void copy_async(void* to, const void* from, unsigned bytes, unsigned bytes_read, Site site);
void copy_commit();
void copy_wait(unsigned groups_left);

// ---- hopper.cpp: twins of ptx_sm90.cuh
uint32_t shared_address(const void* p);
void mbarrier_init(void* at, unsigned arrivals, Site site);
void mbarrier_arrive(void* at, unsigned bytes, Site site);
void mbarrier_wait(void* at, unsigned parity, Site site);
void tma_load(void* to, const TensorMap& map, int row, int column, void* mbarrier, Site site);
void bulk_store(float* to, const float* from, unsigned bytes, bool add, Site site);
void bulk_commit();
void bulk_wait(unsigned groups_left);
void wait_until(const unsigned* counter, unsigned value, Site site);
void set_registers(int registers, Site site);
void wgmma(float* d, int tiles, const uint32_t* fragment, uint64_t a, bool transposed_a, uint64_t b, bool transposed_b, bool add,
           Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(unsigned groups_left, Site site);
// What a thread that leaves has forgotten to wait for, or null.
const char* unfinished(const Fiber& f, const Warp& w);

// ---- the scheduler
void wait_here();  // until someone makes this fiber runnable
void wake(Block& b, unsigned warp, uint32_t lanes);

// Runs blocks of the launch until none is left or one has failed: 0 or 1. Any number of OS threads may call it at once.
int run(Launch* launch);

// ---- fiber.cpp
struct Stacks;  // stacks and shared memory for one OS thread, from a pool
Stacks* borrow_stacks(unsigned threads, const char** error);
void return_stacks(Stacks* stacks);
char* stack_of(Stacks* stacks, unsigned thread);
unsigned char* dynamic_arena_end(Stacks* stacks);
unsigned char* static_arena(Stacks* stacks);
void prepare(Fiber& f, void (*entry)(), bool dirty);
void switch_to_fiber(Fiber* from, Fiber& to);  // from null: the scheduler
void switch_to_main(Fiber& from);
void entered(Fiber& f);  // first thing on a new fiber
void watch_faults();

}  // namespace cuhost
