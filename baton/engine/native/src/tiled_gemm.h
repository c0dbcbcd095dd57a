// Matrix products on tiles, and by vectors that sum as tiles do.
//
// The rows of a left factor lie tile by tile, up to a multiple of 16 rows:
//
//     [rows / 16][K / values in 64 bytes][16 rows][64 bytes]
//
// A tile's products of bfloat16 are summed in an order of its own. Vectors sum in the same order where that is quicker, for a few
// rows, so that a row's result still depends on nothing but the row. Products of 8-bit values are exact in any order.
#pragma once

#include "tiles.h"

namespace baton {

// So few rows are multiplied by vectors, and are stored as for them. They wait for memory, which vectors read faster.
template <class Op>
constexpr int FEW_ROWS = 0;
template <>
constexpr int FEW_ROWS<TiledBF16> = 2;
template <>
constexpr int FEW_ROWS<TiledI8> = 4;

constexpr int TILED_BLOCK = 9;          // tiles of a panel that stay in the first cache while many rows pass
constexpr int PASSING_BLOCK = 32;       // tiles of a panel that no more than 32 rows pass
constexpr size_t TILED_LEFT = 1 << 20;  // bytes of rows that stay in the second cache while panels pass
constexpr int GROUP_TILES = GROUP_STEPS / TILE_STEPS;

// The parts of a panel that rows pass one after the other.
inline int parts_of(int tiles, int rows) {
  const int most = rows <= 2 * TILE_ROWS ? PASSING_BLOCK : TILED_BLOCK;
  return (tiles + most - 1) / most;
}

// What is asked of memory before its turn, some cache lines with each piece of work: all at once would stop the processor until memory
// has taken them, and memory would wait while none are asked for. It answers several streams of lines sooner than one.
class Soon {
 public:
  // `lines_each` in each stream, beginning with line `first`.
  Soon(const char* begin, int lines_each, int first) : at_(begin + (size_t)first * 64), apart_((size_t)lines_each * 64) {}

  // The next `lines` of each stream.
  void ask(int lines) {
    for (int i = 0; i < lines; ++i, at_ += 64)
      for (int s = 0; s < STREAMS; ++s) _mm_prefetch(at_ + s * apart_, _MM_HINT_T1);
  }

  static constexpr int STREAMS = 4;

 private:
  const char* at_;
  size_t apart_;
};

// Lines of a panel's tile that each stream asks for.
constexpr int TILE_LINES = PANEL_TILE_BYTES / 64 / Soon::STREAMS;

// Up to 32 rows, the lower 16 of which may be none, by one panel, over tiles [first, last) along K: `out` [32][32] holds the sums up
// to `first`, and then up to `last`. With each tile, `lines` of each stream are asked for.
template <bool Lower>
inline void tiled_sums(const char* a, size_t lower, const char* b, int first, int last, Soon soon, int lines, float* out) {
  constexpr size_t LD = PANEL * 4;
  float* below = out + TILE_ROWS * PANEL;
  settle();
  zero_sums();
  if (first > 0) {
    _tile_loadd(0, out, LD);
    _tile_loadd(1, out + 16, LD);
    if constexpr (Lower) {
      _tile_loadd(2, below, LD);
      _tile_loadd(3, below + 16, LD);
    }
  }
  for (int k = first; k < last; ++k) {
    const char* x = a + (size_t)k * TILE_BYTES;
    const char* w = b + (size_t)k * PANEL_TILE_BYTES;
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, LANE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + 64, LANE_BYTES);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, x + lower, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    soon.ask(lines);
  }
  _tile_stored(0, out, LD);
  _tile_stored(1, out + 16, LD);
  if constexpr (Lower) {
    _tile_stored(2, below, LD);
    _tile_stored(3, below + 16, LD);
  }
}

// A panel times the rows [first, first + rows), whose tiles begin at `a`: gives 32 rows at a time, or what is left, to `finish`, so that
// what it does goes on while the next ones are multiplied.
template <class Epilogue>
void tiled_panel(TiledBF16, const char* a, Rows, int first, int rows, const Matrix& w, int panel, float* sums, Epilogue&& finish) {
  const int tiles = w.steps / TILE_STEPS, pairs = (rows + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
  const size_t lower = (size_t)tiles * TILE_BYTES;
  const char* b = w.data + (size_t)panel * tiles * PANEL_TILE_BYTES;
  const int parts = parts_of(tiles, rows);
  // All pairs of rows together ask for the next part, once.
  const int lines = (TILE_LINES + pairs - 1) / pairs;
  for (int part = 0; part < parts; ++part) {
    const int from = tiles * part / parts, to = tiles * (part + 1) / parts;
    for (int p = 0; p < pairs; ++p) {
      const int row = p * 2 * TILE_ROWS, count = std::min(2 * TILE_ROWS, rows - row);
      const Soon soon(b + (size_t)to * PANEL_TILE_BYTES, (to - from) * TILE_LINES, p * (to - from) * lines);
      const auto sum = count > TILE_ROWS ? tiled_sums<true> : tiled_sums<false>;
      float* out = sums + (size_t)row * PANEL;
      sum(a + 2 * p * lower, lower, b, from, to, soon, lines, out);
      if (part + 1 == parts) finish(first + row, count, panel, 1, out);
    }
  }
}

// The products of two groups, [group][16 rows][32]; of one where no more than its `tiles` along K are left. With each of a tile's two,
// `lines` of each stream are asked for.
inline void tiled_dots(const char* x, const char* w, int tiles, int32_t* dots, Soon& soon, int lines) {
  constexpr size_t LD = PANEL * 4;
  settle();
  zero_sums();
  int k = 0;
  for (; k < std::min(tiles, GROUP_TILES); ++k, x += TILE_BYTES, w += PANEL_TILE_BYTES) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, LANE_BYTES);
    _tile_dpbsud(0, 4, 6);
    soon.ask(lines);
    _tile_loadd(7, w + 64, LANE_BYTES);
    _tile_dpbsud(1, 4, 7);
    soon.ask(lines);
  }
  _tile_stored(0, dots, LD);
  _tile_stored(1, dots + 16, LD);
  if (k == tiles) return;
  for (; k < tiles; ++k, x += TILE_BYTES, w += PANEL_TILE_BYTES) {
    _tile_loadd(5, x, 64);
    _tile_loadd(6, w, LANE_BYTES);
    _tile_dpbsud(2, 5, 6);
    soon.ask(lines);
    _tile_loadd(7, w + 64, LANE_BYTES);
    _tile_dpbsud(3, 5, 7);
    soon.ask(lines);
  }
  _tile_stored(2, dots + TILE_ROWS * PANEL, LD);
  _tile_stored(3, dots + TILE_ROWS * PANEL + 16, LD);
}

// Adds them, scaled, to the sums [rows][32].
template <int Count>
inline void scale_dots(const int32_t* dots, Rows a, int row, int rows, int group, const uint16_t* scales, float* sums) {
  const int groups = a.groups();
  __m512 scale[Count][2];
  for (int g = 0; g < Count; ++g)
    for (int v = 0; v < 2; ++v) scale[g][v] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + g * PANEL + v * 16)));
  for (int m = 0; m < rows; ++m) {
    float* out = sums + (size_t)m * PANEL;
    __m512 sum[2] = {_mm512_load_ps(out), _mm512_load_ps(out + 16)};
#pragma GCC unroll 2
    for (int g = 0; g < Count; ++g) {
      const size_t at = (size_t)(row + m) * groups + group + g;
      const __m512i start = _mm512_set1_epi32(a.starts[at]);
      const __m512 by = _mm512_set1_ps(a.scales[at]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m512i dot = _mm512_add_epi32(start, _mm512_load_si512(dots + (g * TILE_ROWS + m) * PANEL + v * 16));
        sum[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale[g][v], by), sum[v]);
      }
    }
    _mm512_store_ps(out, sum[0]);
    _mm512_store_ps(out + 16, sum[1]);
  }
}

template <class Epilogue>
void tiled_panel(TiledI8, const char* x, Rows a, int first, int rows, const Matrix& w, int panel, float* sums, Epilogue&& finish) {
  alignas(64) int32_t dots[2][2 * TILE_ROWS * PANEL];
  const int groups = a.groups(), along = w.steps / TILE_STEPS, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const char* b = w.data + (size_t)panel * along * PANEL_TILE_BYTES;
  const uint16_t* scales = w.scales + (size_t)panel * groups * PANEL;
  std::memset(sums, 0, (size_t)rows * PANEL * 4);
  const int parts = parts_of(along, rows);
  for (int part = 0; part < parts; ++part) {
    const int from = groups * part / parts, to = groups * (part + 1) / parts, end = std::min(to * GROUP_TILES, along);
    for (int t = 0; t < tiles; ++t) {
      const int row = t * TILE_ROWS, count = std::min(TILE_ROWS, rows - row);
      const char* left = x + (size_t)t * along * TILE_BYTES;
      float* out = sums + (size_t)row * PANEL;
      // All rows together ask for the next part, once.
      const int lines = (TILE_LINES / 2 + tiles - 1) / tiles;
      Soon soon(b + (size_t)end * PANEL_TILE_BYTES, (end - from * GROUP_TILES) * TILE_LINES, 2 * t * (end - from * GROUP_TILES) * lines);
      // While the tiles multiply two groups, what they have made of the two before is scaled.
      for (int g = from, turn = 0; g < to + 2; g += 2, turn ^= 1) {
        if (g < to) {
          const int k = g * GROUP_TILES;
          tiled_dots(left + (size_t)k * TILE_BYTES, b + (size_t)k * PANEL_TILE_BYTES, std::min(end - k, 2 * GROUP_TILES), dots[turn], soon,
                     lines);
        }
        const int before = g - 2;
        if (before < from) continue;
        if (to - before >= 2) {
          scale_dots<2>(dots[turn ^ 1], a, first + row, count, before, scales + before * PANEL, out);
        } else {
          scale_dots<1>(dots[turn ^ 1], a, first + row, count, before, scales + before * PANEL, out);
        }
      }
      if (part + 1 == parts) finish(first + row, count, panel, 1, out);
    }
  }
}

// Numbers too small to be normal are 0, until the end of the scope, as they are on tiles.
class Flushing {
 public:
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(before_ | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO); }
  ~Flushing() { _mm_setcsr(before_); }
  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;

 private:
  static constexpr unsigned FLUSH_TO_ZERO = 1u << 15, DENORMALS_ARE_ZERO = 1u << 6;
  unsigned before_;
};

// 8-bit rows on a processor with tiles. Its cores keep more streams of weights going than others', and their first caches fewer lines
// that are yet to come.
struct BesideTilesI8 : I8 {};
template <int MR, int NP>
struct Tile<BesideTilesI8, MR, NP> : TileI8<MR, NP, _MM_HINT_T1> {};

template <>
constexpr int MOST_SUMS<TiledBF16> = 4;

// Sums bfloat16 as a tile does: of 16 lanes along K, the even and the odd values, each with one rounding a product; both sums
// together; and that to what was there (Intel, "Architecture Instruction Set Extensions", TDPBF16PS).
template <int MR, int NP>
struct Tile<TiledBF16, MR, NP> {
  static void run(Rows a, const char* b, const uint16_t*, size_t panel_bytes, int, int last, const char* soon, size_t stride, float* out) {
    constexpr int NV = 2 * NP;
    const Flushing mine;
    const __m512i high = _mm512_set1_epi32((int)0xFFFF0000);
    __m512 sum[MR][NV];
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_setzero_ps();
    for (int tile = 0; tile < last; tile += TILE_STEPS) {
      __m512 even[MR][NV], odd[MR][NV];
      for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) even[m][v] = odd[m][v] = _mm512_setzero_ps();
#pragma GCC unroll 1
      for (int s = tile; s < tile + TILE_STEPS; ++s, soon += stride) {
        __m512 x[MR][2];
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) {
          int32_t lane;
          std::memcpy(&lane, a.data + m * a.row_bytes() + (size_t)s * 4, 4);
          const __m512i both = _mm512_set1_epi32(lane);
          x[m][0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
          x[m][1] = _mm512_castsi512_ps(_mm512_and_si512(both, high));
        }
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          const size_t from = (v / 2) * panel_bytes + (v % 2) * 64;
          const __m512i w = _mm512_loadu_si512(b + from + (size_t)s * LANE_BYTES);
          _mm_prefetch(soon + from, _MM_HINT_T0);
          const __m512 w_even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), w_odd = _mm512_castsi512_ps(_mm512_and_si512(w, high));
#pragma GCC unroll 4
          for (int m = 0; m < MR; ++m) {
            even[m][v] = _mm512_fmadd_ps(x[m][0], w_even, even[m][v]);
            odd[m][v] = _mm512_fmadd_ps(x[m][1], w_odd, odd[m][v]);
          }
        }
      }
      for (int m = 0; m < MR; ++m)
        for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_add_ps(sum[m][v], _mm512_add_ps(even[m][v], odd[m][v]));
    }
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + (m * NV + v) * 16, sum[m][v]);
  }
};

inline TiledBF16 on_vectors(TiledBF16) { return {}; }
inline BesideTilesI8 on_vectors(TiledI8) { return {}; }

// Every row times every panel; as `multiply`, with rows in tiles.
template <class Op, class Epilogue>
void multiply_tiled(Team& team, Rows a, int rows, const Matrix& w, Epilogue&& finish) {
  if (rows <= FEW_ROWS<Op>) return multiply<decltype(on_vectors(Op{}))>(team, a, rows, w, finish);
  const int panels = w.panels(), tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, homes = team.homes(rows);
  const size_t tile_bytes = (size_t)w.steps * 4 * TILE_ROWS;
  const int most = (int)std::clamp<size_t>(TILED_LEFT / tile_bytes, 2, MOST_ROWS / TILE_ROWS);
  const int row_blocks = (tiles + homes * most - 1) / (homes * most);
  const int cuts = team.size() == 1 ? 1 : std::min(panels, 3 * team.size());
  // All rows of a home pass a part of the panels, which stays in the caches, before the next.
  team.run_at_home(homes, row_blocks * cuts, [&](int home, int part, int) {
    const Tiles<> mine;
    alignas(64) float sums[MOST_ROWS * PANEL];
    const int block = home * row_blocks + part % row_blocks, blocks = homes * row_blocks, c = part / row_blocks;
    const int from = tiles * block / blocks, first = from * TILE_ROWS;
    const int count = std::min(tiles * (block + 1) / blocks * TILE_ROWS, rows) - first;
    const char* x = a.data + from * tile_bytes;
    const int last = (int)((int64_t)panels * (c + 1) / cuts);
    for (int panel = (int)((int64_t)panels * c / cuts); panel < last; ++panel) {
      tiled_panel(Op{}, x, a, first, count, w, panel, sums, finish);
    }
  });
}

}  // namespace baton
