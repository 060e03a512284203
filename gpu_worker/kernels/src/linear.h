// Linear layers: out (m, n) = x (m, k) * W (n, k) transposed + bias, all float32 but W.
//
// W is packed once, when it is loaded, into blocks of columns (of the output) that a kernel reads
// from front to back. Rows of padding and of columns are zeros.
//
// A gated layer has the gates' and the ups' columns in turns, `kGateColumns` of each, and its
// output is silu(gate) * up: (m, n / 2).

#pragma once

#include <cstddef>
#include <cstdint>

namespace fb {

enum Layout : int64_t {
  kFloat32Panels = 0,
  kBfloat16Panels = 1,
  kBfloat16Tiles = 2,
  kInt16Groups = 3,
  kInt8Groups = 4,
  kInt4Groups = 5,
};

struct Linear {
  Layout layout;
  int64_t n;          // outputs
  int64_t k;          // inputs
  int64_t num_terms;  // of bfloat16 tiles: narrow numbers that each activation is split into
  bool gated;
  const uint8_t* packed;
  const float* bias;  // (n) or null; null if gated
};

struct Rows {
  const float* x;  // (m, k)
  int64_t m;
  float* out;          // (m, num_columns)
  int64_t num_columns;  // n, or of a gated layer the ups without their padding
};

enum SourceElement : int64_t { kSourceFloat32 = 0, kSourceFloat16 = 1, kSourceBfloat16 = 2 };

// The matrix that is packed: (num_rows, k), as it is stored, with `row_bytes` from row to row.
struct Source {
  const void* rows;
  SourceElement element;
  int64_t row_bytes;
  int64_t num_rows;
  bool gated;  // gates over ups, to be packed in turns
};

constexpr int64_t kGateColumns = 16;
constexpr int64_t kPanelColumns = 64;  // of float32 and bfloat16 panels
constexpr int64_t kGroup = 64;         // inputs that share a scale

// Memory for the activations of one call in a kernel's own form. Calls are one at a time.
void* activations_buffer(size_t size_bytes);

// panels_avx512.cpp: weights widened to float32 as they are read.
void pack_panels(const Linear& shape, const Source& source, uint8_t* packed);
void multiply_panels(const Linear& weight, const Rows& rows);

// grouped_avx512.cpp
int64_t grouped_packed_bytes(const Linear& shape);
void pack_grouped(const Linear& shape, const Source& source, uint8_t* packed);
void multiply_grouped(const Linear& weight, const Rows& rows);

// int4_avx512.cpp
int64_t int4_packed_bytes(const Linear& shape);
void pack_int4(const Linear& shape, const Source& source, uint8_t* packed);
void multiply_int4(const Linear& weight, const Rows& rows);

// tiles_amx.cpp
int64_t bfloat16_tiles_bytes(const Linear& shape);
void pack_bfloat16_tiles(const Linear& shape, const Source& source, uint8_t* packed);
void multiply_bfloat16_tiles(const Linear& weight, const Rows& rows);
void multiply_int8_amx(const Linear& weight, const Rows& rows);

namespace {  // each unit its own copy: they are compiled for different processors

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

}  // namespace fb
