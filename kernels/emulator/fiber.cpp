// fiber.cpp: the context switch, the stacks with their guard pages, and what becomes of a segmentation fault in a kernel.
//
// A switch saves the callee-saved registers on the old stack, changes the stack pointer, and restores from the new one:
// a few nanoseconds, no system call. AddressSanitizer is told of every switch, or it would take one fiber's stack for
// another's overflow. A fault inside a fiber does not kill the process: the handler points the interrupted context at
// `landing` on the fiber's own (now abandoned) stack, which reports and leaves for the scheduler.
#include "runtime.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>

extern "C" void cuhost_switch(void** save_stack_pointer, void* to_stack_pointer) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
asm(R"(
.text
.globl cuhost_switch
.hidden cuhost_switch
.type cuhost_switch,@function
cuhost_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuhost_switch,.-cuhost_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl cuhost_switch
.hidden cuhost_switch
.type cuhost_switch,%function
cuhost_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cuhost_switch,.-cuhost_switch
)");
#else
#error "the fiber switch is written for x86-64 and aarch64"
#endif

namespace cuhost {

// Sanitized frames are several times larger.
#ifdef CUHOST_ASAN
static constexpr size_t STACK = 256 << 10;
#else
static constexpr size_t STACK = 64 << 10;
#endif
static constexpr size_t DYNAMIC_ARENA = 256 << 10, STATIC_ARENA = 64 << 10;
// Sets of stacks in use at once: each has two mappings per stack, and Linux grants a process some 65,000.
static constexpr int MAX_SETS = 24;

struct Stacks {
  Stacks* next;
  unsigned threads;
  char* memory;  // shared arenas, then per thread a guard page and a stack; one more guard page at the end
  size_t bytes, page;
};

static std::mutex pool_lock;
static std::condition_variable pool_returned;
static Stacks* pool = nullptr;
static int sets = 0;

static size_t arenas(size_t page) { return DYNAMIC_ARENA + page + STATIC_ARENA; }

static Stacks* map_stacks(unsigned threads, const char** error) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  size_t bytes = arenas(page) + threads * (page + STACK) + page;
  char* m = (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) {
    *error = "out of memory for the stacks of the emulated threads";
    return nullptr;
  }
  bool guarded = mprotect(m + DYNAMIC_ARENA, page, PROT_NONE) == 0 && mprotect(m + bytes - page, page, PROT_NONE) == 0;
  for (unsigned t = 0; t < threads; t++)
    guarded = guarded && mprotect(m + arenas(page) + t * (page + STACK), page, PROT_NONE) == 0;
  if (!guarded) {
    munmap(m, bytes);
    *error = "the system refused guard pages for the stacks of the emulated threads";
    return nullptr;
  }
  return new Stacks{nullptr, threads, m, bytes, page};
}

static void unmap_stacks(Stacks* s) {
#ifdef CUHOST_ASAN
  __asan_unpoison_memory_region(s->memory, s->bytes);
#endif
  munmap(s->memory, s->bytes);
  delete s;
}

Stacks* borrow_stacks(unsigned threads, const char** error) {
  std::unique_lock<std::mutex> lock(pool_lock);
  for (;;) {
    for (Stacks** at = &pool; *at; at = &(*at)->next)
      if ((*at)->threads >= threads) {
        Stacks* s = *at;
        *at = s->next;
        return s;
      }
    if (sets < MAX_SETS) break;
    if (pool) {  // only smaller ones are left: make room for a larger one
      Stacks* s = pool;
      pool = s->next;
      unmap_stacks(s);
      sets--;
      break;
    }
    pool_returned.wait(lock);
  }
  Stacks* s = map_stacks(threads, error);
  sets += s != nullptr;
  return s;
}

void return_stacks(Stacks* s) {
  {
    std::lock_guard<std::mutex> lock(pool_lock);
    s->next = pool;
    pool = s;
  }
  pool_returned.notify_one();
}

char* stack_of(Stacks* s, unsigned thread) { return s->memory + arenas(s->page) + thread * (s->page + STACK) + s->page; }
unsigned char* dynamic_arena_end(Stacks* s) { return (unsigned char*)s->memory + DYNAMIC_ARENA; }
unsigned char* static_arena(Stacks* s) { return (unsigned char*)s->memory + DYNAMIC_ARENA + s->page; }

void prepare(Fiber& f, void (*entry)(), bool dirty) {
  (void)dirty;
#ifdef CUHOST_ASAN
  // An abandoned fiber never unwound, and its frames' red zones are still marked; so are the outermost ones of a fiber that has
  // left, since it never returned from there.
  size_t marked = dirty ? STACK : 4096;
  __asan_unpoison_memory_region(f.stack + STACK - marked, marked);
  f.fake_stack = nullptr;
#endif
  void** top = (void**)(f.stack + STACK);
#if defined(__x86_64__)
  *--top = nullptr;  // where a return address would lie: keeps the ABI's alignment, and ends a debugger's backtrace
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
#else
  top -= 20;
  for (int i = 0; i < 20; i++) top[i] = nullptr;
  top[11] = (void*)entry;  // x30
#endif
  f.stack_pointer = top;
}

#ifdef CUHOST_ASAN
// Bounds of this OS thread's own stack, learned when a fiber is first entered from it.
static __thread const void* main_bottom;
static __thread size_t main_size;

static void learn_main_stack() {
  if (main_bottom) return;
  pthread_attr_t attr;
  void* bottom;
  size_t size;
  if (pthread_getattr_np(pthread_self(), &attr) == 0) {
    if (pthread_attr_getstack(&attr, &bottom, &size) == 0) main_bottom = bottom, main_size = size;
    pthread_attr_destroy(&attr);
  }
}
#endif

void switch_to_fiber(Fiber* from, Fiber& to) {
  Block* b = block;
  void** save = from ? &from->stack_pointer : &b->residents->main_stack_pointer;
#ifdef CUHOST_ASAN
  if (!from) learn_main_stack();
  void** fake = from ? &from->fake_stack : &b->residents->main_fake_stack;
  __sanitizer_start_switch_fiber(from && from->state == State::done ? nullptr : fake, to.stack, STACK);
#endif
  cuhost_switch(save, to.stack_pointer);
#ifdef CUHOST_ASAN
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
}

void switch_to_main(Fiber& from) {
  Block* b = block;
#ifdef CUHOST_ASAN
  __sanitizer_start_switch_fiber(from.state == State::done ? nullptr : &from.fake_stack, main_bottom, main_size);
#endif
  cuhost_switch(&from.stack_pointer, b->residents->main_stack_pointer);
#ifdef CUHOST_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered(Fiber& f) {
  (void)f;
#ifdef CUHOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// ---- segmentation faults

#ifdef CUHOST_ASAN
void watch_faults() {}  // AddressSanitizer reports them better
#else

static struct sigaction before[2];
static __thread uintptr_t fault_address;
static __thread char alternate_stack[32 << 10];

static void landing() {
  Fiber& f = fiber();
  uintptr_t at = fault_address, guard = (uintptr_t)f.stack;
  if (at < guard && at >= guard - (size_t)sysconf(_SC_PAGESIZE)) {
    fault(Site{"stack overflow", f.site.file, f.site.line}, "this thread's local variables exceed %zu KB", STACK >> 10);
  }
  uintptr_t shared_end = (uintptr_t)block->dynamic_shared + (block->launch->shared_bytes + 1023) / 1024 * 1024;
  if (at >= shared_end && at < shared_end + (size_t)sysconf(_SC_PAGESIZE))
    fault(Site{"dynamic shared memory", f.site.file, f.site.line}, "byte %zu of %zu",
          (size_t)(at - (uintptr_t)block->dynamic_shared), (size_t)block->launch->shared_bytes);
  uint64_t none = 0;
  __atomic_compare_exchange_n(&block->launch->fault_address, &none, at, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  fault(Site{"access outside every buffer", f.site.file, f.site.line}, "address %p%s", (void*)at,
        f.site.file ? " (the line is that of the last wait before it)" : "");
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  if (!block || !block->current) {
    const struct sigaction& old = before[signal == SIGBUS];
    if (old.sa_flags & SA_SIGINFO)
      old.sa_sigaction(signal, info, context);
    else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN)
      old.sa_handler(signal);
    else
      sigaction(signal, &old, nullptr);  // the instruction faults again, and the system's default ends the process
    return;
  }
  fault_address = (uintptr_t)info->si_addr;
  mcontext_t& m = ((ucontext_t*)context)->uc_mcontext;
  uintptr_t top = (uintptr_t)block->current->stack + STACK;
#if defined(__x86_64__)
  m.gregs[REG_RSP] = (greg_t)(top - 8);
  m.gregs[REG_RIP] = (greg_t)&landing;
#else
  m.sp = top;
  m.pc = (uintptr_t)&landing;
#endif
}

void watch_faults() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before[0]);
    sigaction(SIGBUS, &action, &before[1]);
  });
  stack_t now;
  if (sigaltstack(nullptr, &now) == 0 && (now.ss_flags & SS_DISABLE)) {
    stack_t mine = {};
    mine.ss_sp = alternate_stack;
    mine.ss_size = sizeof alternate_stack;
    sigaltstack(&mine, nullptr);
  }
}
#endif

}  // namespace cuhost
