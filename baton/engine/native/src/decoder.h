// A decoder step of the Llama family: embedding, attention over paged KV, gated feed-forward, head; all rows of a batch at once.
//
// Between layers activations are float32; matrix products read them rounded to the weights' format, attention rounded to the KV's.
#pragma once

#include <memory>
#include <type_traits>

#include "activations.h"
#include "attention.h"
#include "model.h"

namespace baton {

// Weights' format W, KV's format C.
template <class W, class C>
class Decoder {
 public:
  Decoder(const BatonModel& model, const BatonPool& pool, Team& team) : model_(model), team_(team) {
    kv_ = {model.num_heads, model.num_kv_heads, model.head_dim, pool.block_size, pool.num_blocks, C::VALUES};
    keys_ = static_cast<char*>(pool.data);
    values_ = keys_ + kv_.layer_bytes() * model.num_layers;
    scratch_.reset(new Scratch[team.size()]);
    rooms_ = std::vector<Room>(team.size());
    for (Room& room : rooms_) {
      const size_t values = (size_t)MOST_QUERIES * model.head_dim;
      room.queries.at_least(values * 4);
      room.sums.at_least(values);
      room.all_sums.at_least(values);
    }
  }

  // Throws `std::bad_alloc`; the next step starts afresh.
  void step(const BatonBatch& batch) {
    const int tokens = batch.num_tokens;
    clock_ = {batch.seconds, batch.seconds ? monotonic_ns() : 0};
    prepare(batch);
    const Team::Step under_way(team_);
    rows_of(tokens, [&](int t, int) { embed(batch.tokens[t], x(t)); });
    for (int l = 0; l < model_.num_layers; ++l) layer(batch, l);
    head(batch);
    clock_.lap(SECTION_REST);
  }

 private:
  static Matrix matrix(const BatonMatrix& m) {
    return {static_cast<const char*>(m.data), m.scales, m.bias, m.n, Activations<W>::lanes(m.k)};
  }

  float* x(int row) { return x_.get() + (size_t)row * model_.hidden; }

  // Applies `body(row, thread)` to every row.
  template <class Body>
  void rows_of(int rows, Body&& body) {
    const int homes = team_.homes(rows), each = rows < 8 ? 1 : std::min(rows / 4, 4 * team_.size()), parts = homes * each;
    team_.run_at_home(homes, each, [&](int home, int part, int thread) {
      const int begin = home * each + part;
      const int last = (int)((int64_t)rows * (begin + 1) / parts);
      for (int row = (int)((int64_t)rows * begin / parts); row < last; ++row) body(row, thread);
    });
  }

  int qkv_width() const { return (model_.num_heads + 2 * model_.num_kv_heads) * model_.head_dim; }

  float* scratch(int thread) { return wide_.get() + (size_t)thread * width_; }

  void prepare(const BatonBatch& batch) {
    const int tokens = batch.num_tokens, head_dim = model_.head_dim;
    const int heads = model_.num_heads * head_dim;
    width_ = (std::max({model_.hidden, model_.inner, qkv_width()}) + 63) / 64 * 64;
    x_.at_least((size_t)tokens * model_.hidden);
    qkv_.at_least((size_t)tokens * qkv_width());
    // A tile of queries may reach beyond the last.
    queries_.at_least(((size_t)tokens * heads + (size_t)TILE_ROWS * head_dim) * 4 / C::VALUES);
    attended_.at_least((size_t)tokens * heads);
    wide_.at_least((size_t)team_.size() * width_);
    positions_.resize(tokens);
    row_of_.resize(tokens);
    cos_.at_least((size_t)tokens * head_dim / 2);
    sin_.at_least((size_t)tokens * head_dim / 2);
    if constexpr (W::VALUES == 4) gated_.at_least((size_t)tokens * model_.inner);
    for (int r = 0; r < batch.num_rows; ++r) {
      const int32_t* row = batch.rows + r * 4;
      for (int i = 0; i < row[1]; ++i) {
        positions_[row[0] + i] = row[2] + i;
        row_of_[row[0] + i] = r;
      }
    }
    for (int t = 0; t < tokens; ++t)
      for (int d = 0; d < head_dim / 2; ++d) {
        const float angle = (float)positions_[t] * model_.frequencies[d];
        cos_.get()[t * (head_dim / 2) + d] = std::cos(angle) * model_.rope_scale;
        sin_.get()[t * (head_dim / 2) + d] = std::sin(angle) * model_.rope_scale;
      }
    plan_attention(batch);
  }

  void embed(int token, float* out) {
    const int n = model_.hidden;
    const Matrix rows = matrix(model_.embedding);
    const int panel = token / PANEL, lane = token % PANEL;
    const char* at = rows.data + (size_t)panel * rows.steps * 4 * PANEL + lane * 4;
    for (int s = 0; s * W::VALUES < n; ++s, at += 4 * PANEL) {
      if constexpr (W::VALUES == 1) {
        std::memcpy(out + s, at, 4);
      } else if constexpr (W::VALUES == 2) {
        uint16_t pair[2];
        std::memcpy(pair, at, 4);
        out[s * 2] = from_bf16(pair[0]);
        out[s * 2 + 1] = from_bf16(pair[1]);
      } else {
        const int groups = groups_of(rows.steps);
        const float scale = from_f16(rows.scales[((size_t)panel * groups + s / GROUP_STEPS) * PANEL + lane]);
        for (int i = 0; i < 4 && s * 4 + i < n; ++i) out[s * 4 + i] = scale * (float)((int)(uint8_t)at[i] - 128);
      }
    }
  }

  void norm(int rows, const float* weight) {
    inputs_.shape(rows, model_.hidden);
    rows_of(rows, [&](int t, int thread) {
      normalize(inputs_, t, x(t), weight, model_.hidden, model_.norm_eps, scratch(thread));
    });
  }

  template <class Epilogue>
  void times(const Activations<W>& a, int rows, const Matrix& w, Epilogue&& finish) {
    if constexpr (TILED<W>) {
      multiply_tiled<W>(team_, a.rows(), rows, w, finish);
    } else {
      multiply<W>(team_, a.rows(), rows, w, finish);
    }
  }

  static constexpr int ROWS_AHEAD = 2 * TILE_ROWS;

  // Sums into rows of float32, `width` apart; adds the bias, and what is there already where `Add`.
  template <bool Add>
  void product(const Activations<W>& a, int rows, const BatonMatrix& weights, float* out, int width) {
    const Matrix w = matrix(weights);
    clock_.lap(SECTION_REST);
    times(a, rows, w, [&](int first, int count, int panel, int panels, const float* sums) {
      for (int p = 0; p < panels; ++p) {
        const int column = (panel + p) * PANEL;
        const __mmask16 left = first_lanes(w.n - column), right = first_lanes(w.n - column - 16);
        __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        if (w.bias != nullptr) bias[0] = _mm512_loadu_ps(w.bias + column), bias[1] = _mm512_loadu_ps(w.bias + column + 16);
        float* at = out + (size_t)first * width + column;
        const float* from = sums + (size_t)p * PANEL;
        for (int m = 0; m < count; ++m, at += width, from += (size_t)panels * PANEL) {
          __m512 y[2] = {_mm512_add_ps(_mm512_loadu_ps(from), bias[0]), _mm512_add_ps(_mm512_loadu_ps(from + 16), bias[1])};
          if constexpr (Add) {
            y[0] = _mm512_add_ps(y[0], _mm512_maskz_loadu_ps(left, at));
            y[1] = _mm512_add_ps(y[1], _mm512_maskz_loadu_ps(right, at + 16));
          }
          // Rows lie too far apart to be foreseen.
          __builtin_prefetch(at + (size_t)ROWS_AHEAD * width, 1);
          __builtin_prefetch(at + (size_t)ROWS_AHEAD * width + 16, 1);
          _mm512_mask_storeu_ps(at, left, y[0]);
          _mm512_mask_storeu_ps(at + 16, right, y[1]);
        }
      }
    });
    clock_.lap(SECTION_LINEAR);
  }

  void layer(const BatonBatch& batch, int l) {
    const BatonLayer& w = model_.layers[l];
    const int tokens = batch.num_tokens;
    const Cache cache{keys_ + kv_.layer_bytes() * l, values_ + kv_.layer_bytes() * l, &kv_};
    norm(tokens, w.attention_norm);
    product<false>(inputs_, tokens, w.qkv, qkv_.get(), qkv_width());
    rows_of(tokens, [&](int t, int) { place(batch, w, cache, t); });
    clock_.lap(SECTION_REST);
    attend(batch, w, cache);
    clock_.lap(SECTION_ATTENTION);
    inputs_.shape(tokens, model_.num_heads * model_.head_dim);
    rows_of(tokens, [&](int t, int) {
      const int width = model_.num_heads * model_.head_dim;
      inputs_.put(t, attended_.get() + (size_t)t * width, width);
    });
    product<true>(inputs_, tokens, w.out, x(0), model_.hidden);
    norm(tokens, w.mlp_norm);
    gate(tokens, w.gate_up);
    product<true>(hidden_, tokens, w.down, x(0), model_.hidden);
  }

  // Panels hold 16 gates and the 16 values that they gate.
  void gate(int tokens, const BatonMatrix& weights) {
    const Matrix w = matrix(weights);
    hidden_.shape(tokens, model_.inner);
    clock_.lap(SECTION_REST);
    times(inputs_, tokens, w, [&](int first, int count, int panel, int panels, const float* sums) {
      for (int p = 0; p < panels; ++p) {
        const int column = (panel + p) * 16;
        __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        if (w.bias != nullptr) bias[0] = _mm512_loadu_ps(w.bias + column * 2), bias[1] = _mm512_loadu_ps(w.bias + column * 2 + 16);
        const float* from = sums + (size_t)p * PANEL;
        for (int m = 0; m < count; ++m, from += (size_t)panels * PANEL) {
          const __m512 gate = _mm512_add_ps(_mm512_loadu_ps(from), bias[0]), up = _mm512_add_ps(_mm512_loadu_ps(from + 16), bias[1]);
          const __m512 y = _mm512_mul_ps(silu_ps<W::VALUES == 1>(gate), up);
          if constexpr (W::VALUES == 4) {
            _mm512_storeu_ps(gated_.get() + (size_t)(first + m) * model_.inner + column, y);
          } else {
            hidden_.put_16(first + m, column, y);
          }
        }
      }
    });
    clock_.lap(SECTION_LINEAR);
    if constexpr (W::VALUES == 4)
      rows_of(tokens, [&](int t, int) { hidden_.put(t, gated_.get() + (size_t)t * model_.inner, model_.inner); });
  }

  // Normalizes and rotates a token's heads; its query goes to where attention reads it, its key and value to the pool.
  void place(const BatonBatch& batch, const BatonLayer& w, const Cache& cache, int t) {
    const int head_dim = model_.head_dim, half = head_dim / 2;
    float* heads = qkv_.get() + (size_t)t * qkv_width();
    const float* cos = cos_.get() + (size_t)t * half;
    const float* sin = sin_.get() + (size_t)t * half;
    const int rotated = model_.num_heads + model_.num_kv_heads;
    for (int h = 0; h < rotated; ++h) {
      float* head = heads + h * head_dim;
      const float* weight = h < model_.num_heads ? w.q_norm : w.k_norm;
      if (weight != nullptr) {
        float squares = 0;
        for (int d = 0; d < head_dim; ++d) squares += head[d] * head[d];
        const float by = 1.0f / std::sqrt(squares / (float)head_dim + model_.norm_eps);
        for (int d = 0; d < head_dim; ++d) head[d] = head[d] * by * weight[d];
      }
      for (int d = 0; d < half; ++d) {
        const float a = head[d], b = head[d + half];
        head[d] = a * cos[d] - b * sin[d];
        head[d + half] = b * cos[d] + a * sin[d];
      }
    }
    const int group = kv_.group();
    for (int h = 0; h < model_.num_heads; ++h) put_query(t, h / group, h % group, heads + h * head_dim);
    const int32_t* row = batch.rows + row_of_[t] * 4;
    const int position = positions_[t], lane = position % TOKENS;
    // The last token of those that begin a tile: no other thread writes beyond it.
    const bool ends = position == row[2] + row[1] - 1 && position - lane >= row[2];
    for (int h = 0; h < model_.num_kv_heads; ++h) {
      const size_t at = cache.tile_at(batch.tables + row[3], position, h);
      store_key<C>(cache.keys + at, lane, heads + (model_.num_heads + h) * head_dim, head_dim);
      store_value<C>(cache.values + at, lane, heads + (rotated + h) * head_dim, head_dim);
      if (ends) clear_values(cache.values + at, lane + 1, head_dim, C::VALUES);
    }
  }

  // Queries are kept [token][KV head][head of its group][D].
  char* query(int t, int kv_head) {
    return queries_.get() + ((size_t)t * model_.num_heads + (size_t)kv_head * kv_.group()) * model_.head_dim * 4 / C::VALUES;
  }

  void put_query(int t, int kv_head, int index, const float* from) {
    const int head_dim = model_.head_dim;
    char* to = query(t, kv_head) + (size_t)index * head_dim * 4 / C::VALUES;
    if constexpr (C::VALUES == 1) {
      std::memcpy(to, from, (size_t)head_dim * 4);
    } else {
      for (int d = 0; d < head_dim; d += 16) _mm256_storeu_si256((__m256i*)(to + d * 2), to_bf16_ps(_mm512_loadu_ps(from + d)));
    }
  }

  // Some tokens of one row: those that one part attends, for one KV head.
  struct Block {
    int row, first, count;
  };

  void plan_attention(const BatonBatch& batch) {
    blocks_.clear();
    const int most = std::max(1, MOST_QUERIES / kv_.group());
    for (int r = 0; r < batch.num_rows; ++r) {
      const int32_t* row = batch.rows + r * 4;
      const int cuts = (row[1] + most - 1) / most;
      for (int c = 0; c < cuts; ++c) {
        const int from = (int)((int64_t)row[1] * c / cuts), to = (int)((int64_t)row[1] * (c + 1) / cuts);
        blocks_.push_back({r, row[0] + from, to - from});
      }
    }
  }

  // What a thread that attends holds meanwhile.
  struct Nothing {};
  using Held = std::conditional_t<TILED<C>, Tiles<true>, Nothing>;

  void attend(const BatonBatch& batch, const BatonLayer& w, const Cache& cache) {
    const int heads = model_.num_kv_heads, blocks = (int)blocks_.size(), enough = 4 * team_.size();
    if (blocks * heads >= enough || longest() <= 2 * SPAN || team_.size() == 1) {
      // A chunk's blocks read the same KV: one head's stays in the second cache while they pass.
      const int together = blocks >= enough && !chunks() ? heads : 1;
      // Later tokens see more: they come first, so that no thread is left with the longest part at the end.
      team_.run(blocks * heads / together, [&](int part, int thread) {
        [[maybe_unused]] const Held mine;
        const Block& block = blocks_[blocks - 1 - part % blocks];
        const int first = part / blocks;
        for (int head = first; head < first + together; ++head)
          attend_block(batch, w, cache, block, head, head + 1 < first + together ? head + 1 : -1, thread);
      });
      return;
    }
    attend_split(batch, w, cache);
  }

  bool chunks() const {
    return std::any_of(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.count > 1; });
  }

  int longest() const {
    int longest = 0;
    for (const Block& block : blocks_) longest = std::max(longest, end_of(block));
    return longest;
  }

  // The position after the block's last token.
  int end_of(const Block& block) const { return positions_[block.first + block.count - 1] + 1; }

  int first_span(const BatonLayer& w, const Block& block) const {
    return w.window > 0 ? std::max(0, positions_[block.first] + 1 - w.window) / SPAN : 0;
  }

  // Attends `rows` queries of a block to one span. Queries of a token's group stand side by side.
  void span(const BatonBatch& batch, const BatonLayer& w, const Cache& cache, const Block& block, int head, int s, Next next,
            const char* queries, Scratch& scratch, float* most, float* total, float* sums) {
    const int group = kv_.group(), rows = block.count * group, first = positions_[block.first];
    attend_span<C>(scratch, cache, batch.tables + batch.rows[block.row * 4 + 3], head, queries, rows, w.scale, w.window, s,
                   end_of(block), next, [&](int r) { return first + r / group; }, most, total, sums);
  }

  // The block's queries of one KV head, side by side.
  const char* gather(const Block& block, int head, char* room) {
    const size_t bytes = (size_t)kv_.group() * model_.head_dim * 4 / C::VALUES;
    if (block.count == 1) return query(block.first, head);
    for (int i = 0; i < block.count; ++i) std::memcpy(room + i * bytes, query(block.first + i, head), bytes);
    return room;
  }

  void finish(const Block& block, int head, int r, const Partial& all) {
    const int group = kv_.group(), head_dim = model_.head_dim;
    float* to = attended_.get() + ((size_t)(block.first + r / group) * model_.num_heads + head * group + r % group) * head_dim;
    const __m512 by = _mm512_set1_ps(1.0f / all.total);
    for (int d = 0; d < head_dim; d += 16) _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_loadu_ps(all.sum + d), by));
  }

  void attend_block(const BatonBatch& batch, const BatonLayer& w, const Cache& cache, const Block& block, int head, int next_head,
                    int thread) {
    const int group = kv_.group(), rows = block.count * group, head_dim = model_.head_dim;
    Room& room = rooms_[thread];
    const char* queries = gather(block, head, room.queries.get());
    float* sums = room.sums.get();
    float* all_sums = room.all_sums.get();
    float most[MOST_QUERIES], total[MOST_QUERIES];
    Partial all[MOST_QUERIES];
    for (int r = 0; r < rows; ++r) {
      all[r] = {0, 0, all_sums + (size_t)r * head_dim};
      std::memset(all[r].sum, 0, (size_t)head_dim * 4);
    }
    const int begin = first_span(w, block), spans = (end_of(block) + SPAN - 1) / SPAN;
    for (int s = begin; s < spans; ++s) {
      const Next next = s + 1 < spans ? Next{head, s + 1} : Next{next_head, begin};
      span(batch, w, cache, block, head, s, next, queries, scratch_[thread], most, total, sums);
      for (int r = 0; r < rows; ++r) merge(all[r], {most[r], total[r], sums + (size_t)r * head_dim}, head_dim);
    }
    for (int r = 0; r < rows; ++r) finish(block, head, r, all[r]);
  }

  // Few blocks, long contexts: spans are parts of their own, merged afterwards in the same order.
  void attend_split(const BatonBatch& batch, const BatonLayer& w, const Cache& cache) {
    const int heads = model_.num_kv_heads, group = kv_.group(), head_dim = model_.head_dim;
    parts_.clear();
    size_t rows = 0;
    for (int b = 0; b < (int)blocks_.size(); ++b) {
      const int spans = (end_of(blocks_[b]) + SPAN - 1) / SPAN;
      for (int head = 0; head < heads; ++head)
        for (int s = first_span(w, blocks_[b]); s < spans; ++s) {
          parts_.push_back({b, head, s, rows});
          rows += ((size_t)blocks_[b].count * group + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        }
    }
    float* most = most_.at_least(rows);
    float* total = total_.at_least(rows);
    float* sums = sums_.at_least(rows * head_dim);
    team_.run((int)parts_.size(), [&](int part, int thread) {
      [[maybe_unused]] const Held mine;
      const SpanPart& p = parts_[part];
      const Block& block = blocks_[p.block];
      const char* queries = gather(block, p.head, rooms_[thread].queries.get());
      span(batch, w, cache, block, p.head, p.span, {-1, 0}, queries, scratch_[thread], most + p.at, total + p.at, sums + p.at * head_dim);
    });
    float* all_sums = rooms_[0].all_sums.get();
    for (size_t p = 0; p < parts_.size();) {
      size_t next = p;
      while (next < parts_.size() && parts_[next].block == parts_[p].block && parts_[next].head == parts_[p].head) ++next;
      const Block& block = blocks_[parts_[p].block];
      for (int r = 0; r < block.count * group; ++r) {
        Partial all{0, 0, all_sums};
        std::memset(all.sum, 0, (size_t)head_dim * 4);
        for (size_t i = p; i < next; ++i) {
          const size_t at = parts_[i].at + r;
          merge(all, {most[at], total[at], sums + at * head_dim}, head_dim);
        }
        finish(block, parts_[p].head, r, all);
      }
      p = next;
    }
  }

  void head(const BatonBatch& batch) {
    const int rows = batch.num_sampled;
    if (rows == 0) return;
    inputs_.shape(rows, model_.hidden);
    rows_of(rows, [&](int r, int thread) {
      normalize(inputs_, r, x(batch.sampled[r]), model_.norm, model_.hidden, model_.norm_eps, scratch(thread));
    });
    product<false>(inputs_, rows, model_.head, batch.logits, model_.vocab);
  }

  struct Clock {
    double* seconds;
    int64_t since_ns;

    // The time since the last lap belongs to the section.
    void lap(Section section) {
      if (seconds == nullptr) return;
      const int64_t now_ns = monotonic_ns();
      seconds[section] += (double)(now_ns - since_ns) * 1e-9;
      since_ns = now_ns;
    }
  };

  struct SpanPart {
    int block, head, span;
    size_t at;
  };

  // What a thread attends with, beside its `Scratch`: for `MOST_QUERIES`.
  struct Room {
    Buffer<char> queries;
    Buffer<float> sums, all_sums;
  };

  const BatonModel model_;
  Team& team_;
  KvShape kv_;
  char* keys_;
  char* values_;
  Buffer<float> x_, qkv_, attended_, gated_, cos_, sin_, wide_, most_, total_, sums_;
  Buffer<char> queries_;
  Activations<W> inputs_, hidden_;
  std::vector<int> positions_, row_of_;
  std::vector<Block> blocks_;
  std::vector<SpanPart> parts_;
  std::unique_ptr<Scratch[]> scratch_;
  std::vector<Room> rooms_;
  int width_ = 0;
  Clock clock_{};
};

}  // namespace baton
