// Matrix-vector products, gated FFNs that skip rows, and attention over a cache, as XLA custom calls for CPUs.
// What each computes is said, and written once more in jnp, in reference.py; native.py builds and calls this file.
//
// Weights are float32 or bfloat16 and lie in rows: gate, up, down [E, F, D], so a neuron that is skipped is three rows
// that are never read. Vectors are float32. Work is cut in pieces whose number depends on the shapes only, and results
// of pieces are added up in their order, so that they do not depend on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "machine.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

struct Rows {  // on the weights of one dtype; see rows.inc
  void (*arrange)(const float* x, int64_t size, float* out);
  void (*dot)(const void* matrix, const int32_t* rows, int64_t count, const float* x, int64_t n, int64_t size,
              float* out);
  void (*add)(const void* matrix, const int32_t* rows, int64_t count, const float* h, int64_t n, int64_t size,
              float* out);
  void (*collect)(const float* partial, int64_t chunks, int64_t stride, float weight, int64_t size, float* out);
};
struct Isa {
  Rows float32, bfloat16;
  void (*attend)(const float* query, const float* key, const float* value, int64_t group, int64_t count, int64_t size,
                 float scale, float cap, float* out);
  uint64_t (*read_all)(const void* data, int64_t bytes);
};

#define INSTRUCTIONS "rows.inc"
#include "isas.h"

const Rows* rows_of(const Isa& isa, ffi::DataType type) {
  if (type == ffi::DataType::F32) return &isa.float32;
  return type == ffi::DataType::BF16 ? &isa.bfloat16 : nullptr;
}

int64_t width(ffi::DataType type) { return type == ffi::DataType::F32 ? 4 : 2; }

// Vectors of x [n, size], those in `pick`, arranged.
void arrange(const Rows& rows, const float* x, const std::vector<int32_t>& pick, int64_t size, float* out) {
  for (size_t j = 0; j < pick.size(); ++j) rows.arrange(x + pick[j] * size, size, out + j * size);
}

constexpr int64_t kBatch = 8;  // vectors that meet a row while it is in the cache
constexpr int64_t kPiece = 1 << 18;  // bytes of weights of a piece of work, about

// out[j][f] = matrix[f] . x[j] for x [n, size] arranged and all rows f < total.
void product(const ffi::ThreadPool& pool, const Rows& rows, const void* matrix, int64_t row_bytes, int64_t total,
             const float* x, int64_t n, int64_t size, float* out) {
  const int64_t step = std::max<int64_t>(4, kPiece / row_bytes / 4 * 4);
  parallel(pool, (total + step - 1) / step, [&](int64_t piece) {
    thread_local std::vector<int32_t> list;
    thread_local std::vector<float> part;
    const int64_t low = piece * step, count = std::min(step, total - low);
    list.resize(count);
    std::iota(list.begin(), list.end(), static_cast<int32_t>(low));
    part.resize(count * kBatch);
    for (int64_t j = 0; j < n; j += kBatch) {
      const int64_t some = std::min(kBatch, n - j);
      rows.dot(matrix, list.data(), count, x + j * size, some, size, part.data());
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < some; ++k) out[(j + k) * total + low + i] = part[i * some + k];
    }
  });
}

ffi::Error Linear(ffi::ThreadPool pool, int64_t level, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w,
                  ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const Rows* rows = rows_of(BEST(level, isa), w.element_type());
  if (!rows) return ffi::Error::InvalidArgument("weights must be float32 or bfloat16");
  const int64_t n = x.dimensions()[0], size = x.dimensions()[1], total = w.dimensions()[0];
  thread_local std::vector<float> arranged;
  arranged.resize(n * size);
  for (int64_t j = 0; j < n; ++j) rows->arrange(x.typed_data() + j * size, size, arranged.data() + j * size);
  product(pool, *rows, w.untyped_data(), size * width(w.element_type()), total, arranged.data(), n, size,
          out->typed_data());
  return ffi::Error::Success();
}

enum Mode { kDense, kExact, kPredictor };  // the order of native.py, and so is that of Activation
enum Activation { kSwiglu, kGeglu, kGegluTanh, kRelu, kRelu2, kDrelu, kShiftedRelu, kFatrelu };

struct Act {
  Activation kind;
  float parameter;

  float hidden(float g, float u) const {
    const float positive = g > 0 ? g : g <= 0 ? 0 : g;  // NaN stays
    switch (kind) {
      case kSwiglu: return g / (1 + std::exp(-g)) * u;
      case kGeglu: return 0.5f * g * std::erfc(-g * 0.70710678f) * u;
      case kGegluTanh: return 0.5f * g * (1 + std::tanh(0.79788456f * (g + 0.044715f * g * g * g))) * u;
      case kRelu: return positive * u;
      case kRelu2: return positive * positive * u;
      case kDrelu: return positive * (u > 0 ? u : u <= 0 ? 0 : u);
      case kShiftedRelu: return (g - parameter > 0 ? g - parameter : g <= parameter ? 0 : g) * u;
      case kFatrelu: return (g < parameter ? 0 : g) * u;
    }
    return NAN;
  }
  bool zero(float g) const {  // whatever up is
    switch (kind) {
      case kSwiglu: case kGeglu: case kGegluTanh: return false;
      case kShiftedRelu: return g <= parameter;
      case kFatrelu: return g < parameter;
      default: return g <= 0;
    }
  }
};

// One FFN (or expert) on n vectors.
struct Ffn {
  const Rows& rows;
  const void *gate, *up, *down, *fc2;  // [F, D] each, and [F, R] or null
  int64_t D, F, R, n;
  const float *x, *read;  // [n, D], and the predictor's relu(x fc1) [n, R], both arranged
  Act act;
  Mode mode;
  float threshold;  // that the predictor's logits must exceed

  // partial [n, D], arranged = sum over neurons low <= f < high of hidden[f] down[f]; fired [n] of them are not zero.
  void operator()(int64_t low, int64_t high, float* partial, float* fired) const {
    thread_local std::vector<int32_t> live;
    thread_local std::vector<float> mask, g, u;
    live.resize(high - low);
    std::iota(live.begin(), live.end(), static_cast<int32_t>(low));
    const auto dot = [&](const void* matrix, const float* vectors, int64_t size, std::vector<float>& out) {
      out.resize(live.size() * n);
      rows.dot(matrix, live.data(), live.size(), vectors, n, size, out.data());
    };
    // Drops the rows of `live`, and of the arrays [live, n], for which wanted(index) is false for all n vectors.
    const auto keep = [&](const auto& wanted, std::initializer_list<std::vector<float>*> arrays) {
      size_t kept = 0;
      for (size_t i = 0; i < live.size(); ++i) {
        bool any = false;
        for (int64_t j = 0; j < n; ++j) any |= wanted(i * n + j);
        if (!any) continue;
        for (auto* array : arrays) std::copy_n(array->begin() + i * n, n, array->begin() + kept * n);
        live[kept++] = live[i];
      }
      live.resize(kept);
    };
    if (fc2) {
      dot(fc2, read, R, mask);
      for (float& m : mask) m = m > threshold;
      if (mode == kPredictor) keep([&](size_t i) { return mask[i] != 0; }, {&mask});
    } else {
      mask.assign(live.size() * n, 1.0f);
    }
    dot(gate, x, D, g);
    if (mode != kDense) keep([&](size_t i) { return mask[i] != 0 && !act.zero(g[i]); }, {&mask, &g});
    dot(up, x, D, u);
    std::fill(fired, fired + n, 0.0f);
    for (size_t i = 0; i < u.size(); i += n)
      for (int64_t j = 0; j < n; ++j) {
        u[i + j] = mask[i + j] != 0 ? act.hidden(g[i + j], u[i + j]) : 0;
        fired[j] += u[i + j] != 0;
      }
    if (mode != kDense) keep([&](size_t i) { return u[i] != 0; }, {&u});
    std::fill(partial, partial + n * D, 0.0f);
    rows.add(down, live.data(), live.size(), u.data(), n, D, partial);
  }
};

ffi::Error FeedForward(ffi::ThreadPool pool, int64_t level, int64_t activation, float parameter, int64_t mode,
                       ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> chosen, ffi::Buffer<ffi::F32> weights,
                       ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::AnyBuffer down, ffi::RemainingArgs predictor,
                       ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::Result<ffi::Buffer<ffi::F32>> fired) {
  const auto type = gate.element_type();
  const Rows* rows = rows_of(BEST(level, isa), type);
  if (!rows || up.element_type() != type || down.element_type() != type)
    return ffi::Error::InvalidArgument("weights must all be float32 or all be bfloat16");
  const int64_t tokens = x.dimensions()[0], D = x.dimensions()[1], k = chosen.dimensions()[1];
  const int64_t E = gate.dimensions()[0], F = gate.dimensions()[1], bytes = width(type);
  const float* reads = nullptr;
  const char *fc1 = nullptr, *fc2 = nullptr;
  const float* thresholds = nullptr;  // [E]
  int64_t R = 0;
  if (predictor.size()) {
    const auto px = predictor.get<ffi::Buffer<ffi::F32>>(0);
    const auto first = predictor.get<ffi::AnyBuffer>(1), second = predictor.get<ffi::AnyBuffer>(2);
    if (!px || !first || !second || first->element_type() != type || second->element_type() != type)
      return ffi::Error::InvalidArgument("predictors must have the dtype of the weights");
    reads = px->typed_data();
    R = first->dimensions()[1];
    fc1 = static_cast<const char*>(first->untyped_data());
    fc2 = static_cast<const char*>(second->untyped_data());
    if (predictor.size() > 3) {
      const auto fourth = predictor.get<ffi::Buffer<ffi::F32>>(3);
      if (!fourth) return ffi::Error::InvalidArgument("thresholds of predictors must be float32");
      thresholds = fourth->typed_data();
    }
  }
  const auto expert = [&](const ffi::AnyBuffer& w, int64_t e) {
    return static_cast<const char*>(w.untyped_data()) + e * F * D * bytes;
  };
  const int64_t chunks = std::clamp<int64_t>(3 * F * D * bytes / (4 * kPiece), 1, std::min<int64_t>(32, F));
  const int64_t step = (F + chunks - 1) / chunks;
  thread_local std::vector<float> arranged, read, read_arranged, partial, counts;
  std::fill(out->typed_data(), out->typed_data() + tokens * D, 0.0f);
  std::fill(fired->typed_data(), fired->typed_data() + tokens, 0.0f);
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int32_t> routed;
    std::vector<float> share;
    for (int64_t i = 0; i < tokens * k; ++i)
      if (chosen.typed_data()[i] == e) {
        routed.push_back(static_cast<int32_t>(i / k));
        share.push_back(weights.typed_data()[i]);
      }
    for (size_t start = 0; start < routed.size(); start += kBatch) {
      const size_t end = std::min(routed.size(), start + kBatch);
      const std::vector<int32_t> pick(routed.begin() + start, routed.begin() + end);
      const int64_t n = pick.size();
      arranged.resize(n * D);
      if (fc1) {
        read.resize(n * R);
        read_arranged.resize(n * R);
        arrange(*rows, reads, pick, D, arranged.data());
        product(pool, *rows, fc1 + e * R * D * bytes, D * bytes, R, arranged.data(), n, D, read.data());
        for (float& r : read) r = r > 0 ? r : r <= 0 ? 0 : r;
        for (int64_t j = 0; j < n; ++j) rows->arrange(read.data() + j * R, R, read_arranged.data() + j * R);
      }
      arrange(*rows, x.typed_data(), pick, D, arranged.data());
      partial.resize(chunks * n * D);
      counts.resize(chunks * n);
      const Ffn ffn{*rows, expert(gate, e), expert(up, e), expert(down, e), fc2 ? fc2 + e * F * R * bytes : nullptr,
                    D, F, R, n, arranged.data(), read_arranged.data(),
                    Act{static_cast<Activation>(activation), parameter}, static_cast<Mode>(mode),
                    thresholds ? thresholds[e] : 0};
      float *parts = partial.data(), *numbers = counts.data();  // thread_local: the threads that help have their own
      parallel(pool, chunks, [&](int64_t c) {
        const int64_t low = std::min(F, c * step);
        ffn(low, std::min(F, low + step), parts + c * n * D, numbers + c * n);
      });
      for (int64_t j = 0; j < n; ++j) {
        rows->collect(partial.data() + j * D, chunks, n * D, share[start + j], D, out->typed_data() + pick[j] * D);
        for (int64_t c = 0; c < chunks; ++c) fired->typed_data()[pick[j]] += counts[c * n + j];
      }
    }
  }
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, int64_t level, int64_t window, float scale, float cap,
                  ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> key, ffi::Buffer<ffi::F32> value,
                  ffi::Buffer<ffi::S32> positions, ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const Isa& isa = BEST(level, isa);
  const auto dims = key.dimensions();  // [B, K, S, H]
  const int64_t heads = dims[1], length = dims[2], H = dims[3], group = query.dimensions()[1] / heads;
  const int64_t total = dims[0] * heads, step = std::clamp<int64_t>(kPiece / (8 * length * H), 1, total);
  parallel(pool, (total + step - 1) / step, [&](int64_t piece) {
    for (int64_t i = piece * step; i < std::min(total, (piece + 1) * step); ++i) {
      const int64_t end = std::clamp<int64_t>(positions.typed_data()[i / heads] + 1, 1, length);
      const int64_t begin = window ? std::max<int64_t>(0, end - window) : 0, at = (i * length + begin) * H;
      isa.attend(query.typed_data() + i * group * H, key.typed_data() + at, value.typed_data() + at, group, end - begin,
                 H, scale, cap, out->typed_data() + i * group * H);
    }
  });
  return ffi::Error::Success();
}

ffi::Error Read(ffi::ThreadPool pool, int64_t level, ffi::AnyBuffer data, ffi::Result<ffi::Buffer<ffi::U32>> out) {
  const Isa& isa = BEST(level, isa);
  const int64_t bytes = data.size_bytes(), step = 1 << 20;
  std::atomic<uint64_t> total{0};
  parallel(pool, (bytes + step - 1) / step, [&](int64_t i) {
    total += isa.read_all(static_cast<const char*>(data.untyped_data()) + i * step, std::min(step, bytes - i * step));
  });
  out->typed_data()[0] = static_cast<uint32_t>(total);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("level")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_feed_forward, FeedForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("activation")
                                  .Attr<float>("parameter")
                                  .Attr<int64_t>("mode")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("level")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("cap")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_read, Read,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("level")
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::U32>>());
