// Fibers for the emulated machine: a stack each, and a switch from one to the other that makes no system call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SDATTN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SDATTN_ASAN 1
#endif
#endif
#if defined(SDATTN_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__))
#define SDATTN_SWITCHES_BY_HAND 1
#else
#include <ucontext.h>
#endif

#if defined(SDATTN_SWITCHES_BY_HAND)

// Keeps what a call keeps, on the stack that is left. Weak: every translation unit brings it.
extern "C" void sdattn_switch_fiber(void** leaves, void* enters);
#if defined(__x86_64__)
asm(R"(
.pushsection .text
.weak sdattn_switch_fiber
.hidden sdattn_switch_fiber
.type sdattn_switch_fiber, @function
sdattn_switch_fiber:
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
.size sdattn_switch_fiber, . - sdattn_switch_fiber
.popsection
)");
#else
asm(R"(
.pushsection .text
.weak sdattn_switch_fiber
.hidden sdattn_switch_fiber
.type sdattn_switch_fiber, %function
sdattn_switch_fiber:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size sdattn_switch_fiber, . - sdattn_switch_fiber
.popsection
)");
#endif

#endif

namespace sdattn::cuda::emulated {

// Where something runs: a fiber, or the thread that started them.
struct Fiber {
#if defined(SDATTN_SWITCHES_BY_HAND)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  unsigned char* bottom = nullptr;  // of its stack; null until known
  size_t size = 0;
#if defined(SDATTN_ASAN)
  void* fake_stack = nullptr;
#endif
};

// To be called first by whatever was switched to. Where the sanitizer lets us know, `from` learns its stack.
inline void arrived(Fiber& at, Fiber& from) {
#if defined(SDATTN_ASAN)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(at.fake_stack, &bottom, &size);
  if (from.bottom == nullptr) {
    from.bottom = static_cast<unsigned char*>(const_cast<void*>(bottom));
    from.size = size;
  }
#else
  static_cast<void>(at), static_cast<void>(from);
#endif
}

// Goes on in `to`; comes back when somebody switches to `from`. Who leaves for good says so.
inline void switch_fiber(Fiber& from, Fiber& to, bool for_good = false) {
#if defined(SDATTN_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(SDATTN_SWITCHES_BY_HAND)
  sdattn_switch_fiber(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  static_cast<void>(for_good);
  arrived(from, to);
}

// `fiber` will start at `entry`, which calls `arrived` and never returns.
inline void prepare(Fiber& fiber, unsigned char* bottom, size_t size, void (*entry)()) {
  fiber.bottom = bottom;
  fiber.size = size;
#if defined(SDATTN_ASAN)
  fiber.fake_stack = nullptr;
  __asan_unpoison_memory_region(bottom, size);
#endif
#if defined(__x86_64__) && defined(SDATTN_SWITCHES_BY_HAND)
  // Six registers, and where to return to; the stack is as after a call.
  auto** top = reinterpret_cast<void**>(bottom + size) - 2;
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  fiber.stack_pointer = top - 6;
#elif defined(__aarch64__) && defined(SDATTN_SWITCHES_BY_HAND)
  auto** top = reinterpret_cast<void**>(bottom + size - 160);
  top[0] = nullptr;
  top[1] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// Stacks that are kept for the next block, with a page that must not be touched below each.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(int count) {
    if (count <= count_) return;
    release();
    void* memory = mmap(nullptr, count * stride(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    count_ = count;
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * stride(), page_, PROT_NONE);
  }
  void prepare(int i, Fiber& fiber, void (*entry)()) {
    // Not all at the same place of a page: they would meet in the same lines of the cache.
    emulated::prepare(fiber, memory_ + i * stride() + page_, stride() - page_ - (i % 16) * 256, entry);
  }

 private:
#if defined(SDATTN_ASAN)
  static constexpr size_t room = 16 * 65536;
#else
  static constexpr size_t room = 4 * 65536;
#endif
  size_t stride() const { return room + page_; }
  void release() {
    if (memory_ != nullptr) munmap(memory_, count_ * stride());
    memory_ = nullptr;
    count_ = 0;
  }
  unsigned char* memory_ = nullptr;
  int count_ = 0;
  size_t page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
};

}  // namespace sdattn::cuda::emulated
