// Matrix products by torch (oneDNN beneath it) from inside a parallel region, where each thread multiplies on its own.
//
// A product shared by all threads makes them wait for each other at its end and sends its result through memory; a
// thread that takes a whole expert or attention head finds everything again in its own cache. torch offers its
// operators as plain C functions with a stable interface (torch/csrc/inductor/aoti_torch/c/shim.h); Python passes in
// the three used here.

#pragma once

#include "vectors.h"

#include <atomic>
#include <memory>

namespace products {

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

}  // namespace products

// A matrix somewhere in memory, with the distance from row to row and from column to column.
template <class T>
class Matrix {
  public:
    Matrix(const T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
        const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
        void* at = const_cast<T*>(data);
        if (products::torch.from_blob(at, 2, sizes, strides, 0, products::type_of(data), 0, 0, &handle_)) {
            handle_ = nullptr;
        }
    }
    Matrix(const T* data, int64_t rows, int64_t columns) : Matrix(data, rows, columns, columns, 1) {}
    Matrix(const Matrix&) = delete;
    ~Matrix() {
        if (handle_) products::torch.release(handle_);
    }

    products::Handle handle_ = nullptr;
};

// The transpose of a (rows, columns) matrix as it lies.
template <class T>
struct Transposed : Matrix<T> {
    Transposed(const T* data, int64_t rows, int64_t columns) : Matrix<T>(data, columns, rows, 1, columns) {}
};

// out = left·right
template <class T>
inline void multiply(const Matrix<T>& out, const Matrix<T>& left, const Matrix<T>& right) {
    bool whole = out.handle_ && left.handle_ && right.handle_;
    if (!whole || products::torch.mm_out(out.handle_, left.handle_, right.handle_)) products::failures++;
}

// Memory of the calling thread's own, kept from call to call; each slot is one array.
template <class T>
inline T* scratch(int slot, int64_t count) {
    struct Buffer {
        std::unique_ptr<char[]> bytes;
        size_t size = 0;
    };
    constexpr size_t alignment = 64;
    static thread_local Buffer buffers[16];
    Buffer& buffer = buffers[slot];
    size_t wanted = count * sizeof(T) + alignment;
    if (buffer.size < wanted) {
        buffer.bytes.reset();
        buffer.bytes.reset(new char[wanted]);
        buffer.size = wanted;
    }
    size_t address = reinterpret_cast<size_t>(buffer.bytes.get());
    return reinterpret_cast<T*>((address + alignment - 1) / alignment * alignment);
}
