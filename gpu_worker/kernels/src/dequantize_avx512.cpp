// GGML's block formats to float32, bit for bit as gpu_worker/models/ggml_blocks.py, which describes
// them; this is only faster. The compiler vectorizes the loops.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

float half_at(const uint8_t* bytes) {
  uint16_t bits;
  memcpy(&bits, bytes, 2);
  return _cvtsh_ss(bits);
}

void q4_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = static_cast<float>((block[2 + i] & 15) - 8) * scale;
    out[16 + i] = static_cast<float>((block[2 + i] >> 4) - 8) * scale;
  }
}

void q4_1(const uint8_t* block, float* out) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = static_cast<float>(block[4 + i] & 15) * scale + minimum;
    out[16 + i] = static_cast<float>(block[4 + i] >> 4) * scale + minimum;
  }
}

void q8_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  const auto* quants = reinterpret_cast<const int8_t*>(block + 2);
  for (int i = 0; i < 32; ++i) out[i] = static_cast<float>(quants[i]) * scale;
}

void q4_k(const uint8_t* block, float* out) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  const uint8_t* packed = block + 4;
  for (int group = 0; group < 8; ++group) {
    const int i = group & 3;
    const int six_bit_scale =
        group < 4 ? packed[i] & 63 : (packed[8 + i] & 15) | (packed[i] >> 6 << 4);
    const int six_bit_minimum =
        group < 4 ? packed[4 + i] & 63 : packed[8 + i] >> 4 | (packed[4 + i] >> 6 << 4);
    const float group_scale = scale * static_cast<float>(six_bit_scale);
    const float group_minimum = minimum * static_cast<float>(six_bit_minimum);
    const uint8_t* quants = block + 16 + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int k = 0; k < 32; ++k) {
      out[group * 32 + k] = static_cast<float>(quants[k] >> shift & 15) * group_scale - group_minimum;
    }
  }
}

void q6_k(const uint8_t* block, float* out) {
  const float scale = half_at(block + 208);
  const auto* group_scales = reinterpret_cast<const int8_t*>(block + 192);
  for (int group = 0; group < 16; ++group) {
    const int half = group / 8, run = group / 2 % 4, first = group % 2 * 16;
    const uint8_t* lower = block + half * 64 + run % 2 * 32 + first;
    const uint8_t* upper = block + 128 + half * 32 + first;
    const int lower_shift = run / 2 * 4, upper_shift = run * 2;
    const float group_scale = scale * static_cast<float>(group_scales[group]);
    for (int k = 0; k < 16; ++k) {
      const int quant = (lower[k] >> lower_shift & 15) | (upper[k] >> upper_shift & 3) << 4;
      out[group * 16 + k] = static_cast<float>(quant - 32) * group_scale;
    }
  }
}

struct Format {
  int64_t number, block_bytes, block_len;
  void (*decode)(const uint8_t* block, float* out);
};

constexpr Format kFormats[] = {
    {2, 18, 32, q4_0},   {3, 20, 32, q4_1},    {8, 34, 32, q8_0},
    {12, 144, 256, q4_k}, {14, 210, 256, q6_k},
};

}  // namespace

// `number` is what GGUF gives a type of those above. `rows` lie `row_stride` bytes apart, and have
// `row_blocks` blocks each; `out` is contiguous. Works on the calling thread.
extern "C" void fb_dequantize(int64_t number, int64_t num_rows, int64_t row_blocks,
                              int64_t row_stride, const uint8_t* rows, float* out) {
  for (const Format& format : kFormats) {
    if (format.number != number) continue;
    for (int64_t row = 0; row < num_rows; ++row) {
      const uint8_t* block = rows + row * row_stride;
      for (int64_t i = 0; i < row_blocks; ++i) {
        format.decode(block, out);
        block += format.block_bytes;
        out += format.block_len;
      }
    }
  }
}
