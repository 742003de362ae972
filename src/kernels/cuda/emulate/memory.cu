// Device memory for tests, and how launches are made and reported; see block.h.
#include "../device.h"

// Bytes that nobody has written are NaN, and beyond the end is a fault.
extern "C" void* emulated_memory(size_t bytes, const char* name) { return new emulate::Pages(name, bytes); }
extern "C" void* emulated_address(void* memory) { return static_cast<emulate::Pages*>(memory)->begin; }
extern "C" void emulated_free(void* memory) { delete static_cast<emulate::Pages*>(memory); }
// 0: threads and blocks take turns forwards, 1: backwards, 2: shuffled. For launches of the calling OS thread.
extern "C" void emulated_order(int order) { emulate::order = emulate::Order(order); }
// Of the calling OS thread's last launch, where it did not return 0.
extern "C" const char* emulated_error() { return launch_error(); }
