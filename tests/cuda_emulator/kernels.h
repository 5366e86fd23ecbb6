// CUDA kernels as C++ for the processor: a block's threads are fibers that take turns at barriers and where a warp acts
// together, in order or in reverse, so that what one reads before another wrote it is wrong in one of the two.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>

#define __global__
#define __launch_bounds__(n)
#define __restrict__
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
using std::max;
using std::min;

struct Place { unsigned x, y, z; };
extern "C" Place t3c_thread, t3c_block;  // of the fiber that runs
#define threadIdx t3c_thread
#define blockIdx t3c_block

[[noreturn]] inline void t3c_fail(const char* what) {
  fprintf(stderr, "emulated CUDA: %s\n", what);
  abort();
}

// Waits for all threads of the block, or for those of the warp.
extern "C" void t3c_wait(int warp_only);
// 16 words for what each lane of the warp of the running thread gives to the others.
extern "C" int (*t3c_slots())[16];

inline void __syncthreads() { t3c_wait(0); }

inline float t3c_exchange(float value, int distance) {
  auto slots = t3c_slots();
  int lane = t3c_thread.x % 32;
  memcpy(slots[lane], &value, 4);
  t3c_wait(1);
  memcpy(&value, slots[lane ^ distance], 4);
  t3c_wait(1);
  return value;
}

inline int t3c_nearest(float value) { return (int)nearbyintf(value); }

template <int count>
inline void t3c_copy(int* to, const int* from) {
  if (((uintptr_t)from | (uintptr_t)to) % (4 * count)) t3c_fail("a copy of words that do not lie aligned");
  memcpy(to, from, 4 * count);
}
inline void t3c_copy1(int* to, const int* from) { t3c_copy<1>(to, from); }
inline void t3c_copy2(int* to, const int* from) { t3c_copy<2>(to, from); }
inline void t3c_copy4(int* to, const int* from) { t3c_copy<4>(to, from); }

// mma.m16n8k32 by PTX's tables of fragments: lane = 4 * group + t. a0 and a2 hold row `group`, a1 and a3 row `group` + 8;
// a0 and a1 columns 4t to 4t + 3, a2 and a3 those 16 further; b0 and b1 the same of column `group`; c0 and c1 are columns
// 2t and 2t + 1 of row `group`, c2 and c3 of row `group` + 8.
inline void t3c_mma(int* c, int a0, int a1, int a2, int a3, int b0, int b1) {
  auto slots = t3c_slots();
  int lane = t3c_thread.x % 32, words[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(slots[lane], words, sizeof words);
  t3c_wait(1);
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      int word = slots[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)];
      int other = slots[column * 4 + k % 16 / 4][4 + k / 16];
      c[i] += (int)(int8_t)(word >> (8 * (k % 4))) * (int8_t)(other >> (8 * (k % 4)));
    }
  }
  t3c_wait(1);
}
