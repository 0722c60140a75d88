#include "vec_avx512.h"

#include "kernel.inl"

namespace sdattn::cpu {
const Isa isa_avx512 = table("avx512", [] {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
});
}
