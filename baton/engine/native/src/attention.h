// Attention over the paged KV pool, in place.
//
// A query's context is cut into spans of 256 tokens, counted from the sequence's start. Each span is attended on its own, and the
// spans are merged in order. So a query's result depends on its sequence only: not on the chunk that computes it, the batch, or the
// thread; and spans of one long sequence can be computed by several threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention_products.h"

namespace baton {

constexpr int MOST_QUERIES = 96;
constexpr int FEW_QUERIES = 12;  // a group's, or about as many
constexpr int AT_ONCE = 32;      // a multiple of a tile's rows

// A span's or several spans' result for one query: its greatest score, as a power of 2, the sum of its weights, and the weighted sum of
// the values.
struct Partial {
  float most, total;
  float* sum;  // [D]
};

// What a thread attends next, of the same sequence.
struct Next {
  int head, span;
};

// What a thread attends with.
struct Scratch {
  alignas(64) float scores[AT_ONCE * SPAN];
  alignas(64) char weights[AT_ONCE * SPAN * 4];
};

// Raises `best` to the scores of tiles [begin, end), for `N` queries.
template <int N>
inline void raise(const float* scores, int begin, int end, __m512* best) {
  const auto score = [&](int i, int t) { return _mm512_loadu_ps(scores + i * SPAN + t * TOKENS); };
  __m512 too[N];
  for (int i = 0; i < N; ++i) too[i] = best[i];
  int t = begin;
  for (; t + 2 <= end; t += 2)
    for (int i = 0; i < N; ++i) {
      best[i] = _mm512_max_ps(best[i], score(i, t));
      too[i] = _mm512_max_ps(too[i], score(i, t + 1));
    }
  for (int i = 0; i < N; ++i) best[i] = _mm512_max_ps(t < end ? _mm512_max_ps(best[i], score(i, t)) : best[i], too[i]);
}

template <class Op>
inline __m512 put(char* weights, int t, __m512 p) {
  if constexpr (Op::VALUES == 2) {
    _mm256_storeu_si256((__m256i*)(weights + t * 32), to_bf16_ps(p));
  } else {
    _mm512_storeu_ps((float*)(weights + t * 64), p);
  }
  return p;
}

template <class Op>
inline __m512 weight_of(const float* scores, int t, __m512 scale, __m512 most) {
  return exp2_ps<Op::VALUES == 1>(_mm512_fmsub_ps(_mm512_loadu_ps(scores + t * TOKENS), scale, most));
}

// The weights of tiles [begin, end), for `N` queries, and their sums, which depend on neither `N` nor the query's place.
template <class Op, int N>
inline void put_weights(const float* scores, char* weights, __m512 scale, int begin, int end, const __m512* most, __m512* sum) {
  constexpr size_t P_BYTES = (size_t)SPAN * 4 / Op::VALUES;
  const auto made = [&](int i, int t) { return put<Op>(weights + i * P_BYTES, t, weight_of<Op>(scores + i * SPAN, t, scale, most[i])); };
  __m512 too[N];
  for (int i = 0; i < N; ++i) sum[i] = too[i] = _mm512_setzero_ps();
  int t = begin;
  for (; t + 2 <= end; t += 2)
    for (int i = 0; i < N; ++i) {
      sum[i] = _mm512_add_ps(sum[i], made(i, t));
      too[i] = _mm512_add_ps(too[i], made(i, t + 1));
    }
  for (int i = 0; i < N; ++i) sum[i] = _mm512_add_ps(t < end ? _mm512_add_ps(sum[i], made(i, t)) : sum[i], too[i]);
}

// The weights of the scores of `N` queries that see all tiles; their greatest scores and sums.
template <class Op, int N>
void soften_whole(const float* scores, char* weights, float scale, int num_tiles, float* most, float* total) {
  __m512 best[N], sum[N];
  for (int i = 0; i < N; ++i) best[i] = _mm512_set1_ps(-INFINITY);
  raise<N>(scores, 0, num_tiles, best);
  for (int i = 0; i < N; ++i) {
    most[i] = _mm512_reduce_max_ps(best[i]) * scale;
    best[i] = _mm512_set1_ps(most[i]);
  }
  put_weights<Op, N>(scores, weights, _mm512_set1_ps(scale), 0, num_tiles, best, sum);
  for (int i = 0; i < N; ++i) total[i] = _mm512_reduce_add_ps(sum[i]);
}

// The same of a query that sees columns [low, high).
template <class Op>
void soften(const float* scores, char* weights, float scale, int low, int high, int num_tiles, float* most, float* total) {
  const int begin = std::min(low / TOKENS, num_tiles), end = std::max(begin, (std::max(high, 0) + TOKENS - 1) / TOKENS);
  // Tiles at the edges are seen in part, tiles [whole, part) in between wholly.
  const int whole = std::min((low + TOKENS - 1) / TOKENS, end), part = std::max(whole, std::max(high, 0) / TOKENS);
  const auto at_edges = [&](auto&& body) {
    const auto seen = [&](int t) { return (__mmask16)(first_lanes(high - t * TOKENS) & ~first_lanes(low - t * TOKENS)); };
    for (int t = begin; t < whole; ++t) body(t, seen(t));
    for (int t = part; t < end; ++t) body(t, seen(t));
  };
  __m512 best = _mm512_set1_ps(-INFINITY), sum;
  at_edges([&](int t, __mmask16 seen) { best = _mm512_mask_max_ps(best, seen, best, _mm512_loadu_ps(scores + t * TOKENS)); });
  raise<1>(scores, whole, part, &best);
  *most = _mm512_reduce_max_ps(best) * scale;
  const __m512 by = _mm512_set1_ps(scale), peak = _mm512_set1_ps(*most);
  put_weights<Op, 1>(scores, weights, by, whole, part, &peak, &sum);
  at_edges([&](int t, __mmask16 seen) {
    sum = _mm512_add_ps(sum, put<Op>(weights, t, _mm512_maskz_mov_ps(seen, weight_of<Op>(scores, t, by, peak))));
  });
  const __m512 none = _mm512_setzero_ps();
  for (int t = 0; t < begin; ++t) put<Op>(weights, t, none);
  for (int t = end; t < num_tiles; ++t) put<Op>(weights, t, none);
  *total = _mm512_reduce_add_ps(sum);
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
    const auto low = [&](int r) { return window > 0 ? std::max(0, position(from + r) + 1 - window - first) : 0; };
    const auto high = [&](int r) { return std::min(position(from + r) + 1 - first, num_tiles * TOKENS); };
    // The first of them sees the least at the end, the last one at the beginning.
    const bool whole = high(0) == num_tiles * TOKENS && low(count - 1) == 0;
    int r = 0;
    // Side by side: a query alone waits for its own results half of the time.
    const auto soften_by = [&](auto together) {
      constexpr int N = together;
      for (; whole && r + N <= count; r += N)
        soften_whole<Op, N>(scratch.scores + r * SPAN, scratch.weights + r * P_BYTES, scale * LOG2_E, num_tiles, most + from + r,
                            total + from + r);
    };
    soften_by(std::integral_constant<int, 4>{});
    soften_by(std::integral_constant<int, 2>{});
    for (; r < count; ++r)
      soften<Op>(scratch.scores + r * SPAN, scratch.weights + r * P_BYTES, scale * LOG2_E, low(r), high(r), num_tiles, most + from + r,
                 total + from + r);
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

}  // namespace baton
