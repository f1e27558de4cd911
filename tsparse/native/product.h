// What product.inc works on, for those that include it.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Matrix {  // entry (i, j) is at[i * row + j * column]; one of the strides is 1
  const float* at;
  int64_t row, column;

  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
  Matrix turned() const { return {at, column, row}; }
};

constexpr int64_t kDepth = 640;  // of the panels: 12 rows of them are 31 of the 48 kB of a first-level cache

// Room for `size` floats at a multiple of 64 bytes, this thread's until it asks for the same `use` again.
template <int use>
float* scratch(int64_t size) {
  thread_local std::vector<float> room;
  if (static_cast<int64_t>(room.size()) < size + 16) room.resize(size + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
}

}  // namespace
