// Includes INSTRUCTIONS, the name of a file, once for each instruction set, with ISA (a namespace), TARGET (the functions'
// target attribute) and LANES (floats of a vector). BEST(level, name) is what the file calls so, of `best_level(level)`.
#pragma once

#include "machine.h"

#if defined(__x86_64__)
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define LANES 16
#include INSTRUCTIONS
#undef ISA
#undef TARGET
#undef LANES
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#include INSTRUCTIONS
#undef ISA
#undef TARGET
#undef LANES
#define BEST(level, name)                            \
  (best_level(level) == kAvx512  ? avx512::name      \
   : best_level(level) == kAvx2 ? avx2::name         \
                                : portable::name)
#else
#define BEST(level, name) (portable::name)
#endif
#define ISA portable
#define TARGET
#define LANES 4
#include INSTRUCTIONS
