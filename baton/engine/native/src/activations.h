// Rows of activations, rounded for the matrix product that takes them.
#pragma once

#include <cmath>
#include <memory>
#include <new>

#include "tiled_gemm.h"

namespace baton {

template <class T>
class Buffer {
 public:
  T* at_least(size_t count) {
    if (count > size_) {
      void* larger = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
      if (larger == nullptr) throw std::bad_alloc();
      data_.reset(static_cast<T*>(larger));
      size_ = count;
    }
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

// Rows of activations in the format in which a matrix product takes them.
template <class Op>
class Activations {
 public:
  void shape(int rows, int k) {
    steps_ = lanes(k);
    tiled_ = TILED<Op> && rows > FEW_ROWS<Op>;
    const int filled = tiled_ ? (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : rows;
    data_.at_least((size_t)filled * steps_ * 4);
    if constexpr (Op::VALUES == 4) {
      scales_.at_least((size_t)rows * groups_of(steps_));
      starts_.at_least((size_t)rows * groups_of(steps_));
    }
  }

  static int lanes(int k) { return Op::VALUES == 4 ? (int)lanes_of_bytes(k) : (k + Op::VALUES - 1) / Op::VALUES; }

  Rows rows() const { return {data_.get(), scales_.get(), starts_.get(), steps_}; }

  // Rounds a row of `k` values, a multiple of 16.
  void put(int row, const float* x, int k) {
    if constexpr (Op::VALUES == 4) {
      quantize(row, x, k);
    } else {
      for (int i = 0; i < k; i += 16) put_16(row, i, _mm512_loadu_ps(x + i));
    }
  }

  // Rounds 16 values of a row, from one that is a multiple of 16 on. Not of an 8-bit format.
  void put_16(int row, int from, __m512 x) {
    static_assert(Op::VALUES < 4);
    if constexpr (Op::VALUES == 1) {
      _mm512_storeu_ps((float*)at(row, from * 4), x);
    } else {
      _mm256_storeu_si256((__m256i*)at(row, from * 2), to_bf16_ps(x));
    }
  }

 private:
  // Where a row's bytes from `from` on lie, to the end of their 64.
  char* at(int row, size_t from) {
    if (TILED<Op> && tiled_) {
      const size_t tile = (size_t)(row / TILE_ROWS) * (steps_ / TILE_STEPS) + from / 64;
      return data_.get() + tile * TILE_BYTES + row % TILE_ROWS * 64 + from % 64;
    }
    return data_.get() + (size_t)row * steps_ * 4 + from;
  }

  // By groups: 127 stands for the greatest magnitude. What is no number makes a scale that is none either.
  void quantize(int row, const float* x, int k) {
    const int groups = groups_of(steps_), parts = steps_ / 4;
    const __m512i ones = _mm512_set1_epi8(1);
    for (int g = 0; g < groups; ++g) {
      constexpr int PARTS = GROUP / 16;
      const int count = std::min(PARTS, parts - g * PARTS);
      __m512 part[PARTS];
      __m512 most = _mm512_setzero_ps();
      __mmask16 none = 0;
      for (int i = 0; i < count; ++i) {
        const int value = g * GROUP + i * 16;
        part[i] = value < k ? _mm512_loadu_ps(x + value) : _mm512_setzero_ps();
        most = _mm512_max_ps(most, _mm512_abs_ps(part[i]));
        none |= _mm512_cmp_ps_mask(part[i], part[i], _CMP_UNORD_Q);
      }
      const float scale = none != 0 ? NAN : _mm512_reduce_max_ps(most) / 127.0f;
      const __m512 by = _mm512_set1_ps(scale);
      __m512i sums = _mm512_setzero_si512();
      for (int i = 0; i < count; i += 4) {
        alignas(64) int8_t bytes[64];
        for (int j = 0; j < 4; ++j) {
          const __m512 q = scale > 0 ? _mm512_div_ps(part[i + j], by) : _mm512_setzero_ps();
          _mm_store_si128((__m128i*)(bytes + j * 16), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(q)));
        }
        const __m512i all = _mm512_load_si512(bytes);
        _mm512_storeu_si512(at(row, (size_t)g * GROUP + i * 16), all);
        sums = _mm512_dpbusd_epi32(sums, ones, all);
      }
      scales_.get()[row * groups + g] = scale;
      starts_.get()[row * groups + g] = -128 * _mm512_reduce_add_epi32(sums);
    }
  }

  Buffer<char> data_;
  Buffer<float> scales_;
  Buffer<int32_t> starts_;
  int steps_ = 0;
  bool tiled_ = false;
};

// x / rms(x) * weight, rounded.
template <class Op>
void normalize(Activations<Op>& to, int row, const float* x, const float* weight, int n, float eps, float* scratch) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)n + eps));
  for (int i = 0; i < n; i += 16)
    _mm512_storeu_ps(scratch + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), by), _mm512_loadu_ps(weight + i)));
  to.put(row, scratch, n);
}

}  // namespace baton
