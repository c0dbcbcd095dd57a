// Matrix products on the processor's tiles (Intel AMX): a tile is 16 rows of 64 bytes, and one instruction multiplies two.
//
// Packed weights and the KV pool have the order of right factors already (`gemm.h`, `cache.h`).
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "gemm.h"

namespace baton {

struct TiledBF16 {
  static constexpr int VALUES = 2;
};

struct TiledI8 {
  static constexpr int VALUES = 4;
};

template <class Op>
constexpr bool TILED = false;
template <>
constexpr bool TILED<TiledBF16> = true;
template <>
constexpr bool TILED<TiledI8> = true;

constexpr int TILE_ROWS = 16;
constexpr int TILE_STEPS = 16;  // lanes along K
constexpr int TILE_BYTES = TILE_ROWS * TILE_STEPS * 4;
constexpr int PANEL_TILE_BYTES = TILE_STEPS * LANE_BYTES;

// Whether this processor has tiles, and the system lets this process use them.
inline bool allow_tiles() {
  constexpr unsigned BF16_TILES = 1u << 22, TILES = 1u << 24, I8_TILES = 1u << 25;
  constexpr unsigned NEEDED = BF16_TILES | TILES | I8_TILES;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
  unsigned eax = 7, ebx, ecx = 0, edx;
  asm("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (edx & NEEDED) == NEEDED && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

// A thread's tiles, until the end of the scope: 0 to 3 are sums, 4 and 5 left factors, 6 and 7 right ones. `Halves`: 5 and 7 multiply
// half as many lanes along K.
template <bool Halves = false>
class Tiles {
 public:
  Tiles() {
    Layout layout;
    for (int i = 0; i < 8; ++i) {
      const bool half = Halves && (i == 5 || i == 7);
      layout.row_bytes[i] = half && i == 5 ? 32 : 64;
      layout.rows[i] = half && i == 7 ? 8 : 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Layout {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

// What was stored before is in memory: GCC's intrinsics do not tell that a tile reads it.
inline void settle() { asm volatile("" : : : "memory"); }

template <int Lines>
inline void ask(const char* at) {
#pragma GCC unroll 32
  for (int i = 0; i < Lines; ++i) _mm_prefetch(at + i * 64, _MM_HINT_T0);
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

}  // namespace baton
