// The paged KV pool: where it keeps a token's keys and values.
//
// They have the order in which they are multiplied. A block holds S tokens, S a multiple of 16, for each KV head; a lane is one float32
// or two bfloat16:
//
//     keys    [layer][block][KV head][S / 16][D / values][16 tokens]     lanes along the head's dimensions
//     values  [layer][block][KV head][S / 16][16 / values][D]            lanes along the tokens
#pragma once

#include "vector.h"

namespace baton {

constexpr int TOKENS = 16;  // of a tile

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

// Clears the values of tokens [lane, 16) of a tile. What is left there of another sequence may be no numbers, and attention weighs tokens
// that nobody sees too, with 0. Their keys it does not miss: it reads no score of theirs.
inline void clear_values(char* tile, int lane, int head_dim, int values) {
  const size_t token_bytes = (size_t)head_dim * (4 / values);
  if (values == 2 && lane % 2 == 1) {
    char* pairs = tile + (lane - 1) * token_bytes;
    for (int d = 0; d < head_dim; ++d) std::memset(pairs + d * 4 + 2, 0, 2);
    ++lane;
  }
  std::memset(tile + lane * token_bytes, 0, (TOKENS - lane) * token_bytes);
}

}  // namespace baton
