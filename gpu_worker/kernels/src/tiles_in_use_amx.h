// Setting up the tile registers: eight of them, each of 16 rows of 64 bytes.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fb {
namespace {  // each unit its own copy: they are compiled for different processors

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are set up while this lives: a thread that has them in use is dearer to switch.
struct TilesInUse {
  TilesInUse() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TilesInUse() { _tile_release(); }
};

}  // namespace
}  // namespace fb
