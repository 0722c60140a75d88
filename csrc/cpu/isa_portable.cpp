#include "vec_portable.h"

#include "kernel.inl"

namespace sdattn::cpu {
const Isa isa_portable = table("portable", [] { return true; });
}
