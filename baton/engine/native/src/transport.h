// KV between the pool's order and the wire's, [tokens, KV heads, D].
#pragma once

#include "attention.h"

namespace baton {

template <bool Read, class T>
void move_head(const KvShape& kv, char* tile, int lane, bool keys, T* wire) {
  // Both orders are strided: keys by dimension pairs, values by token pairs.
  if (keys) {
    T* at = reinterpret_cast<T*>(tile);
    if constexpr (sizeof(T) == 2) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(tile) + lane;
      for (int d = 0; d < kv.head_dim / 2; ++d)
        Read ? std::memcpy(wire + d * 2, pairs + d * 16, 4) : std::memcpy(pairs + d * 16, wire + d * 2, 4);
    } else {
      for (int d = 0; d < kv.head_dim; ++d) Read ? void(wire[d] = at[d * 16 + lane]) : void(at[d * 16 + lane] = wire[d]);
    }
    return;
  }
  if constexpr (sizeof(T) == 2) {
    T* at = reinterpret_cast<T*>(tile) + (size_t)(lane / 2) * kv.head_dim * 2 + lane % 2;
    for (int d = 0; d < kv.head_dim; ++d) Read ? void(wire[d] = at[d * 2]) : void(at[d * 2] = wire[d]);
  } else {
    T* at = reinterpret_cast<T*>(tile) + (size_t)lane * kv.head_dim;
    Read ? std::memcpy(wire, at, (size_t)kv.head_dim * 4) : std::memcpy(at, wire, (size_t)kv.head_dim * 4);
  }
}

template <bool Read>
void move_kv(const KvShape& kv, char* pool, int num_layers, int plane, int layer, const int32_t* table, int first, int last, char* wire) {
  char* base = pool + kv.layer_bytes() * ((size_t)plane * num_layers + layer);
  const Cache cache{base, base, &kv};
  const size_t value_bytes = kv.values == 2 ? 2 : 4;
  const size_t head_bytes = (size_t)kv.head_dim * value_bytes, token_bytes = head_bytes * kv.num_kv_heads;
  for (int from = first; from < last;) {
    const int to = std::min(last, (from / TOKENS + 1) * TOKENS);
    for (int h = 0; h < kv.num_kv_heads; ++h) {
      char* tile = base + cache.tile_at(table, from, h);
      for (int t = from; t < to; ++t) {
        char* at = wire + (size_t)(t - first) * token_bytes + h * head_bytes;
        if (value_bytes == 2) {
          move_head<Read, uint16_t>(kv, tile, t % TOKENS, plane == 0, reinterpret_cast<uint16_t*>(at));
        } else {
          move_head<Read, float>(kv, tile, t % TOKENS, plane == 0, reinterpret_cast<float*>(at));
        }
      }
    }
    from = to;
  }
}

}  // namespace baton
