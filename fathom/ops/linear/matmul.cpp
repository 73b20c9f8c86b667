// Where Python hands over torch's functions, and asks whether one of them failed.

#include "linear/matmul.h"

extern "C" {

void use_torch(void* from_blob, void* release, void* mm_out, int32_t float32, int32_t bfloat16) {
    products::torch = {reinterpret_cast<decltype(products::Torch::from_blob)>(from_blob),
                       reinterpret_cast<decltype(products::Torch::release)>(release),
                       reinterpret_cast<decltype(products::Torch::mm_out)>(mm_out), float32, bfloat16};
}

// How many products failed since the last time somebody asked.
int failures() { return products::failures.exchange(0); }

// Whether products of bfloat16 matrices are gemm.h's.
int has_bf16_gemm() { return FATHOM_OWN_PRODUCTS; }
}
