// The CUDA backend's face, a C ABI: pointers to the device's memory, sizes, strides, a stream; an error code comes back.
//
// Nothing here synchronises or allocates, so a call may be captured in a CUDA graph. The kernels run on the device and
// the stream that are current.
#pragma once

#include "../row_program.h"

namespace sdattn::cuda {

// One call of attention: steps 1 to 6 and 8, every row by itself (no picture, no bits, no packed text, no shared output).
// Whatever a pointer of `Attention` leads to lies on the device, `head_mode` and `content` too.
struct Call {
  Attention attention;
  int64_t max_content = 0;  // the most content tokens that any batch entry has, <= N
  int64_t max_drop = 0;     // the largest of program.drop
};

// Step 7 on x (B, H, height * width, C), contiguous, `where` (B, H) is set; copies the rest. Once: a second time is a
// second call. x and out do not overlap. weights: 2 * radius + 1 numbers, on the device.
struct Smoothing {
  int64_t B = 0, H = 0, height = 0, width = 0, C = 0;
  DType dtype = float32;
  const void* x = nullptr;
  void* out = nullptr;
  const uint8_t* where = nullptr;  // null: everywhere
  const float* weights = nullptr;
  int64_t radius = 0;
};

// Error codes below zero are ours, those above zero CUDA's own.
enum Error : int { ok = 0, bad_size = -1, bad_dtype = -2, too_old = -3 };

}  // namespace sdattn::cuda

extern "C" {
int sdattn_cuda_attention(const sdattn::cuda::Call* call, void* stream);
int sdattn_cuda_smooth(const sdattn::cuda::Smoothing* call, void* stream);
const char* sdattn_cuda_message(int error);    // what an error code means, in CUDA's words where it is CUDA's
int sdattn_cuda_runtime_version();             // of the runtime this was built with, 13000 for 13.0
int sdattn_cuda_driver_version();              // what the driver supports, 0 where there is none
const char* sdattn_cuda_architectures();       // what this was built for: "8.0 8.6 ... 12.0+PTX"
}
