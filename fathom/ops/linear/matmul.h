// Matmuls inside a parallel region, each by a single thread.
//
// A matmul shared by all threads ends in a barrier and sends its result through memory; a thread that takes a whole
// expert or attention head finds everything again in its own cache.
//
// On processors with bfloat16 dot products, bfloat16 matmuls are those of gemm.h. All others are torch's (oneDNN
// beneath it), and so they are with AMX, whose tiles gemm.h does not support. torch offers its operators as plain C
// functions with a stable interface (torch/csrc/inductor/aoti_torch/c/shim.h); Python passes in the three used here.

#pragma once

#include "linear/matrix.h"
#include "vectors.h"

#include <sys/mman.h>

#include <atomic>
#include <new>
#include <type_traits>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(__AMX_BF16__)
#define FATHOM_BF16_GEMM 1
#include "linear/gemm.h"
#else
#define FATHOM_BF16_GEMM 0
#endif

// Memory mapped from the kernel: an outgrown buffer is unmapped, and pages that are never touched are never allocated.
class Mapped {
  public:
    ~Mapped() { unmap(); }

    char* at_least(size_t bytes) {
        if (size_ < bytes) {
            unmap();
            size_t size = size_t(64) << 10;
            while (size < bytes) size *= 2;
            void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (at == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
            madvise(at, size, MADV_HUGEPAGE);
#endif
            at_ = static_cast<char*>(at);
            size_ = size;
        }
        return at_;
    }

  private:
    void unmap() {
        if (size_) munmap(at_, size_);
        size_ = 0;
    }

    char* at_ = nullptr;
    size_t size_ = 0;
};

// The calling thread's scratch memory, kept from call to call; each slot is one page-aligned array. The last three are
// for matmuls.
template <class T>
inline T* scratch(int slot, int64_t count) {
    static thread_local Mapped slots[16];
    return reinterpret_cast<T*>(slots[slot].at_least(count * sizeof(T)));
}

namespace matmul {

constexpr int kRightSlot = 13, kLeftSlot = 14, kResultSlot = 15;

using Handle = void*;

struct Torch {
    int32_t (*from_blob)(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t offset,
                         int32_t type, int32_t device, int32_t index, Handle* made);
    int32_t (*release)(Handle tensor);
    int32_t (*mm_out)(Handle out, Handle left, Handle right);
    int32_t float32, bfloat16;
};

inline Torch torch;
inline std::atomic<int> failures{0};

inline int32_t type_of(const float*) { return torch.float32; }
inline int32_t type_of(const bf16*) { return torch.bfloat16; }

// A matrix as a torch tensor.
class Tensor {
  public:
    template <class T>
    explicit Tensor(const Matrix<T>& of) {
        const int64_t sizes[] = {of.rows, of.columns};
        const int64_t strides[] = {of.transposed ? 1 : of.stride, of.transposed ? of.stride : 1};
        void* at = const_cast<T*>(of.data);
        if (torch.from_blob(at, 2, sizes, strides, 0, type_of(of.data), 0, 0, &handle_)) handle_ = nullptr;
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() {
        if (handle_) torch.release(handle_);
    }

    Handle handle_ = nullptr;
};

template <class T>
inline void by_torch(T* out, int64_t stride, const Matrix<T>& left, const Matrix<T>& right) {
    const Tensor result(matrix(out, left.rows, right.columns, stride)), l(left), r(right);
    bool whole = result.handle_ && l.handle_ && r.handle_;
    if (!whole || torch.mm_out(result.handle_, l.handle_, r.handle_)) failures++;
}

}  // namespace matmul

// The right factor of one or several matmuls, prepared in one of this thread's slots; a matmul may use only its first
// rows and columns. Elements wider than T are rounded to T.
template <class T>
class Right {
  public:
    template <class Weight>
    explicit Right(const Matrix<Weight>& from, int slot = matmul::kRightSlot) {
        if constexpr (std::is_same_v<T, Weight>) {
            ready = from;
        } else {
            const int64_t lines = from.transposed ? from.columns : from.rows;
            const int64_t size = from.transposed ? from.rows : from.columns;
            T* to = scratch<T>(slot, lines * size);
            for (int64_t line = 0; line < lines; line++)
                convert(from.data + line * from.stride, to + line * size, size);
            ready = {to, from.rows, from.columns, size, from.transposed};
        }
    }

    Matrix<T> ready;
};

// The first `columns` columns of left·right into out; the inner dimension is left's. torch rounds its results to T
// before they are widened or added.
template <class T, class Out>
inline void multiply(Out* out, int64_t stride, int64_t columns, const Matrix<T>& left, const Right<T>& right,
                     Into into = Into::place) {
    const Matrix<T> used = right.ready.some_rows(0, left.columns).some_columns(0, columns);
    if constexpr (std::is_same_v<T, Out>) {
        if (into != Into::sum) return matmul::by_torch(out, stride, left, used);
    }
    T* result = scratch<T>(matmul::kResultSlot, left.rows * columns);
    matmul::by_torch(result, columns, left, used);
    for (int64_t row = 0; row < left.rows; row++)
        each(columns, [&](int64_t i, int64_t n) {
            Out* to = out + row * stride + i;
            const Floats value = load(result + row * columns + i, n);
            store(to, into == Into::sum ? value + load(to, n) : value, n);
        });
}

#if FATHOM_BF16_GEMM
// The same in bfloat16 without that rounding: a float32 result holds the float32 sums.
template <>
class Right<bf16> {
  public:
    template <class Weight>
    explicit Right(const Matrix<Weight>& from, int slot = matmul::kRightSlot)
        : apart(gemm::panel_stride(from.rows)),
          panels(scratch<uint32_t>(slot, gemm::panels_of(from.columns) * apart)) {
        gemm::pack_panels(from, 0, gemm::panels_of(from.columns), panels, apart);
    }

    int64_t apart;
    uint32_t* panels;
};

template <class Out>
inline void multiply(Out* out, int64_t stride, int64_t columns, const Matrix<bf16>& left, const Right<bf16>& right,
                     Into into = Into::place) {
    uint32_t* space = scratch<uint32_t>(matmul::kLeftSlot, gemm::words_for(left));
    gemm::multiply(out, stride, columns, into, left, right.panels, right.apart, space);
}
#endif
