// Attention's two products, over tiles of 16 tokens in the pool: queries times keys, and weights times values.
#pragma once

#include "cache.h"
#include "tiles.h"

namespace baton {

constexpr int SPAN = 256;  // tokens that are attended at once

// Tiles lie 2 KB here and 2 KB there, too short for the hardware to foresee. So `Ask`: while one is multiplied, the one in its place in
// `soon`, which is wanted later, is asked for line by line.
template <class Op, bool Ask, int MR, int NT>
inline void scores_tile(const char* q, size_t q_bytes, const char* const* tiles, const char* const* soon, int steps, float* out, int ld) {
  __m512 sum[MR][NT];
  for (int m = 0; m < MR; ++m)
    for (int t = 0; t < NT; ++t) sum[m][t] = _mm512_setzero_ps();
  for (int s = 0; s < steps; ++s) {
    __m512i k[NT];
#pragma GCC unroll 4
    for (int t = 0; t < NT; ++t) {
      k[t] = _mm512_loadu_si512(tiles[t] + (size_t)s * 64);
      if constexpr (Ask) _mm_prefetch(soon[t] + (size_t)s * 64, _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      int32_t lane;
      std::memcpy(&lane, q + m * q_bytes + (size_t)s * 4, 4);
      const __m512i x = _mm512_set1_epi32(lane);
#pragma GCC unroll 4
      for (int t = 0; t < NT; ++t) sum[m][t] = Op::fma(sum[m][t], x, k[t]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int t = 0; t < NT; ++t) _mm512_storeu_ps(out + m * ld + t * 16, sum[m][t]);
}

template <class Op, bool Ask, int MR, int NV>
inline void values_tile(const char* p, size_t p_bytes, const char* const* tiles, const char* const* soon, int num_tiles, int head_dim,
                        int dim, float* out) {
  __m512 sum[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_setzero_ps();
  constexpr int STEPS = TOKENS / Op::VALUES;
  for (int t = 0; t < num_tiles; ++t) {
    const char* weights = p + (size_t)t * STEPS * 4;
    for (int s = 0; s < STEPS; ++s) {
      __m512i w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const size_t at = ((size_t)s * head_dim + dim) * 4 + v * 64;
        w[v] = _mm512_loadu_si512(tiles[t] + at);
        if constexpr (Ask) _mm_prefetch(soon[t] + at, _MM_HINT_T0);
      }
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) {
        int32_t lane;
        std::memcpy(&lane, weights + m * p_bytes + (size_t)s * 4, 4);
        const __m512i x = _mm512_set1_epi32(lane);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[m][v] = Op::fma(sum[m][v], x, w[v]);
      }
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + (size_t)m * head_dim + dim + v * 16, sum[m][v]);
}

template <class Op, bool Ask, int MR>
void scores_rows(const char* q, size_t q_bytes, const char* const* tiles, const char* const* soon, int num_tiles, int steps, float* out) {
  int t = 0;
  for (; t + 4 <= num_tiles; t += 4) scores_tile<Op, Ask, MR, 4>(q, q_bytes, tiles + t, soon + t, steps, out + t * 16, SPAN);
  for (; t < num_tiles; ++t) scores_tile<Op, Ask, MR, 1>(q, q_bytes, tiles + t, soon + t, steps, out + t * 16, SPAN);
}

template <class Op, bool Ask, int MR>
void values_rows(const char* p, size_t p_bytes, const char* const* tiles, const char* const* soon, int num_tiles, int head_dim, float* out) {
  int d = 0;
  for (; d + 64 <= head_dim; d += 64) values_tile<Op, Ask, MR, 4>(p, p_bytes, tiles, soon, num_tiles, head_dim, d, out);
  for (; d + 16 <= head_dim; d += 16) values_tile<Op, Ask, MR, 1>(p, p_bytes, tiles, soon, num_tiles, head_dim, d, out);
}

using RowsFn = void (*)(const char*, size_t, const char* const*, const char* const*, int, int, float*);

template <class Op, bool Ask, int MR = 1>
RowsFn scores_of(int rows) {
  if (rows == MR) return &scores_rows<Op, Ask, MR>;
  if constexpr (MR < 6) return scores_of<Op, Ask, MR + 1>(rows);
  return nullptr;
}

template <class Op, bool Ask, int MR = 1>
RowsFn values_of(int rows) {
  if (rows == MR) return &values_rows<Op, Ask, MR>;
  if constexpr (MR < 6) return values_of<Op, Ask, MR + 1>(rows);
  return nullptr;
}

// What is asked for while tile `t` is multiplied: a tile a few further on, at last one of those that come next.
inline const char* tile_after(int t, int num_tiles, const char* const* tiles, const char* const* soon) {
  constexpr int AHEAD = 4;
  const int beyond = t + AHEAD - num_tiles;
  return beyond < 0 ? tiles[t + AHEAD] : soon[std::min(beyond, num_tiles - 1)];
}

// As `scores_rows`, on the processor's tiles: 32 queries with two of KV side by side, else 16 with four, the last of them again where
// there are fewer.
template <bool Ask>
void tiled_scores(const char* q, size_t q_bytes, int rows, const char* const* tiles, const char* const* soon, int num_tiles, int steps,
                  float* out) {
  const auto after = [&](int t) { return tile_after(t, num_tiles, tiles, soon); };
  settle();
  int done = 0;
  for (; done + TILE_ROWS < rows; done += 2 * TILE_ROWS)
    for (int t = 0; t < num_tiles; t += 2) {
      const char* k0 = tiles[t];
      const char* k1 = tiles[std::min(t + 1, num_tiles - 1)];
      const char* q0 = q + done * q_bytes;
      const char* q1 = q0 + TILE_ROWS * q_bytes;
      zero_sums();
      for (int s = 0; s < steps; s += TILE_STEPS) {
        const size_t at = (size_t)s * 64, from = (size_t)s * 4;
        _tile_loadd(6, k0 + at, 64);
        _tile_loadd(4, q0 + from, q_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(4, q1 + from, q_bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(6, k1 + at, 64);
        _tile_dpbf16ps(3, 4, 6);
        _tile_loadd(4, q0 + from, q_bytes);
        _tile_dpbf16ps(1, 4, 6);
        if (Ask && done == 0)
          for (int i = 0; i < 2 && t + i < num_tiles; ++i) ask<TILE_STEPS>(after(t + i) + at);
      }
      float* to = out + done * SPAN + t * 16;
      _tile_stored(0, to, SPAN * 4);
      _tile_stored(1, to + 16, SPAN * 4);
      _tile_stored(2, to + TILE_ROWS * SPAN, SPAN * 4);
      _tile_stored(3, to + TILE_ROWS * SPAN + 16, SPAN * 4);
    }
  for (int r = done; r < rows; r += TILE_ROWS)
    for (int t = 0; t < num_tiles; t += 4) {
      const char* k[4];
      for (int i = 0; i < 4; ++i) k[i] = tiles[std::min(t + i, num_tiles - 1)];
      zero_sums();
      for (int s = 0; s < steps; s += TILE_STEPS) {
        const size_t at = (size_t)s * 64;
        _tile_loadd(4, q + r * q_bytes + (size_t)s * 4, q_bytes);
        _tile_loadd(6, k[0] + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(6, k[1] + at, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(6, k[2] + at, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(6, k[3] + at, 64);
        _tile_dpbf16ps(3, 4, 6);
        if (Ask && r == 0)
          for (int i = 0; i < 4 && t + i < num_tiles; ++i) ask<TILE_STEPS>(after(t + i) + at);
      }
      float* to = out + r * SPAN + t * 16;
      _tile_stored(0, to, SPAN * 4);
      _tile_stored(1, to + 16, SPAN * 4);
      _tile_stored(2, to + 32, SPAN * 4);
      _tile_stored(3, to + 48, SPAN * 4);
    }
}

// As `values_rows`, on the processor's tiles: 32 queries with 32 dimensions at a time, else 16 with 64, or 32.
template <bool Ask>
void tiled_values(const char* p, size_t p_bytes, int rows, const char* const* tiles, const char* const* soon, int num_tiles, int head_dim,
                  float* out) {
  const size_t ld = (size_t)head_dim * 4;
  const auto after = [&](int t) { return tile_after(t, num_tiles, tiles, soon); };
  settle();
  int done = 0;
  for (; done + TILE_ROWS < rows; done += 2 * TILE_ROWS)
    for (int d = 0; d < head_dim; d += 32) {
      zero_sums();
      for (int t = 0; t < num_tiles; ++t) {
        const char* v = tiles[t] + (size_t)d * 4;
        const char* p0 = p + done * p_bytes + (size_t)t * 32;
        const char* p1 = p0 + TILE_ROWS * p_bytes;
        _tile_loadd(7, v, ld);
        _tile_loadd(5, p0, p_bytes);
        _tile_dpbf16ps(0, 5, 7);
        _tile_loadd(5, p1, p_bytes);
        _tile_dpbf16ps(2, 5, 7);
        _tile_loadd(7, v + 64, ld);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(5, p0, p_bytes);
        _tile_dpbf16ps(1, 5, 7);
        if (Ask && done == 0) ask<16>(after(t) + (size_t)d * 32);
      }
      float* to = out + (size_t)done * head_dim + d;
      _tile_stored(0, to, ld);
      _tile_stored(1, to + 16, ld);
      _tile_stored(2, to + TILE_ROWS * head_dim, ld);
      _tile_stored(3, to + TILE_ROWS * head_dim + 16, ld);
    }
  for (int r = done; r < rows; r += TILE_ROWS)
    for (int d = 0; d < head_dim; d += 64) {
      const bool wide = d + 64 <= head_dim;
      zero_sums();
      for (int t = 0; t < num_tiles; ++t) {
        const char* v = tiles[t] + (size_t)d * 4;
        _tile_loadd(5, p + r * p_bytes + (size_t)t * 32, p_bytes);
        _tile_loadd(7, v, ld);
        _tile_dpbf16ps(0, 5, 7);
        _tile_loadd(7, v + 64, ld);
        _tile_dpbf16ps(1, 5, 7);
        if (wide) {
          _tile_loadd(7, v + 128, ld);
          _tile_dpbf16ps(2, 5, 7);
          _tile_loadd(7, v + 192, ld);
          _tile_dpbf16ps(3, 5, 7);
        }
        if (Ask && r == 0) {
          const char* at = after(t) + (size_t)d * 32;
          wide ? ask<32>(at) : ask<16>(at);
        }
      }
      float* to = out + (size_t)r * head_dim + d;
      _tile_stored(0, to, ld);
      _tile_stored(1, to + 16, ld);
      if (wide) {
        _tile_stored(2, to + 32, ld);
        _tile_stored(3, to + 48, ld);
      }
    }
}

// Whatever the number of queries: scores [rows][SPAN] of queries [rows][D], and sums [rows][D] of values. On tiles, both factors and
// results have room for a multiple of 16 rows.
template <class Op, bool Ask>
void score(const char* q, size_t q_bytes, int rows, const char* const* tiles, const char* const* soon, int num_tiles, int steps, float* out) {
  if constexpr (TILED<Op>) {
    tiled_scores<Ask>(q, q_bytes, rows, tiles, soon, num_tiles, steps, out);
  } else {
    const int parts = (rows + 5) / 6;
    for (int i = 0; i < parts; ++i) {
      const int from = rows * i / parts, to = rows * (i + 1) / parts;
      const RowsFn some = Ask && i == 0 ? scores_of<Op, true>(to - from) : scores_of<Op, false>(to - from);
      some(q + from * q_bytes, q_bytes, tiles, soon, num_tiles, steps, out + from * SPAN);
    }
  }
}

template <class Op, bool Ask>
void weigh(const char* p, size_t p_bytes, int rows, const char* const* tiles, const char* const* soon, int num_tiles, int head_dim,
           float* out) {
  if constexpr (TILED<Op>) {
    tiled_values<Ask>(p, p_bytes, rows, tiles, soon, num_tiles, head_dim, out);
  } else {
    const int parts = (rows + 5) / 6;
    for (int i = 0; i < parts; ++i) {
      const int from = rows * i / parts, to = rows * (i + 1) / parts;
      const RowsFn some = Ask && i == 0 ? values_of<Op, true>(to - from) : values_of<Op, false>(to - from);
      some(p + from * p_bytes, p_bytes, tiles, soon, num_tiles, head_dim, out + (size_t)from * head_dim);
    }
  }
}

}  // namespace baton
