// Attention over the paged KV pool, in place.
//
// A query's context is cut into spans of 256 tokens, counted from the sequence's start. Each span is attended on its own, and the
// spans are merged in order. So a query's result depends on its sequence only: not on the chunk that computes it, the batch, or the
// thread; and spans of one long sequence can be computed by several threads.
#pragma once

#include <algorithm>
#include <cmath>

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

}  // namespace baton
