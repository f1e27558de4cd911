// Grouped products of matrices as XLA custom calls for CPUs. What each computes is said, and written once more in jnp,
// in models/grouped.py.
//
// Each entry of a result is added up by one thread, in an order that depends on nothing but how many numbers it is the sum
// of, so that results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "machine.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#define INSTRUCTIONS "product.inc"
#include "isas.h"

struct Term {
  Matrix a, b;
};
struct Sum {  // out [m, n] = sum over the terms of a [m, depth] b [depth, n]
  std::vector<Term> terms;
  int64_t m, n, depth;
  float* out;
};

// Rows and columns of a piece, at most. Its part of B, kDepth kWide, is 1.3 MB of a second-level cache.
constexpr int64_t kHigh = 768, kWide = 512;

void compute(ffi::ThreadPool pool, int64_t level, const std::vector<Sum>& sums) {
  struct Piece {
    const Sum* sum;
    int64_t i, j, m, n;
  };
  // where there are few sums, each is cut into as many pieces for each thread
  const int64_t multiple = static_cast<int64_t>(sums.size()) < 4 * pool.num_threads() ? pool.num_threads() : 1;
  const auto parts = [](int64_t size, int64_t most) { return (size + most - 1) / most; };
  std::vector<Piece> pieces;
  for (const Sum& sum : sums) {
    if (!sum.m || !sum.n) continue;
    const int64_t high = parts(sum.m, parts(parts(sum.m, kHigh), multiple) * multiple);
    const int64_t m = parts(high, 12) * 12, n = parts(parts(sum.n, parts(sum.n, kWide)), 32) * 32;
    for (int64_t j = 0; j < sum.n; j += n)
      for (int64_t i = 0; i < sum.m; i += m)
        pieces.push_back({&sum, i, j, std::min(m, sum.m - i), std::min(n, sum.n - j)});
  }
  const auto product = BEST(level, product);
  parallel(pool, pieces.size(), [&](int64_t p) {
    const auto [sum, i, j, m, n] = pieces[p];
    for (size_t t = 0; t < sum->terms.size(); ++t)
      product(sum->terms[t].a.from(i, 0), sum->terms[t].b.from(0, j), m, n, sum->depth, t > 0,
              sum->out + i * sum->n + j, sum->n);
  });
}

using Floats = ffi::Buffer<ffi::F32, 2>;
using Weights = ffi::Buffer<ffi::F32, 3>;
using Sizes = ffi::Buffer<ffi::S32, 1>;

// Whether there is a group for each of `experts` matrices, and no more rows in them than `rows`.
bool fit(const Sizes& sizes, int64_t experts, int64_t rows) {
  if (sizes.dimensions()[0] != experts) return false;
  for (int64_t e = 0; e < experts && rows >= 0; ++e) {
    if (sizes.typed_data()[e] < 0) return false;
    rows -= sizes.typed_data()[e];
  }
  return rows >= 0;
}
ffi::Error refused() {
  return ffi::Error::InvalidArgument(
      "grouped products: not float32, or the groups are not those of the matrices and rows");
}

// f(e, first row, rows) for each group; returns the rows of all.
template <class Each>
int64_t for_groups(const Sizes& sizes, const Each& f) {
  int64_t first = 0;
  for (int64_t e = 0; e < sizes.dimensions()[0]; first += sizes.typed_data()[e++])
    f(e, first, int64_t{sizes.typed_data()[e]});
  return first;
}

ffi::Error Products(ffi::ThreadPool pool, int64_t level, Sizes sizes, Floats x, ffi::RemainingArgs weights,
                    ffi::RemainingRets outs) {
  const int64_t S = x.dimensions()[0], D = x.dimensions()[1];
  std::vector<Sum> sums;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto w = weights.get<Weights>(i);
    auto out = outs.get<Floats>(i);
    if (!w || !out || !fit(sizes, w->dimensions()[0], S)) return refused();
    const int64_t F = w->dimensions()[2];
    float* to = (*out)->typed_data();
    const int64_t end = for_groups(sizes, [&](int64_t e, int64_t first, int64_t rows) {
      sums.push_back({{{{x.typed_data() + first * D, D, 1}, {w->typed_data() + e * D * F, F, 1}}}, rows, F, D,
                      to + first * F});
    });
    std::fill(to + end * F, to + S * F, 0.0f);
  }
  compute(pool, level, sums);
  return ffi::Error::Success();
}

ffi::Error Transposed(ffi::ThreadPool pool, int64_t level, Sizes sizes, ffi::RemainingArgs pairs,
                      ffi::Result<Floats> out) {
  const int64_t S = out->dimensions()[0], D = out->dimensions()[1], count = pairs.size() / 2;
  float* to = out->typed_data();
  std::vector<Sum> sums(sizes.dimensions()[0]);
  for (int64_t i = 0; i < count; ++i) {
    const auto dout = pairs.get<Floats>(i);
    const auto w = pairs.get<Weights>(count + i);
    if (!dout || !w || !fit(sizes, w->dimensions()[0], S)) return refused();
    const int64_t F = w->dimensions()[2];
    const int64_t end = for_groups(sizes, [&](int64_t e, int64_t first, int64_t rows) {
      sums[e].terms.push_back({{dout->typed_data() + first * F, F, 1}, {w->typed_data() + e * D * F, 1, F}});
      sums[e].m = rows, sums[e].n = D, sums[e].depth = F, sums[e].out = to + first * D;
    });
    std::fill(to + end * D, to + S * D, 0.0f);
  }
  compute(pool, level, sums);
  return ffi::Error::Success();
}

ffi::Error Outers(ffi::ThreadPool pool, int64_t level, Sizes sizes, Floats x, ffi::RemainingArgs douts,
                  ffi::RemainingRets gradients) {
  const int64_t D = x.dimensions()[1];
  std::vector<Sum> sums;
  for (size_t i = 0; i < douts.size(); ++i) {
    const auto dout = douts.get<Floats>(i);
    auto gradient = gradients.get<Weights>(i);
    if (!dout || !gradient || !fit(sizes, (*gradient)->dimensions()[0], x.dimensions()[0])) return refused();
    const int64_t F = dout->dimensions()[1];
    for_groups(sizes, [&](int64_t e, int64_t first, int64_t rows) {
      sums.push_back({{{{x.typed_data() + first * D, 1, D}, {dout->typed_data() + first * F, F, 1}}}, D, F, rows,
                      (*gradient)->typed_data() + e * D * F});
    });
  }
  compute(pool, level, sums);
  return ffi::Error::Success();
}

auto grouped() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("level").Arg<Sizes>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_grouped_products, Products, grouped().Arg<Floats>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_grouped_transposed, Transposed, grouped().RemainingArgs().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tsparse_grouped_outers, Outers, grouped().Arg<Floats>().RemainingArgs().RemainingRets());
