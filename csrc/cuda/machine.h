// What the kernels ask of a GPU, and what the host asks of its driver, by names of our own.
//
// Under nvcc these are PTX and the CUDA runtime. A plain C++ compiler gets emulated_machine.h, with the same names and
// the same meaning on the CPU, so that the very source of the kernels runs where there is no GPU, as Triton's does under
// its interpreter.
//
// Every thread of a warp takes part in what is said to be of a warp, and every thread of a block in what is of a block.
// For fragments of matrices see the PTX ISA, "Matrix multiply-accumulate operation using mma instruction".
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#define SDATTN_DEVICE __device__ __forceinline__
#define SDATTN_APART inline __device__ __noinline__
#define SDATTN_KERNEL __global__
#define SDATTN_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define SDATTN_PARAMETER __grid_constant__  // of a kernel, const: its address may be taken without a copy

#else

#define SDATTN_DEVICE inline
#define SDATTN_APART inline
#define SDATTN_KERNEL
#define SDATTN_BOUNDS(threads, blocks)
#define SDATTN_PARAMETER

#endif

namespace sdattn::cuda {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

}  // namespace sdattn::cuda

#if !defined(__CUDACC__)

#include "emulated_machine.h"

#else

namespace sdattn::cuda {

// Threads. One dimension of each.

SDATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SDATTN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
SDATTN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
SDATTN_DEVICE int threads_of_block() { return static_cast<int>(blockDim.x); }

// As much as was asked for at the launch, aligned to 128 bytes.
SDATTN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char sdattn_shared[];
  return sdattn_shared;
}

SDATTN_DEVICE void sync_block() { __syncthreads(); }
SDATTN_DEVICE void sync_warp() { __syncwarp(); }

SDATTN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SDATTN_DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SDATTN_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SDATTN_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
SDATTN_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x) != 0; }
SDATTN_DEVICE bool all(bool x) { return __all_sync(0xffffffffu, x) != 0; }

// Numbers. Rounded to nearest even.

SDATTN_DEVICE int float_bits(float x) { return __float_as_int(x); }
SDATTN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

SDATTN_DEVICE float to_float(float x) { return x; }
SDATTN_DEVICE float to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
SDATTN_DEVICE float to_float(bfloat16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
SDATTN_DEVICE T from_float(float x);
template <>
SDATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SDATTN_DEVICE half_t from_float<half_t>(float x) {
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
SDATTN_DEVICE bfloat16_t from_float<bfloat16_t>(float x) {
  bfloat16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

template <class T>
SDATTN_DEVICE uint32_t pack2(float low, float high);
template <>
SDATTN_DEVICE uint32_t pack2<half_t>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
SDATTN_DEVICE uint32_t pack2<bfloat16_t>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The 4 bytes of one float, or of two neighbours.
template <class T>
SDATTN_DEVICE uint32_t word_of(const T* x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(x[0]);
  } else {
    return x[0].bits | static_cast<uint32_t>(x[1].bits) << 16;
  }
}

// Loads stay after this: where 64 of them come one after the other, all at once would take the registers.
SDATTN_DEVICE void in_order() { asm volatile("" ::: "memory"); }

// volatile: else what a loop splits anew is split before it, and kept in twice the registers.
SDATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

SDATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// To one unit in the last place; of a denormal number, infinity.
SDATTN_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Matrices, of a warp. c += a b, a by rows, b by columns, accumulated in float32.

template <class T>
SDATTN_DEVICE void mma_k16(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1);
template <>
SDATTN_DEVICE void mma_k16<half_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2,
                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
SDATTN_DEVICE void mma_k16<bfloat16_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <class T>
SDATTN_DEVICE void mma_k8(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0);
template <>
SDATTN_DEVICE void mma_k8<half_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a0), "r"(a1), "r"(b0));
}
template <>
SDATTN_DEVICE void mma_k8<bfloat16_t>(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a0), "r"(a1), "r"(b0));
}

// m16n8k8; a and b from `to_tf32`.
SDATTN_DEVICE void mma_tf32(float& c0, float& c1, float& c2, float& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four, or two, matrices of 8 rows of 16 bytes, transposed. Lane i says where row i % 8 of matrix i / 8 is, in shared
// memory and aligned to 16 bytes; lanes beyond the matrices are not asked.
SDATTN_DEVICE void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
SDATTN_DEVICE void load_matrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Memory.

// BYTES, aligned to as many, on their way to shared memory. They have arrived once the thread has waited for the group
// they were committed with, and are there for other threads after a sync_block beyond that.
template <int BYTES>
SDATTN_DEVICE void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto from = __cvta_generic_to_global(global);
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
  }
}
SDATTN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING groups, the newest, are underway.
template <int PENDING>
SDATTN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 16, 8 or 4 bytes of global memory, aligned to as many, that nobody writes while the kernel runs. Read once: they stay
// out of L1.
SDATTN_DEVICE uint4 load16(const void* from) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(__cvta_generic_to_global(from)));
  return x;
}
SDATTN_DEVICE uint2 load8(const void* from) {
  uint2 x;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
      : "=r"(x.x), "=r"(x.y)
      : "l"(__cvta_generic_to_global(from)));
  return x;
}
SDATTN_DEVICE uint32_t load4(const void* from) {
  uint32_t x;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)));
  return x;
}

SDATTN_DEVICE void store16(void* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
SDATTN_DEVICE void store8(void* to, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
}
SDATTN_DEVICE void store4(void* to, uint32_t x) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(x) : "memory");
}

// The host's side. Errors are the runtime's own, 0 for none.

// Of the current device, asked for once.
inline int current_device_properties(int* multiprocessors, int* shared_per_block_optin, int* major, int* minor) {
  static std::mutex lock;
  static std::map<int, int[4]> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> hold(lock);
  const bool asked = known.count(device) != 0;
  int(&found)[4] = known[device];
  if (!asked) {
    const cudaDeviceAttr wanted[4] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                      cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor};
    for (int i = 0; i < 4; ++i) {
      if (const cudaError_t error = cudaDeviceGetAttribute(&found[i], wanted[i], device)) {
        known.erase(device);
        return error;
      }
    }
  }
  *multiprocessors = found[0];
  *shared_per_block_optin = found[1];
  *major = found[2];
  *minor = found[3];
  return 0;
}

inline int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
// Of the newest runtime that the driver serves; 0 without a driver.
inline int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
inline const char* machine_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

namespace detail {

// More than 48 KB of shared memory must be asked for, once for every kernel and device.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> hold(lock);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

}  // namespace detail

// kernel(args...) on the current device and the stream; `threads` is a multiple of 32.
template <class Kernel, class... Args>
int launch(Kernel kernel, int blocks, int threads, size_t shared_bytes, void* stream, const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    if (const cudaError_t error = detail::allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes)) {
      cudaGetLastError();  // or the next launch would report it again
      return error;
    }
  }
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

}  // namespace sdattn::cuda

#endif
