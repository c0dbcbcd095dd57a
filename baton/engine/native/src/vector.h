// Arithmetic on AVX-512 registers that the kernels share.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace baton {

constexpr float LOG2_E = 1.44269504088896341f;

// p0 + p1 x + p2 x^2 and so on.
template <class... More>
inline __m512 polynomial(__m512 x, float first, More... more) {
  if constexpr (sizeof...(more) == 0) {
    return _mm512_set1_ps(first);
  } else {
    return _mm512_fmadd_ps(polynomial(x, more...), x, _mm512_set1_ps(first));
  }
}

// 2^x, of x up to 126, and as if x were -100 below that: numbers too small to be normal take some processors a hundred times longer.
// To about one unit in the last place where `Exact`, else to 2^-18, which bfloat16 does not see. Of what is no number, none.
template <bool Exact>
inline __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x);
  if constexpr (Exact) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // Taylor's series in r ln(2): |r| is at most 1 / 2.
    return _mm512_scalef_ps(polynomial(_mm512_sub_ps(x, n), 1.0f, 6.9314718056e-1f, 2.4022650696e-1f, 5.5504108665e-2f, 9.6181291076e-3f,
                                       1.3333558146e-3f, 1.5403530394e-4f, 1.5252733804e-5f), n);
  } else {
    // Of [0, 1), the polynomial of this degree whose greatest relative error is the least. Scaling rounds x down.
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(polynomial(r, 1.0000025934f, 6.9300383447e-1f, 2.4144275689e-1f, 5.2011460619e-2f, 1.3534167912e-2f), x);
  }
}

inline float exp2_one(float x) { return _mm512_cvtss_f32(exp2_ps<true>(_mm512_set1_ps(x))); }

// x / (1 + e^-x); exact as `exp2_ps` is. Of what is no number, none.
template <bool Exact>
inline __m512 silu_ps(__m512 x) {
  // Where the bound shows, the result is 0.
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(115.0f), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
  const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_ps<Exact>(power));
  // An estimate of 14 bits, and one step of Newton's method: a division takes longer.
  const __m512 r = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(x, _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f))));
}

inline uint16_t to_bf16(float x) {
  const __m256i r = (__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(x));
  return (uint16_t)_mm256_extract_epi16(r, 0);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline __m256i to_bf16_ps(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline float from_f16(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }

// The first `count` lanes, at most 16.
inline __mmask16 first_lanes(int count) {
  return (__mmask16)_bzhi_u32(0xFFFF, (unsigned)std::clamp(count, 0, 16));
}

}  // namespace baton
