// Attention over the paged KV pool, in place.
//
// The pool keeps keys and values in the order in which they are multiplied. A block holds S tokens, S a multiple of 16, for each KV
// head; a lane is one float32 or two bfloat16:
//
//     keys    [layer][block][KV head][S / 16][D / values][16 tokens]     lanes along the head's dimensions
//     values  [layer][block][KV head][S / 16][16 / values][D]            lanes along the tokens
//
// A query's context is cut into spans of 256 tokens, counted from the sequence's start. Each span is attended on its own, and the
// spans are merged in order. So a query's result depends on its sequence only: not on the chunk that computes it, the batch, or the
// thread; and spans of one long sequence can be computed by several threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace baton {

constexpr int SPAN = 256;
constexpr int TOKENS = 16;  // of a tile
constexpr int MOST_QUERIES = 96;
constexpr int FEW_QUERIES = 12;  // a group's, or about as many
constexpr int AT_ONCE = 32;      // a multiple of a tile's rows

struct KvShape {
  int num_heads, num_kv_heads, head_dim, block_size, num_blocks, values;

  int group() const { return num_heads / num_kv_heads; }
  size_t tile_bytes() const { return (size_t)TOKENS * head_dim * (4 / values); }
  size_t head_bytes() const { return tile_bytes() * (block_size / TOKENS); }
  size_t block_bytes() const { return head_bytes() * num_kv_heads; }
  size_t layer_bytes() const { return block_bytes() * num_blocks; }
};

// One layer's part of the pool, and one sequence's way through it.
struct Cache {
  char* keys;
  char* values;
  const KvShape* shape;

  // Where the tile of 16 tokens that holds `token` begins, for a KV head.
  size_t tile_at(const int32_t* table, int token, int head) const {
    const int block = table[token / shape->block_size];
    const int tile = token % shape->block_size / TOKENS;
    return block * shape->block_bytes() + head * shape->head_bytes() + tile * shape->tile_bytes();
  }
};

// A span's or several spans' result for one query: its greatest score, as a power of 2, the sum of its weights, and the weighted sum of
// the values.
struct Partial {
  float most, total;
  float* sum;  // [D]
};

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

// What a thread attends next, of the same sequence.
struct Next {
  int head, span;
};

// What is asked for while tile `t` is multiplied: a tile a few further on, at last one of those that come next.
inline const char* tile_after(int t, int num_tiles, const char* const* tiles, const char* const* soon) {
  constexpr int AHEAD = 4;
  const int beyond = t + AHEAD - num_tiles;
  return beyond < 0 ? tiles[t + AHEAD] : soon[std::min(beyond, num_tiles - 1)];
}

// As `scores_rows`, on the processor's tiles: four of KV side by side, the last of them again where there are fewer.
template <bool Ask>
void tiled_scores(const char* q, size_t q_bytes, int rows, const char* const* tiles, const char* const* soon, int num_tiles, int steps,
                  float* out) {
  const auto after = [&](int t) { return tile_after(t, num_tiles, tiles, soon); };
  settle();
  for (int r = 0; r < rows; r += TILE_ROWS)
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

// As `values_rows`, on the processor's tiles: 64 dimensions at a time, or 32.
template <bool Ask>
void tiled_values(const char* p, size_t p_bytes, int rows, const char* const* tiles, const char* const* soon, int num_tiles, int head_dim,
                  float* out) {
  const size_t ld = (size_t)head_dim * 4;
  const auto after = [&](int t) { return tile_after(t, num_tiles, tiles, soon); };
  settle();
  for (int r = 0; r < rows; r += TILE_ROWS)
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

// What a thread attends with.
struct Scratch {
  alignas(64) float scores[AT_ONCE * SPAN];
  alignas(64) char weights[AT_ONCE * SPAN * 4];
};

// The weights of a query's scores, of which columns [low, high) are seen; and their greatest score and sum.
template <class Op>
void soften(const float* scores, char* weights, float scale, int low, int high, int num_tiles, float& most, float& total) {
  const int begin = std::min(low / TOKENS, num_tiles), end = std::max(begin, (std::max(high, 0) + TOKENS - 1) / TOKENS);
  // Tiles at the edges are seen in part, tiles [whole, part) in between wholly.
  const int whole = std::min((low + TOKENS - 1) / TOKENS, end), part = std::max(whole, std::max(high, 0) / TOKENS);
  const auto at_edges = [&](auto&& body) {
    const auto seen = [&](int t) { return (__mmask16)(first_lanes(high - t * TOKENS) & ~first_lanes(low - t * TOKENS)); };
    for (int t = begin; t < whole; ++t) body(t, seen(t));
    for (int t = part; t < end; ++t) body(t, seen(t));
  };
  const auto score = [&](int t) { return _mm512_loadu_ps(scores + t * TOKENS); };
  const auto put = [&](int t, __m512 p) {
    if constexpr (Op::VALUES == 2) {
      _mm256_storeu_si256((__m256i*)(weights + t * 32), to_bf16_ps(p));
    } else {
      _mm512_storeu_ps((float*)(weights + t * 64), p);
    }
    return p;
  };
  // Two chains of each: one would wait for itself.
  __m512 best = _mm512_set1_ps(-INFINITY), best_too = best;
  at_edges([&](int t, __mmask16 seen) { best = _mm512_mask_max_ps(best, seen, best, score(t)); });
  int t = whole;
  for (; t + 2 <= part; t += 2) {
    best = _mm512_max_ps(best, score(t));
    best_too = _mm512_max_ps(best_too, score(t + 1));
  }
  if (t < part) best = _mm512_max_ps(best, score(t));
  most = _mm512_reduce_max_ps(_mm512_max_ps(best, best_too)) * scale;
  const __m512 peak = _mm512_set1_ps(most), by = _mm512_set1_ps(scale), none = _mm512_setzero_ps();
  const auto weight = [&](int t) { return exp2_ps<Op::VALUES == 1>(_mm512_fmsub_ps(score(t), by, peak)); };
  __m512 sum = none, sum_too = none;
  for (t = whole; t + 2 <= part; t += 2) {
    sum = _mm512_add_ps(sum, put(t, weight(t)));
    sum_too = _mm512_add_ps(sum_too, put(t + 1, weight(t + 1)));
  }
  if (t < part) sum = _mm512_add_ps(sum, put(t, weight(t)));
  at_edges([&](int t, __mmask16 seen) { sum = _mm512_add_ps(sum, put(t, _mm512_maskz_mov_ps(seen, weight(t)))); });
  for (t = 0; t < begin; ++t) put(t, none);
  for (t = end; t < num_tiles; ++t) put(t, none);
  total = _mm512_reduce_add_ps(_mm512_add_ps(sum, sum_too));
}

// Queries of one KV head: `rows` of them, packed [rows][D]; query i stands at position `position(i)` and sees `window` tokens up to
// itself. Computes span `span` of each, as partial results; a query that sees nothing of the span has a total of 0. What the thread
// attends afterwards is span `next.span` of KV head `next.head`, if that is not negative.
template <class Op, class Position>
void attend_span(Scratch& scratch, const Cache& cache, const int32_t* table, int head, const char* queries, int rows, float scale,
                 int window, int span, int end, Next next, Position&& position, float* most, float* total, float* sums) {
  const KvShape& shape = *cache.shape;
  const int steps = shape.head_dim / Op::VALUES;
  const size_t q_bytes = (size_t)steps * 4;
  const int first = span * SPAN;
  const int num_tiles = (std::min(end, first + SPAN) - first + TOKENS - 1) / TOKENS;
  const char* keys[SPAN / TOKENS];
  const char* values[SPAN / TOKENS];
  const char* next_keys[SPAN / TOKENS];
  for (int t = 0; t < num_tiles; ++t) {
    const size_t at = cache.tile_at(table, first + t * TOKENS, head);
    keys[t] = cache.keys + at;
    values[t] = cache.values + at;
    const int token = next.span * SPAN + t * TOKENS;
    next_keys[t] = next.head < 0 || token >= end ? keys[t] : cache.keys + cache.tile_at(table, token, next.head);
  }
  // A chunk's queries, more than a group's, find most of the KV in the processor's caches, whoever asked for it. Some at a time: their
  // scores stay in the first cache.
  const bool few = rows <= FEW_QUERIES;
  constexpr size_t P_BYTES = (size_t)SPAN * 4 / Op::VALUES;
  for (int from = 0; from < rows; from += AT_ONCE) {
    const int count = std::min(AT_ONCE, rows - from);
    const char* q = queries + from * q_bytes;
    float* out = sums + (size_t)from * shape.head_dim;
    const bool ask = few || (TILED<Op> && from == 0);
    if (ask) {
      score<Op, true>(q, q_bytes, count, keys, values, num_tiles, steps, scratch.scores);
    } else {
      score<Op, false>(q, q_bytes, count, keys, values, num_tiles, steps, scratch.scores);
    }
    for (int r = 0; r < count; ++r) {
      const int at = position(from + r);
      // Columns [low, high) are seen.
      const int high = std::min(at + 1 - first, num_tiles * TOKENS);
      const int low = window > 0 ? std::max(0, at + 1 - window - first) : 0;
      soften<Op>(scratch.scores + r * SPAN, scratch.weights + r * P_BYTES, scale * LOG2_E, low, high, num_tiles, most[from + r],
                 total[from + r]);
    }
    if (ask) {
      weigh<Op, true>(scratch.weights, P_BYTES, count, values, next_keys, num_tiles, shape.head_dim, out);
    } else {
      weigh<Op, false>(scratch.weights, P_BYTES, count, values, next_keys, num_tiles, shape.head_dim, out);
    }
  }
}

// Adds a span's result to those before it.
inline void merge(Partial& all, const Partial& span, int head_dim) {
  if (span.total == 0.0f) return;
  const float most = std::max(all.most, span.most);
  const float keep = all.total == 0.0f ? 0.0f : exp2_one(all.most - most);
  const float add = exp2_one(span.most - most);
  all.total = all.total * keep + span.total * add;
  all.most = most;
  const __m512 k = _mm512_set1_ps(keep), a = _mm512_set1_ps(add);
  for (int d = 0; d < head_dim; d += 16) {
    const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(all.sum + d), k);
    _mm512_storeu_ps(all.sum + d, _mm512_fmadd_ps(_mm512_loadu_ps(span.sum + d), a, before));
  }
}

// One token's keys or values, float32, into their lanes.
template <class Op>
void store_key(char* tile, int lane, const float* key, int head_dim) {
  if constexpr (Op::VALUES == 2) {
    char* to = tile + lane * 4;
    for (int d = 0; d < head_dim; d += 16) {
      alignas(32) int32_t pairs[8];
      _mm256_store_si256((__m256i*)pairs, to_bf16_ps(_mm512_loadu_ps(key + d)));
      for (int i = 0; i < 8; ++i, to += 64) std::memcpy(to, pairs + i, 4);
    }
  } else {
    float* to = (float*)tile;
    for (int d = 0; d < head_dim; ++d) to[d * 16 + lane] = key[d];
  }
}

template <class Op>
void store_value(char* tile, int lane, const float* value, int head_dim) {
  if constexpr (Op::VALUES == 2) {
    uint16_t* to = (uint16_t*)tile + (size_t)(lane / 2) * head_dim * 2 + lane % 2;
    for (int d = 0; d < head_dim; d += 16, to += 32) {
      alignas(32) uint16_t rounded[16];
      _mm256_store_si256((__m256i*)rounded, to_bf16_ps(_mm512_loadu_ps(value + d)));
      for (int i = 0; i < 16; ++i) to[i * 2] = rounded[i];
    }
  } else {
    std::memcpy((float*)tile + (size_t)lane * head_dim, value, (size_t)head_dim * 4);
  }
}

}  // namespace baton
