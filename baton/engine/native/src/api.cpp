// What Python calls, through ctypes and so without its lock. One thread at a time calls into one engine.

#include <malloc.h>

#include <stdexcept>
#include <string>

#include "decoder.h"
#include "transport.h"

using namespace baton;

namespace {

struct Engine {
  Engine(int threads, const char* cores) : team(threads, cores) {}
  virtual ~Engine() = default;
  virtual void step(const BatonBatch& batch) = 0;
  // Where a layer's keys (plane 0) or values (plane 1) begin.
  char* plane_at(int plane, int layer) const { return pool + kv.layer_bytes() * ((size_t)plane * model.num_layers + layer); }
  Team team;
  BatonModel model;
  KvShape kv;
  char* pool;
};

template <class W, class C>
struct EngineOf final : Engine {
  EngineOf(const BatonModel& m, const BatonPool& p, int threads, const char* cores)
      : Engine(threads, cores), layers(m.layers, m.layers + m.num_layers), decoder(with(m, layers.data()), p, team) {
    model = with(m, layers.data());
    kv = {m.num_heads, m.num_kv_heads, m.head_dim, p.block_size, p.num_blocks, C::VALUES};
    pool = static_cast<char*>(p.data);
  }
  static BatonModel with(BatonModel m, BatonLayer* layers) {
    m.layers = layers;
    return m;
  }
  void step(const BatonBatch& batch) override { decoder.step(batch); }
  std::vector<BatonLayer> layers;
  Decoder<W, C> decoder;
};

// Nothing that is thrown crosses into Python: what it says, or null. Valid until the thread's next call.
template <class Body>
const char* failure_of(Body&& body) {
  static thread_local std::string told;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    told = error.what();
  }
  return told.c_str();
}

// Whether all that the model sums is a multiple of what a tile holds.
bool fits_tiles(const BatonModel& m) {
  const int unit = TILE_STEPS * 2;
  return m.hidden % unit == 0 && m.inner % unit == 0 && m.head_dim % unit == 0;
}

Engine* make_engine(const BatonModel& model, const BatonPool& pool, int threads, const char* cores, bool tiles) {
  const int formats = model.weights * 4 + model.kv;
  if (tiles && fits_tiles(model) && allow_tiles()) switch (formats) {
      case FORMAT_BF16 * 4 + FORMAT_BF16: return new EngineOf<TiledBF16, TiledBF16>(model, pool, threads, cores);
      case FORMAT_I8 * 4 + FORMAT_F32: return new EngineOf<TiledI8, F32>(model, pool, threads, cores);
      case FORMAT_I8 * 4 + FORMAT_BF16: return new EngineOf<TiledI8, TiledBF16>(model, pool, threads, cores);
      default: break;
    }
  switch (formats) {
    case FORMAT_F32 * 4 + FORMAT_F32: return new EngineOf<F32, F32>(model, pool, threads, cores);
    case FORMAT_BF16 * 4 + FORMAT_BF16: return new EngineOf<BF16, BF16>(model, pool, threads, cores);
    case FORMAT_I8 * 4 + FORMAT_F32: return new EngineOf<I8, F32>(model, pool, threads, cores);
    case FORMAT_I8 * 4 + FORMAT_BF16: return new EngineOf<I8, BF16>(model, pool, threads, cores);
    default: throw std::invalid_argument("a combination of formats that is not compiled");
  }
}

}  // namespace

extern "C" {

// Tells one layout of what Python gives from another: the structures' sizes in bytes, and how 8-bit weights are grouped.
int64_t baton_layout() {
  int64_t layout = 0;
  for (const int64_t part : {(int64_t)sizeof(BatonLayer), (int64_t)sizeof(BatonModel), (int64_t)sizeof(BatonPool), (int64_t)sizeof(BatonBatch),
                             (int64_t)GROUP})
    layout = layout << 12 | part;
  return layout;
}

// Bytes of a packed matrix.
int64_t baton_packed_bytes(int32_t format, int64_t n, int64_t k) {
  const int64_t panels = (n + PANEL - 1) / PANEL;
  const int64_t lanes = format == FORMAT_F32 ? k : format == FORMAT_BF16 ? (k + 1) / 2 : lanes_of_bytes(k);
  return panels * lanes * 4 * PANEL;
}

// Packs rows [n, k] of float32, bfloat16 or int8 (with its scales [n, groups], which are packed too).
void baton_pack(int32_t format, const void* rows, const uint16_t* row_scales, int64_t n, int64_t k, void* packed, uint16_t* scales) {
  const int64_t panels = (n + PANEL - 1) / PANEL;
  const int64_t row_bytes = k * (format == FORMAT_F32 ? 4 : format == FORMAT_BF16 ? 2 : 1);
  const int64_t lanes = baton_packed_bytes(format, PANEL, k) / (4 * PANEL);
  const char* from = static_cast<const char*>(rows);
  uint32_t* to = static_cast<uint32_t*>(packed);
  // 8-bit weights are stored with 128 added.
  const uint32_t flip = format == FORMAT_I8 ? 0x80808080u : 0;
  for (int64_t p = 0; p < panels; ++p) {
    const char* panel = from + p * PANEL * row_bytes;
    const int64_t full = std::min<int64_t>(PANEL, n - p * PANEL);
    for (int64_t s = 0; s < lanes; ++s, to += PANEL) {
      // The last lane of a row may be cut short.
      const int64_t bytes = std::clamp<int64_t>(row_bytes - s * 4, 0, 4);
      for (int64_t j = 0; j < PANEL; ++j) {
        uint32_t lane = 0;
        if (j < full) bytes == 4 ? std::memcpy(&lane, panel + j * row_bytes + s * 4, 4) : std::memcpy(&lane, panel + j * row_bytes + s * 4, bytes);
        to[j] = lane ^ flip;
      }
    }
  }
  if (format != FORMAT_I8) return;
  const int64_t groups = groups_of((int)lanes);
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < PANEL; ++j) {
        const int64_t row = p * PANEL + j;
        scales[(p * groups + g) * PANEL + j] = row < n ? row_scales[row * groups + g] : 0;
      }
}

// Memory in large pages, zero; null where there is none.
void* baton_allocate(int64_t bytes) {
  void* at = mmap(nullptr, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  madvise(at, (size_t)bytes, MADV_HUGEPAGE);
  return at;
}

void baton_free(void* at, int64_t bytes) { munmap(at, (size_t)bytes); }

// Fills in `engine`; returns why it could not, or null. `tiles`: whether it may use the processor's, where there are any.
const char* baton_engine(const BatonModel* model, const BatonPool* pool, int32_t threads, const char* cores, int32_t tiles, void** engine) {
#ifdef __GLIBC__
  // What loading took on the way is kept by the allocator otherwise.
  malloc_trim(0);
#endif
  return failure_of([&] { *engine = make_engine(*model, *pool, threads, cores, tiles != 0); });
}

void baton_engine_free(void* engine) { delete static_cast<Engine*>(engine); }

// Returns why it could not, which is for want of memory, or null.
const char* baton_step(void* engine, const BatonBatch* batch) {
  return failure_of([&] { static_cast<Engine*>(engine)->step(*batch); });
}

// Tokens [first, last) of a sequence between the pool and a wire plane [tokens, KV heads, D]; `plane` 0 holds keys, 1 values.
void baton_read_kv(void* engine, int32_t plane, int32_t layer, const int32_t* table, int32_t first, int32_t last, void* wire) {
  Engine& e = *static_cast<Engine*>(engine);
  move_kv<true>(e.team, e.kv, e.plane_at(plane, layer), plane == 0, table, first, last, static_cast<char*>(wire));
}

void baton_write_kv(void* engine, int32_t plane, int32_t layer, const int32_t* table, int32_t first, int32_t last, void* wire) {
  Engine& e = *static_cast<Engine*>(engine);
  move_kv<false>(e.team, e.kv, e.plane_at(plane, layer), plane == 0, table, first, last, static_cast<char*>(wire));
}

}  // extern "C"
