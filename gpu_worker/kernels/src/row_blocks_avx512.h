// A linear layer's loops where sums stay in vector registers: blocks of a few rows by some columns.

#pragma once

#include "linear.h"
#include "threads.h"

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

constexpr int kBlockRows = 6;          // as many as have room for their sums in the registers
constexpr int64_t kRowsPerTask = 252;  // their activations stay in the second-level cache

constexpr int64_t num_row_parts(int64_t num_rows) {
  return round_up(num_rows, kRowsPerTask) / kRowsPerTask;
}

// One task: a column block by the rows of a part.
template <class Multiply>
void multiply_part(int64_t task, int64_t num_rows, int64_t num_blocks, const Multiply& multiply) {
  const int64_t block = task % num_blocks, start = task / num_blocks * kRowsPerTask;
  const int64_t end = num_rows < start + kRowsPerTask ? num_rows : start + kRowsPerTask;
  for (int64_t row = start; row < end; row += kBlockRows) {
    switch (end - row) {
      case 1: multiply.template operator()<1>(row, block); break;
      case 2: multiply.template operator()<2>(row, block); break;
      case 3: multiply.template operator()<3>(row, block); break;
      case 4: multiply.template operator()<4>(row, block); break;
      case 5: multiply.template operator()<5>(row, block); break;
      default: multiply.template operator()<kBlockRows>(row, block);
    }
  }
}

// Calls multiply.operator()<number of rows>(first row, column block) for every block of the
// product, on all threads.
template <class Multiply>
void multiply_row_blocks(int64_t num_rows, int64_t num_blocks, const Multiply& multiply) {
  parallel_for(num_blocks * num_row_parts(num_rows), [&](int64_t task) {
    multiply_part(task, num_rows, num_blocks, multiply);
  });
}

// The same where a column block alone is too little to hand out by itself.
template <class Multiply>
void multiply_small_row_blocks(int64_t num_rows, int64_t num_blocks, const Multiply& multiply) {
  parallel_ranges(num_blocks * num_row_parts(num_rows), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      multiply_part(task, num_rows, num_blocks, multiply);
    }
  });
}

}  // namespace
}  // namespace fb
