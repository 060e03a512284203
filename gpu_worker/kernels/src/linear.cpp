// Choosing a linear layer's kernel by its layout and by what the processor can do.

#include "linear.h"

#include <stdlib.h>

#include "cpu.h"

namespace fb {

void* activations_buffer(size_t size_bytes) {
  static void* memory = nullptr;
  static size_t reserved = 0;
  if (reserved < size_bytes) {
    free(memory);
    reserved = (size_bytes + (1 << 20) - 1) >> 20 << 20;
    if (posix_memalign(&memory, 64, reserved) != 0) abort();
  }
  return memory;
}

}  // namespace fb

using fb::Linear;

namespace {

int64_t packed_bytes(const Linear& shape) {
  const int64_t panel_elements = fb::round_up(shape.n, fb::kPanelColumns) * shape.k;
  switch (shape.layout) {
    case fb::kFloat32Panels: return panel_elements * 4;
    case fb::kBfloat16Panels: return panel_elements * 2;
    case fb::kBfloat16Tiles: return fb::bfloat16_tiles_bytes(shape);
    case fb::kInt16Groups:
    case fb::kInt8Groups: return fb::grouped_packed_bytes(shape);
    case fb::kInt4Groups: return fb::int4_packed_bytes(shape);
  }
  return 0;
}

}  // namespace

extern "C" void fb_linear_packed_bytes(int64_t layout, int64_t n, int64_t k, int64_t* size_bytes) {
  *size_bytes = packed_bytes({static_cast<fb::Layout>(layout), n, k, 1, false, nullptr, nullptr});
}

// Packs `num_rows` rows of the source into n on the calling thread; `packed` is aligned to 64 bytes.
extern "C" void fb_linear_pack(int64_t layout, int64_t n, int64_t k, const void* rows,
                               int64_t element, int64_t row_bytes, int64_t num_rows, int64_t gated,
                               uint8_t* packed) {
  const Linear shape{static_cast<fb::Layout>(layout), n, k, 1, gated != 0, nullptr, nullptr};
  const fb::Source source{rows, static_cast<fb::SourceElement>(element), row_bytes, num_rows,
                          gated != 0};
  switch (shape.layout) {
    case fb::kFloat32Panels:
    case fb::kBfloat16Panels: return fb::pack_panels(shape, source, packed);
    case fb::kBfloat16Tiles: return fb::pack_bfloat16_tiles(shape, source, packed);
    case fb::kInt16Groups:
    case fb::kInt8Groups: return fb::pack_grouped(shape, source, packed);
    case fb::kInt4Groups: return fb::pack_int4(shape, source, packed);
  }
}

extern "C" void fb_linear(int64_t layout, int64_t n, int64_t k, int64_t num_terms,
                          int64_t num_columns, int64_t gated, const uint8_t* packed,
                          const float* bias, const float* x, int64_t m, float* out) {
  const Linear weight{static_cast<fb::Layout>(layout), n, k, num_terms, gated != 0, packed, bias};
  const fb::Rows rows{x, m, out, num_columns};
  if (m == 0) return;
  switch (weight.layout) {
    case fb::kFloat32Panels:
    case fb::kBfloat16Panels: return fb::multiply_panels(weight, rows);
    case fb::kBfloat16Tiles: return fb::multiply_bfloat16_tiles(weight, rows);
    case fb::kInt16Groups: return fb::multiply_grouped(weight, rows);
    case fb::kInt4Groups: return fb::multiply_int4(weight, rows);
    case fb::kInt8Groups:
      // Tiles always compute 16 rows, so VNNI is faster on a few.
      if (fb::isa() >= fb::kAmx && m > 8) return fb::multiply_int8_amx(weight, rows);
      return fb::multiply_grouped(weight, rows);
  }
}
