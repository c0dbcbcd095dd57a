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

#include "gemm.h"

namespace baton {

constexpr int SPAN = 256;
constexpr int TOKENS = 16;  // of a tile
constexpr int MOST_QUERIES = 96;

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

// A span's or several spans' result for one query: its greatest score, the sum of its weights, and the weighted sum of the values.
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

// What a thread attends with.
struct Scratch {
  alignas(64) float scores[MOST_QUERIES * SPAN];
  alignas(64) char weights[MOST_QUERIES * SPAN * 4];
};

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
  // A group's queries fit two tiles. A chunk's are more: theirs find most of the KV in the processor's caches, whoever asked for it.
  const int tiles = (rows + 5) / 6;
  const bool few = tiles <= 2;
  for (int i = 0; i < tiles; ++i) {
    const int from = rows * i / tiles, to = rows * (i + 1) / tiles;
    const RowsFn scores = few && i == 0 ? scores_of<Op, true>(to - from) : scores_of<Op, false>(to - from);
    scores(queries + from * q_bytes, q_bytes, keys, values, num_tiles, steps, scratch.scores + from * SPAN);
  }
  constexpr size_t P_BYTES = (size_t)SPAN * 4 / Op::VALUES;
  const __m512 scales = _mm512_set1_ps(scale);
  for (int r = 0; r < rows; ++r) {
    float* row = scratch.scores + r * SPAN;
    char* weights = scratch.weights + r * P_BYTES;
    const int at = position(r);
    // Columns [low, high) are seen.
    const int high = std::min(at + 1 - first, num_tiles * TOKENS);
    const int low = window > 0 ? std::max(0, at + 1 - window - first) : 0;
    __m512 best = _mm512_set1_ps(-INFINITY);
    for (int t = 0; t < num_tiles; ++t) {
      const __mmask16 seen = first_lanes(high - t * 16) & ~first_lanes(low - t * 16);
      const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(row + t * 16), scales);
      _mm512_storeu_ps(row + t * 16, s);
      best = _mm512_mask_max_ps(best, seen, best, s);
    }
    most[r] = _mm512_reduce_max_ps(best);
    const __m512 peak = _mm512_set1_ps(most[r]);
    __m512 sum = _mm512_setzero_ps();
    for (int t = 0; t < num_tiles; ++t) {
      const __mmask16 seen = first_lanes(high - t * 16) & ~first_lanes(low - t * 16);
      const __m512 p = _mm512_maskz_mov_ps(seen, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(row + t * 16), peak)));
      sum = _mm512_add_ps(sum, p);
      if constexpr (Op::VALUES == 2) {
        _mm256_storeu_si256((__m256i*)(weights + t * 32), to_bf16_ps(p));
      } else {
        _mm512_storeu_ps((float*)(weights + t * 64), p);
      }
    }
    total[r] = _mm512_reduce_add_ps(sum);
  }
  for (int i = 0; i < tiles; ++i) {
    const int from = rows * i / tiles, to = rows * (i + 1) / tiles;
    const RowsFn sum = few && i == 0 ? values_of<Op, true>(to - from) : values_of<Op, false>(to - from);
    sum(scratch.weights + from * P_BYTES, P_BYTES, values, next_keys, num_tiles, shape.head_dim, sums + (size_t)from * shape.head_dim);
  }
}

// Adds a span's result to those before it.
inline void merge(Partial& all, const Partial& span, int head_dim) {
  if (span.total == 0.0f) return;
  const float most = std::max(all.most, span.most);
  const float keep = all.total == 0.0f ? 0.0f : exp_one(all.most - most);
  const float add = exp_one(span.most - most);
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
    uint16_t* to = (uint16_t*)tile;
    for (int d = 0; d < head_dim; d += 2) {
      to[(d / 2) * 32 + lane * 2] = to_bf16(key[d]);
      to[(d / 2) * 32 + lane * 2 + 1] = to_bf16(key[d + 1]);
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
    for (int d = 0; d < head_dim; ++d) to[d * 2] = to_bf16(value[d]);
  } else {
    std::memcpy((float*)tile + (size_t)lane * head_dim, value, (size_t)head_dim * 4);
  }
}

}  // namespace baton
