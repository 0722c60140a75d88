#include "vec_avx512.h"

#include "kernel.inl"

namespace sdattn::cpu {
const Isa isa_avx512_bf16 = table("avx512_bf16", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512bf16");
});
}
