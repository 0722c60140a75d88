#include "vec_avx2.h"

#include "kernel.inl"

namespace sdattn::cpu {
const Isa isa_avx2 = table("avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });
}
