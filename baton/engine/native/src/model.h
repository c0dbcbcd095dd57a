// What Python tells of a model and of a step, field by field as it declares them (`baton.engine.native.library`).
#pragma once

#include <cstdint>

namespace baton {

enum Format : int32_t { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_I8 = 2 };

// Where a step's time goes.
enum Section { SECTION_LINEAR, SECTION_ATTENTION, SECTION_REST };

extern "C" {
struct BatonMatrix {
  void* data;
  uint16_t* scales;
  float* bias;
  int32_t n;
  int32_t k;
};

struct BatonLayer {
  BatonMatrix qkv, out, gate_up, down;
  float* attention_norm;
  float* mlp_norm;
  float* q_norm;  // [D], or none
  float* k_norm;
  float scale;
  int32_t window;  // 0: none
};

struct BatonModel {
  BatonLayer* layers;
  BatonMatrix embedding;  // the head's where they are tied
  BatonMatrix head;
  float* norm;
  float* frequencies;     // [D / 2], radians a position
  float rope_scale;
  float norm_eps;
  int32_t num_layers, hidden, inner, num_heads, num_kv_heads, head_dim, vocab;
  int32_t weights;        // Format
  int32_t kv;             // Format
};

struct BatonPool {
  void* data;  // [2][layer] as in cache.h
  int32_t num_blocks, block_size;
};

struct BatonBatch {
  const int32_t* tokens;     // [T]
  const int32_t* rows;       // [R][4]: first token, number of tokens, position of the first, start in `tables`
  const int32_t* tables;     // block tables, one after another
  const int32_t* sampled;    // [S]: tokens whose logits are wanted
  float* logits;             // [S][V]
  double* seconds;           // [Section], added to; none: no clocks
  int32_t num_tokens, num_rows, num_sampled;
};
}

}  // namespace baton
