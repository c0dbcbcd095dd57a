// Matrix products over packed weights, by outer products of 32-bit lanes.
//
// A weight matrix [N, K] is kept in panels of 32 outputs. A lane holds one float32, two bfloat16 or four 8-bit values that follow
// each other along K; a panel holds, lane by lane along K, those of its 32 outputs:
//
//     [panel][K / values in a lane][32 outputs]
//
// Rows of the other factor are plain, along K. Each output is summed along K in one fixed order, whatever the number of rows, the
// tile or the thread: a row's result depends on nothing but the row.
#pragma once

#include "team.h"
#include "vector.h"

namespace baton {

constexpr int PANEL = 32;
constexpr int LANE_BYTES = 4 * PANEL;
constexpr int GROUP = 128;          // values along K that share a scale, in 8-bit formats; what is left of K may be a smaller one
constexpr int GROUP_STEPS = GROUP / 4;

// Lanes of `k` 8-bit values, in whole cache lines.
constexpr int64_t lanes_of_bytes(int64_t k) { return (k + 63) / 64 * 16; }

constexpr int groups_of(int steps) { return (steps + GROUP_STEPS - 1) / GROUP_STEPS; }

struct Matrix {
  const char* data;
  const uint16_t* scales;  // [panel][group][32], float16; 8-bit formats only
  const float* bias;       // [n], or none
  int32_t n;
  int32_t steps;  // lanes along K

  int panels() const { return (n + PANEL - 1) / PANEL; }
};

// The left factor: rows of lanes, and in 8-bit formats what each group was scaled by and the start of its sums.
struct Rows {
  const char* data;
  const float* scales;    // [row][group]
  const int32_t* starts;  // [row][group]
  int32_t steps;

  size_t row_bytes() const { return (size_t)steps * 4; }
  int groups() const { return groups_of(steps); }
  Rows from(int64_t row) const {
    return {data + row * row_bytes(), scales ? scales + row * groups() : nullptr,
            starts ? starts + row * groups() : nullptr, steps};
  }
};

struct F32 {
  static constexpr int VALUES = 1;
  static __m512 fma(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

struct BF16 {
  static constexpr int VALUES = 2;
  static __m512 fma(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};

struct I8 {
  static constexpr int VALUES = 4;
};

// One tile: MR rows by NP panels, over lanes [first, last). `out` [MR][NP * 32] holds the sums up to `first`, and then up to `last`.
// Weights to be used later are asked of memory: at `soon`, `stride` bytes further with each lane.
template <class Op, int MR, int NP>
struct Tile {
  static void run(Rows a, const char* b, const uint16_t*, size_t panel_bytes, int first, int last, const char* soon, size_t stride,
                  float* out) {
    constexpr int NV = 2 * NP;
    __m512 sum[MR][NV];
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v)
        sum[m][v] = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + (m * NV + v) * 16);
    const size_t row_bytes = a.row_bytes();
#pragma GCC unroll 2
    for (int s = first; s < last; ++s, soon += stride) {
      __m512i w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const size_t from = (v / 2) * panel_bytes + (v % 2) * 64;
        w[v] = _mm512_loadu_si512(b + from + (size_t)s * 128);
        _mm_prefetch(soon + from, _MM_HINT_T0);
      }
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m) {
        int32_t lane;
        std::memcpy(&lane, a.data + m * row_bytes + (size_t)s * 4, 4);
        const __m512i x = _mm512_set1_epi32(lane);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = Op::fma(sum[m][v], x, w[v]);
      }
    }
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + (m * NV + v) * 16, sum[m][v]);
  }
};

// 8-bit: integer sums within a group stay in registers, and are then scaled into the float32 sums, which wait in the first cache.
// Weights are stored with 128 added, since the instruction wants one factor unsigned; a group's sum starts at -128 times the sum of
// the row's values, which takes that back.
template <int MR, int NP, _mm_hint Hint>
struct TileI8 {
  static void run(Rows a, const char* b, const uint16_t* scales, size_t panel_bytes, int first, int last, const char* soon,
                  size_t stride, float* out) {
    constexpr int NV = 2 * NP;
    if (first == 0)
      for (int i = 0; i < MR * NV; ++i) _mm512_storeu_ps(out + i * 16, _mm512_setzero_ps());
    const size_t row_bytes = a.row_bytes();
    const int groups = a.groups();
    for (int g = first / GROUP_STEPS; g < groups_of(last); ++g) {
      const int steps = std::min(GROUP_STEPS, last - g * GROUP_STEPS);
      __m512i dot[MR][NV];
#pragma GCC unroll 12
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) dot[m][v] = _mm512_set1_epi32(a.starts[m * groups + g]);
      // A row's address is that of every third row and its distance from it: twelve of their own do not fit into registers.
      constexpr int THIRDS = (MR + 2) / 3;
      const char* x[THIRDS];
      for (int i = 0; i < THIRDS; ++i) x[i] = a.data + 3 * i * row_bytes + (size_t)g * GROUP;
      const char* at = b + (size_t)g * GROUP * PANEL;
#pragma GCC unroll 1
      for (int s = 0; s < steps; ++s, at += 128, soon += stride) {
        __m512i w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          const size_t from = (v / 2) * panel_bytes + (v % 2) * 64;
          w[v] = _mm512_loadu_si512(at + from);
          _mm_prefetch(soon + from, Hint);
        }
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          int32_t lane;
          std::memcpy(&lane, x[m / 3] + m % 3 * row_bytes, 4);
          const __m512i values = _mm512_set1_epi32(lane);
          // GCC 12 copies and spills the sums of the intrinsic.
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(dot[m][v]) : "v"(w[v]), "v"(values));
        }
#pragma GCC unroll 4
        for (int i = 0; i < THIRDS; ++i) {
          x[i] += 4;
          asm("" : "+r"(x[i]));  // keeps it the one that is counted up
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const uint16_t* of = scales + ((size_t)(v / 2) * groups + g) * PANEL + (v % 2) * 16;
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)of));
#pragma GCC unroll 12
        for (int m = 0; m < MR; ++m) {
          const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(a.scales[m * groups + g]));
          float* sum = out + (m * NV + v) * 16;
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][v]), both, _mm512_loadu_ps(sum)));
          asm("" ::: "memory");  // holds no sum in a register from group to group: those are needed
        }
      }
    }
  }
};

template <int MR, int NP>
struct Tile<I8, MR, NP> : TileI8<MR, NP, _MM_HINT_T0> {};

using TileFn = void (*)(Rows, const char*, const uint16_t*, size_t, int, int, const char*, size_t, float*);

// How many rows by panels a tile's sums leave registers for.
template <class Op>
constexpr int MOST_SUMS = 12;

// As many of them keep the arithmetic busy; more streams of 8-bit weights, with their scales, would only slow memory down.
template <class Op>
constexpr int BUSY = MOST_SUMS<Op>;
template <>
constexpr int BUSY<I8> = 6;

template <class Op, int NP, int MR = 1>
TileFn tile_of(int rows) {
  if (rows == MR) return &Tile<Op, MR, NP>::run;
  if constexpr (MR < MOST_SUMS<Op> / NP) return tile_of<Op, NP, MR + 1>(rows);
  return nullptr;
}

template <class Op>
TileFn tile(int rows, int panels) {
  switch (panels) {
    case 1: return tile_of<Op, 1>(rows);
    case 2: return tile_of<Op, 2>(rows);
    case 3: return tile_of<Op, 3>(rows);
    default: return tile_of<Op, 4>(rows);
  }
}

// What a block of finished sums is given to: rows [first, first + rows) and panels [panel, panel + panels), as [rows][panels * 32].
// Called once for every block, by the thread that computed it.
constexpr int MOST_ROWS = 192;    // of a block
constexpr int MOST_PANELS = 4;    // of a tile
constexpr int BLOCK_STEPS = 192;  // lanes of a panel that stay in the first cache while many rows pass
constexpr int FEW_TILES = 4;      // wait for memory rather than for arithmetic
constexpr int FEW_STEPS = 128;    // lanes that leave room in the first cache for the next

template <class Op, class Epilogue>
void block(Rows a, int first, int rows, const Matrix& w, int panel, int panels, Epilogue&& finish) {
  alignas(64) float sums[MOST_ROWS * PANEL];
  const size_t panel_bytes = (size_t)w.steps * 4 * PANEL;
  const int groups = groups_of(w.steps);
  while (panels > 0) {
    // The fewer the rows, the more panels keep the arithmetic busy.
    int np = 1;
    if (rows * 2 <= BUSY<Op>) np = std::min({panels, BUSY<Op> / rows, MOST_PANELS});
    if (np == 4 && (panels == 5 || panels == 6)) np = 3;
    const char* b = w.data + panel * panel_bytes;
    const uint16_t* scales = w.scales ? w.scales + (size_t)panel * groups * PANEL : nullptr;
    if (rows <= MOST_SUMS<Op>) {
      // The more rows, the longer a step takes, and the less the memory keeps up by itself.
      const size_t ahead = std::clamp(rows * 1024, 2048, 8192);
      tile<Op>(rows, np)(a.from(first), b, scales, panel_bytes, 0, w.steps, b + ahead, LANE_BYTES, sums);
    } else {
      const int tiles = (rows + MOST_SUMS<Op> - 1) / MOST_SUMS<Op>;
      const int asking = tiles <= FEW_TILES ? tiles : 1;
      const int most = tiles <= FEW_TILES ? FEW_STEPS : BLOCK_STEPS;
      const int parts = (w.steps + most - 1) / most;
      const int length = (w.steps + parts * GROUP_STEPS - 1) / (parts * GROUP_STEPS) * GROUP_STEPS;
      for (int step = 0; step < w.steps; step += length) {
        const int last = std::min(step + length, w.steps);
        const char* here = b + (size_t)step * LANE_BYTES;
        for (int t = 0; t < tiles; ++t) {
          const int from = rows * t / tiles, to = rows * (t + 1) / tiles;
          // Few tiles ask for the next lanes together, at an even rate; of many only the last: they would be gone before their use.
          const int turn = t - (tiles - asking);
          const size_t stride = turn < 0 ? 0 : LANE_BYTES / asking;
          const char* soon = turn < 0 ? here : here + length * LANE_BYTES + turn * (last - step) * stride;
          tile<Op>(to - from, 1)(a.from(first + from), b, scales, panel_bytes, step, last, soon, stride, sums + from * PANEL);
        }
      }
    }
    finish(first, rows, panel, np, sums);
    panel += np;
    panels -= np;
  }
}

// Every row times every panel.
template <class Op, class Epilogue>
void multiply(Team& team, Rows a, int rows, const Matrix& w, Epilogue&& finish) {
  const int panels = w.panels();
  const int row_blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  // Where a thread waits for weights, it does so anew at each part's begin: its parts are long.
  int cuts = team.size() == 1 ? 1 : std::min(panels, 3 * team.size());
  if (rows > FEW_TILES * MOST_SUMS<Op>) cuts = std::max(cuts, panels / 4 / team.size() * team.size());
  team.run(row_blocks * cuts, [&](int part, int) {
    const int r = part / cuts, c = part % cuts;
    const int first = (int)((int64_t)rows * r / row_blocks), last = (int)((int64_t)rows * (r + 1) / row_blocks);
    const int from = (int)((int64_t)panels * c / cuts), to = (int)((int64_t)panels * (c + 1) / cuts);
    block<Op>(a, first, last - first, w, from, to - from, finish);
  });
}

}  // namespace baton
