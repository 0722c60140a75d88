// What an error code means, and what this was built with and for.
#include "attention.h"
#include "machine.h"

#if !defined(SDATTN_CUDA_ARCHITECTURES)
#error "SDATTN_CUDA_ARCHITECTURES: what this is compiled for, \"8.0 9.0+PTX\""
#endif

const char* sdattn_cuda_message(int error) {
  using namespace sdattn::cuda;
  switch (error) {
    case ok: return "no error";
    case bad_size: return "sizes: no kernel serves so many tokens, so large a head dimension or so large a picture";
    case bad_dtype: return "dtype: expected float32, float16 or bfloat16";
    case too_old: return "the device is older than compute capability 8.0";
  }
  return machine_message(error);
}

int sdattn_cuda_runtime_version() { return sdattn::cuda::runtime_version(); }

int sdattn_cuda_driver_version() { return sdattn::cuda::driver_version(); }

const char* sdattn_cuda_architectures() { return SDATTN_CUDA_ARCHITECTURES; }
