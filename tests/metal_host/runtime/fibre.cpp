// The switch, for x86-64 and aarch64, ELF and Mach-O.  The C calling convention saves the rest.
#include "fibre.h"

#include <cstdint>
#include <cstring>

#if defined(__APPLE__)
#define SYMBOL "_msl_fibre_swap"
#else
#define SYMBOL "msl_fibre_swap"
#endif

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.globl )" SYMBOL R"(
)" SYMBOL R"(:
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
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 2
.globl )" SYMBOL R"(
)" SYMBOL R"(:
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
)");
#else
#error "write msl_fibre_swap for this CPU"
#endif

namespace rt {

void* new_fibre(char* stack, size_t bytes, void (*entry)()) {
  char* top = stack + (bytes & ~size_t{15});
#if defined(__x86_64__)
  // `ret` pops the entry; it must find the stack 8 bytes off a multiple of 16, as after a call.
  char* sp = top - 8 * sizeof(void*);
  memset(sp, 0, 8 * sizeof(void*));
  void* address = reinterpret_cast<void*>(entry);
  memcpy(sp + 6 * sizeof(void*), &address, sizeof address);
#else
  char* sp = top - 160;
  memset(sp, 0, 160);
  void* address = reinterpret_cast<void*>(entry);
  memcpy(sp + 88, &address, sizeof address);  // x30, where `ret` goes
#endif
  return sp;
}

}  // namespace rt
