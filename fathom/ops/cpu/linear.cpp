// Linear maps and their gradients by gemm.h's products, all threads on one map; defined in fathom/ops/linear.py.
//
// Threads share nothing but what they read: each rearranges the weights for itself, a part at a time, which is little
// beside multiplying them with its rows, while panels made together would have to travel from cache to cache.

#include "products.h"

#include <vector>

#include <omp.h>

#if FATHOM_OWN_PRODUCTS

namespace {

constexpr int64_t kPanelBytes = 384 << 10;    // of the right factor rearranged at a time: part of a second cache
constexpr int64_t kDepth = 512;               // rows of an inner dimension at a time where sums wait in float32
constexpr int64_t kPrivateBytes = 1 << 20;    // of sums that a thread may have for itself

// What thread `of` takes of `all`.
struct Share {
    Share(int64_t all, int64_t of, int64_t threads) : begin(all * of / threads), end(all * (of + 1) / threads) {}
    int64_t begin, end;
};

// The rows of `groups` in `share` of left·right, into out.
template <class Out, class Number>
void rows_of_product(Out* out, int64_t stride, const Matrix<bf16>& left, const Matrix<Number>& right,
                     const gemm::Groups& groups, Share share, Into into) {
    const int64_t inner = left.columns, apart = gemm::panel_stride(inner), panels = gemm::panels_of(right.columns);
    const int64_t most = std::max<int64_t>(1, kPanelBytes / (apart * 4));
    uint32_t* packed = scratch<uint32_t>(products::kRightSlot, std::min(panels, most) * apart);
    uint32_t* space = scratch<uint32_t>(products::kLeftSlot, gemm::words_for(left, groups));
    for (int64_t panel = 0; panel < panels; panel += most) {
        const int64_t last = std::min(panels, panel + most), first = panel * gemm::kColumns;
        gemm::pack_panels(right, panel, last, packed, apart);
        gemm::multiply(out + first, stride, std::min(right.columns, last * gemm::kColumns) - first, into, left, groups,
                       share.begin, share.end, packed, apart, space);
    }
}

// The same, summed over rows `inner` of the right factor in steps that fit a cache.
template <class Number>
void sum_over(float* out, int64_t stride, const Matrix<bf16>& left, const Matrix<Number>& right,
              const gemm::Groups& groups, Share rows, Share inner, Into into) {
    for (int64_t start = inner.begin; start < inner.end; start += kDepth, into = Into::sum) {
        const int64_t depth = std::min(kDepth, inner.end - start);
        rows_of_product(out, stride, left.some_columns(start, depth), right.some_rows(start, depth), groups, rows, into);
    }
}

// out = left·right, each thread its share of the rows.
template <class Number>
void rows_together(int threads, bf16* out, const Matrix<bf16>& left, const Matrix<Number>& right) {
    const gemm::Groups groups(left.rows);
    const int64_t columns = right.columns;
#pragma omp parallel num_threads(threads)
    {
        const Share share(groups.count, omp_get_thread_num(), omp_get_num_threads());
        if (left.columns <= 2 * kDepth) {
            rows_of_product(out, columns, left, right, groups, share, Into::place);
        } else {
            const int64_t first = groups.first(share.begin), size = (groups.first(share.end) - first) * columns;
            float* sums = scratch<float>(0, size);
            sum_over(sums - first * columns, columns, left, right, groups, share, {left.columns, 0, 1}, Into::place);
            convert(sums, out + first * columns, size);
        }
    }
}

template <class Weight>
void linear(int threads, const bf16* x, const Weight* weight, bf16* y, int64_t rows, int64_t in, int64_t out) {
    rows_together(threads, y, matrix(x, rows, in), transposed(weight, out, in));
}

template <class Weight>
void linear_input_gradient(int threads, const bf16* dy, const Weight* weight, bf16* dx, int64_t rows, int64_t in,
                           int64_t out) {
    rows_together(threads, dx, matrix(dy, rows, out), matrix(weight, out, in));
}

// dweight = dyᵀ·x, or that added to it. Small gradients are summed by each thread over its own tokens, then all together;
// of large ones each thread makes some rows.
void linear_weight_gradient(int threads, const bf16* dy, const bf16* x, float* dweight, int64_t rows, int64_t in,
                            int64_t out, int64_t adds) {
    const auto left = transposed(dy, rows, out), right = matrix(x, rows, in);
    const gemm::Groups groups(out);
    const Into into = adds ? Into::sum : Into::place;
    const int64_t size = in * out;
    std::vector<float*> parts(threads);
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
        if (size * 4 > kPrivateBytes) {
            sum_over(dweight, in, left, right, groups, {groups.count, thread, all}, {rows, 0, 1}, into);
        } else {
            float* mine = parts[thread] = scratch<float>(0, size);
            const Share tokens(rows, thread, all);
            if (tokens.begin == tokens.end) std::memset(mine, 0, size * sizeof(float));
            sum_over(mine, in, left, right, groups, {groups.count, 0, 1}, tokens, Into::place);
#pragma omp barrier
            const Share numbers(size, thread, all);
            each(numbers.end - numbers.begin, [&](int64_t i, int64_t n) {
                float* to = dweight + numbers.begin + i;
                Floats total = adds ? load(to, n) : Floats{};
                for (int64_t t = 0; t < all; t++) total += load(parts[t] + numbers.begin + i, n);
                store(to, total, n);
            });
        }
    }
}

}  // namespace

// By the type of the weights.
EXPORT(linear)
EXPORT(linear_input_gradient)
extern "C" {
auto* linear_weight_gradient_f32 = &linear_weight_gradient;
}

#endif
