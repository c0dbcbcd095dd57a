// KV between the pool's order and the wire's, [tokens, KV heads, D].
#pragma once

#include "attention.h"

namespace baton {

// 16 rows of 16 words become columns.
inline void transpose(const char* from, size_t from_stride, char* to, size_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Each quarter of a[4i + j] holds column 4q + j of rows 4i to 4i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xDD);
    const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xDD);
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xDD));
    _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD));
  }
}

template <bool Read>
void move_word(char* tile, char* wire) {
  Read ? std::memcpy(wire, tile, 4) : std::memcpy(tile, wire, 4);
}

// Keys of tokens [from, to) of a tile. A token's words, a number or a pair of them each, are a column of the tile.
template <bool Read>
void move_keys(int words, char* tile, int from, int to, char* wire, size_t token_bytes) {
  int word = 0;
  if (to - from == TOKENS) {
    for (; word + 16 <= words; word += 16) {
      char *in_tile = tile + word * 64, *in_wire = wire + word * 4;
      Read ? transpose(in_tile, 64, in_wire, token_bytes) : transpose(in_wire, token_bytes, in_tile, 64);
    }
  }
  for (int t = from; t < to; ++t)
    for (int w = word; w < words; ++w) move_word<Read>(tile + w * 64 + t * 4, wire + (t - from) * token_bytes + w * 4);
}

// Values of tokens [from, to) of a tile, 16 bits each: the numbers of two tokens alternate.
template <bool Read>
void move_value_pairs(int head_dim, char* tile, int from, int to, char* wire, size_t token_bytes) {
  for (int t = from; t < to; ++t) {
    char* row = wire + (t - from) * token_bytes;
    char* pairs = tile + (size_t)(t / 2) * head_dim * 4;
    if (t % 2 == 0 && t + 1 < to) {
      for (int d = 0; d < head_dim; d += 16) {
        const __mmask16 some = first_lanes(head_dim - d);
        if constexpr (Read) {
          const __m512i both = _mm512_maskz_loadu_epi32(some, pairs + d * 4);
          _mm512_mask_cvtepi32_storeu_epi16(row + d * 2, some, both);
          _mm512_mask_cvtepi32_storeu_epi16(row + token_bytes + d * 2, some, _mm512_srli_epi32(both, 16));
        } else {
          const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row + d * 2));
          const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, row + token_bytes + d * 2));
          _mm512_mask_storeu_epi32(pairs + d * 4, some, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
      }
      ++t;
      continue;
    }
    for (int d = 0; d < head_dim; ++d) {
      char* number = pairs + d * 4 + t % 2 * 2;
      Read ? std::memcpy(row + d * 2, number, 2) : std::memcpy(number, row + d * 2, 2);
    }
  }
}

template <bool Read>
void move_values(int head_dim, char* tile, int from, int to, char* wire, size_t token_bytes) {
  for (int t = from; t < to; ++t) {
    char *row = wire + (t - from) * token_bytes, *in_tile = tile + (size_t)t * head_dim * 4;
    Read ? std::memcpy(row, in_tile, (size_t)head_dim * 4) : std::memcpy(in_tile, row, (size_t)head_dim * 4);
  }
}

// Tokens [first, last) of a sequence in one plane of one layer; `wire` is where the first of them goes or comes from.
template <bool Read>
void move_tokens(const KvShape& kv, bool keys, char* base, const int32_t* table, int first, int last, char* wire) {
  const Cache cache{base, base, &kv};
  const size_t head_bytes = (size_t)kv.head_dim * (kv.values == 2 ? 2 : 4), token_bytes = head_bytes * kv.num_kv_heads;
  for (int at = first; at < last;) {
    const int end = std::min(last, (at / TOKENS + 1) * TOKENS);
    const int from = at % TOKENS, to = from + end - at;
    for (int h = 0; h < kv.num_kv_heads; ++h) {
      char* tile = base + cache.tile_at(table, at, h);
      char* rows = wire + (size_t)(at - first) * token_bytes + h * head_bytes;
      if (!Read && !keys && from == 0 && to < TOKENS) clear_values(tile, to, kv.head_dim, kv.values);
      if (keys) {
        move_keys<Read>((int)(head_bytes / 4), tile, from, to, rows, token_bytes);
      } else if (kv.values == 2) {
        move_value_pairs<Read>(kv.head_dim, tile, from, to, rows, token_bytes);
      } else {
        move_values<Read>(kv.head_dim, tile, from, to, rows, token_bytes);
      }
    }
    at = end;
  }
}

template <bool Read>
void move_kv(Team& team, const KvShape& kv, char* base, bool keys, const int32_t* table, int first, int last, char* wire) {
  // Whole tiles, so that no two threads write to one.
  constexpr int PART_TOKENS = 8 * TOKENS;
  const size_t token_bytes = (size_t)kv.num_kv_heads * kv.head_dim * (kv.values == 2 ? 2 : 4);
  const int origin = first / PART_TOKENS;
  const Team::Step under_way(team);
  team.run((last + PART_TOKENS - 1) / PART_TOKENS - origin, [&](int part, int) {
    const int from = std::max(first, (origin + part) * PART_TOKENS), to = std::min(last, (origin + part + 1) * PART_TOKENS);
    move_tokens<Read>(kv, keys, base, table, from, to, wire + (from - first) * token_bytes);
  });
}

}  // namespace baton
