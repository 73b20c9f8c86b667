// Linear layers and their gradients by gemm.h's matmuls, all threads on one layer; defined in fathom/ops/linear.
//
// Threads share only their inputs: each packs the weights for itself, a part at a time, which costs little beside the
// matmul with its rows, while shared panels would have to travel from cache to cache.

#include "linear/matmul.h"

#include <vector>

#include <omp.h>

#if FATHOM_BF16_GEMM

namespace {

constexpr int64_t kPanelBytes = 384 << 10;  // of the right factor packed at a time: part of an L2 cache
constexpr int64_t kDepth = 512;             // rows of an inner dimension at a time where sums wait in float32
constexpr int64_t kPrivateBytes = 1 << 20;  // of private sums per thread at most

// What this thread takes of `all`, in whole units but for the end.
struct Share {
    explicit Share(int64_t all, int64_t unit = 1) {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), units = (all + unit - 1) / unit;
        begin = std::min(all, units * thread / threads * unit);
        size = std::min(all, units * (thread + 1) / threads * unit) - begin;
    }
    int64_t begin, size;
};

// left·right into out, whose rows are as long as right's.
template <class Out, class Element>
void multiply_packed(Out* out, const Matrix<bf16>& left, const Matrix<Element>& right, Into into) {
    const int64_t apart = gemm::panel_stride(left.columns), panels = gemm::panels_of(right.columns);
    const int64_t most = std::max<int64_t>(1, kPanelBytes / (apart * 4));
    uint32_t* packed = scratch<uint32_t>(matmul::kRightSlot, std::min(panels, most) * apart);
    uint32_t* space = scratch<uint32_t>(matmul::kLeftSlot, gemm::words_for(left));
    for (int64_t panel = 0; panel < panels; panel += most) {
        const int64_t last = std::min(panels, panel + most), first = panel * gemm::kColumns;
        gemm::pack_panels(right, panel, last, packed, apart);
        gemm::multiply(out + first, right.columns, std::min(right.columns, last * gemm::kColumns) - first, into, left,
                       packed, apart, space);
    }
}

// The same, the inner dimension in steps that fit a cache.
template <class Element>
void multiply_in_steps(float* out, const Matrix<bf16>& left, const Matrix<Element>& right, Into into) {
    for (int64_t start = 0; start < left.columns; start += kDepth, into = Into::sum) {
        const int64_t depth = std::min(kDepth, left.columns - start);
        multiply_packed(out, left.some_columns(start, depth), right.some_rows(start, depth), into);
    }
}

// out = left·right, each thread its share of the rows.
template <class Element>
void rows_together(int threads, bf16* out, const Matrix<bf16>& left, const Matrix<Element>& right) {
#pragma omp parallel num_threads(threads)
    {
        const Share rows(left.rows, gemm::kRows);
        const Matrix<bf16> mine = left.some_rows(rows.begin, rows.size);
        bf16* to = out + rows.begin * right.columns;
        if (left.columns <= 2 * kDepth) {
            multiply_packed(to, mine, right, Into::place);
        } else {
            float* sums = scratch<float>(0, rows.size * right.columns);
            multiply_in_steps(sums, mine, right, Into::place);
            convert(sums, to, rows.size * right.columns);
        }
    }
}

template <class Weight>
void linear(int threads, const bf16* x, const Weight* weight, bf16* y, int64_t rows, int64_t in, int64_t out) {
    rows_together(threads, y, matrix(x, rows, in), transposed(weight, out, in));
}

template <class Weight>
void linear_dgrad(int threads, const bf16* dy, const Weight* weight, bf16* dx, int64_t rows, int64_t in,
                           int64_t out) {
    rows_together(threads, dx, matrix(dy, rows, out), matrix(weight, out, in));
}

// dweight = dyᵀ·x, or that added to it. Small gradients are summed by each thread over its own tokens, then all
// together; of large ones each thread makes some rows.
void linear_wgrad(int threads, const bf16* dy, const bf16* x, float* dweight, int64_t rows, int64_t in,
                            int64_t out, int64_t adds) {
    const auto left = transposed(dy, rows, out), right = matrix(x, rows, in);
    const int64_t size = in * out;
    std::vector<float*> parts(threads);
#pragma omp parallel num_threads(threads)
    {
        if (size * 4 > kPrivateBytes) {
            const Share mine(out, gemm::kRows);
            multiply_in_steps(dweight + mine.begin * in, left.some_rows(mine.begin, mine.size), right,
                             adds ? Into::sum : Into::place);
        } else {
            float* sums = parts[omp_get_thread_num()] = scratch<float>(0, size);
            const Share tokens(rows), elements(size);
            if (!tokens.size) std::memset(sums, 0, size * sizeof(float));
            multiply_in_steps(sums, left.some_columns(tokens.begin, tokens.size),
                             right.some_rows(tokens.begin, tokens.size), Into::place);
#pragma omp barrier
            each(elements.size, [&](int64_t i, int64_t n) {
                float* to = dweight + elements.begin + i;
                Floats total = adds ? load(to, n) : Floats{};
                for (int64_t t = 0; t < omp_get_num_threads(); t++) total += load(parts[t] + elements.begin + i, n);
                store(to, total, n);
            });
        }
    }
}

}  // namespace

// By the type of the weights.
EXPORT(linear)
EXPORT(linear_dgrad)
extern "C" {
auto* linear_weight_gradient_f32 = &linear_wgrad;
}

#endif
