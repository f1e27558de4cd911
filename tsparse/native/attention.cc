// Attention as XLA custom calls for CPUs. What it computes is said, and written once more in jnp, in models/attention.py.
//
// A block of a head's queries meets all keys that any of them sees at once, so that its scores stay in the second-level
// cache from their product to their softmax and the next products. Each entry of a result is added up by one thread, in an
// order that does not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "machine.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kQueries = 48;  // of a block: whole panels of each instruction set
constexpr float kNever = -1e30f;  // the score of what is not seen

struct Rule {
  float scale;
  int64_t window, head_dim;
};
struct Block {
  const int32_t* ids;  // of the row, and as many more as a vector has
  int64_t first, queries, first_key, keys;
};
struct Head {  // [T, H] each
  Matrix query, key, value;
};

#define INSTRUCTIONS "attention.inc"
#include "isas.h"

using Heads = ffi::Buffer<ffi::F32, 4>;  // [B, T, N or K, H]
using Ids = ffi::Buffer<ffi::S32, 2>;    // [B, T]

constexpr int64_t kMargin = 16;

bool same(const Heads& x, const Heads& y) {
  return std::equal(x.dimensions().begin(), x.dimensions().end(), y.dimensions().begin());
}
// Whether the arrays are those of one attention.
bool fit(const Heads& query, const Heads& key, const Heads& value, const Ids& ids) {
  const auto q = query.dimensions(), k = key.dimensions(), i = ids.dimensions();
  return same(key, value) && q[0] == k[0] && q[1] == k[1] && q[3] == k[3] && k[2] && q[2] % k[2] == 0 && i[0] == q[0] &&
         i[1] == q[1];
}
ffi::Error refused() {
  return ffi::Error::InvalidArgument("attention: the shapes of query, key, value and segment_ids do not fit together");
}

struct Problem {
  int64_t B, T, N, K, H;
  Rule rule;
  std::vector<int32_t> ids;  // [B, T + kMargin]
  const float *query, *key, *value;

  Problem(float scale, int64_t window, const Heads& query, const Heads& key, const Heads& value, const Ids& segments)
      : B(query.dimensions()[0]), T(query.dimensions()[1]), N(query.dimensions()[2]), K(key.dimensions()[2]),
        H(query.dimensions()[3]), rule{scale, window, H}, ids(B * (T + kMargin), -1), query(query.typed_data()),
        key(key.typed_data()), value(value.typed_data()) {
    for (int64_t b = 0; b < B; ++b)
      std::copy_n(segments.typed_data() + b * T, T, ids.data() + b * (T + kMargin));
  }

  int64_t blocks() const { return (T + kQueries - 1) / kQueries; }
  int64_t of_query(int64_t b, int64_t n) const { return (b * T * N + n) * H; }  // where a head begins
  int64_t of_key(int64_t b, int64_t k) const { return (b * T * K + k) * H; }

  Head head(int64_t b, int64_t n) const {
    const int64_t k = of_key(b, n / (N / K));
    return {{query + of_query(b, n), N * H, 1}, {key + k, K * H, 1}, {value + k, K * H, 1}};
  }

  Block block(int64_t b, int64_t index) const {
    const int32_t* row = ids.data() + b * (T + kMargin);
    const int64_t first = index * kQueries, end = std::min(first + kQueries, T);
    int64_t key = rule.window ? std::max<int64_t>(0, first - rule.window + 1) : 0;
    while (key < first && std::find(row + first, row + end, row[key]) == row + end) ++key;  // of no query's segment
    return {row, first, end - first, key, end - key};
  }
};

ffi::Error Forward(ffi::ThreadPool pool, int64_t level, float scale, int64_t window, Heads query, Heads key, Heads value,
                   Ids ids, ffi::Result<Heads> out) {
  if (!fit(query, key, value, ids)) return refused();
  const Problem problem(scale, window, query, key, value, ids);
  const auto attend = BEST(level, attend);
  const int64_t blocks = problem.blocks();
  parallel(pool, problem.B * problem.N * blocks, [&](int64_t i) {
    const int64_t b = i / blocks / problem.N, n = i / blocks % problem.N;
    attend(problem.block(b, i % blocks), problem.rule, problem.head(b, n), out->typed_data() + problem.of_query(b, n));
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t level, float scale, int64_t window, Heads query, Heads key, Heads value,
                    Ids ids, Heads dout, ffi::Result<Heads> dquery, ffi::Result<Heads> dkey,
                    ffi::Result<Heads> dvalue) {
  if (!fit(query, key, value, ids) || !same(query, dout)) return refused();
  const Problem problem(scale, window, query, key, value, ids);
  const auto attend_backward = BEST(level, attend_backward);
  const int64_t N = problem.N, K = problem.K, H = problem.H;
  parallel(pool, problem.B * K, [&](int64_t i) {
    const int64_t b = i / K, k = i % K, of_key = problem.of_key(b, k);
    float *dk = dkey->typed_data() + of_key, *dv = dvalue->typed_data() + of_key;
    for (int64_t t = 0; t < problem.T; ++t) {
      std::fill_n(dk + t * K * H, H, 0.0f);
      std::fill_n(dv + t * K * H, H, 0.0f);
    }
    for (int64_t n = k * (N / K); n < (k + 1) * (N / K); ++n) {
      const int64_t of_query = problem.of_query(b, n);
      const Matrix d = {dout.typed_data() + of_query, N * H, 1};
      for (int64_t block = 0; block < problem.blocks(); ++block)
        attend_backward(problem.block(b, block), problem.rule, problem.head(b, n), d, dquery->typed_data() + of_query, dk,
                        dv);
    }
  });
  return ffi::Error::Success();
}

auto attention() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("level")
      .Attr<float>("scale")
      .Attr<int64_t>("window")
      .Arg<Heads>()
      .Arg<Heads>()
      .Arg<Heads>()
      .Arg<Ids>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_attention, Forward, attention().Ret<Heads>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_attention_backward, Backward,
                              attention().Arg<Heads>().Ret<Heads>().Ret<Heads>().Ret<Heads>());
