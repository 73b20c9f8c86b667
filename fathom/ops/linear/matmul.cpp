// Where Python registers torch's functions and checks whether one of them failed.

#include "linear/matmul.h"

extern "C" {

void use_torch(void* from_blob, void* release, void* mm_out, int32_t float32, int32_t bfloat16) {
    matmul::torch = {reinterpret_cast<decltype(matmul::Torch::from_blob)>(from_blob),
                       reinterpret_cast<decltype(matmul::Torch::release)>(release),
                       reinterpret_cast<decltype(matmul::Torch::mm_out)>(mm_out), float32, bfloat16};
}

// How many of torch's matmuls failed since the last call.
int failures() { return matmul::failures.exchange(0); }

// Whether bfloat16 matmuls are gemm.h's.
int has_bf16_gemm() { return FATHOM_BF16_GEMM; }
}
