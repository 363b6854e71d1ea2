// Switching stacks: one fibre per GPU thread.
#pragma once
#include <cstddef>

// Save callee-saved registers and the stack pointer in *save; go on where `load` was saved.
extern "C" void msl_fibre_swap(void** save, void* load);

namespace rt {
// A stack pointer that msl_fibre_swap can load: `entry` starts at the top of the stack.
void* new_fibre(char* stack, size_t bytes, void (*entry)());
}  // namespace rt
