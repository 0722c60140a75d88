// How Python's arguments become the core's: tensors are addresses and strides, programs are tuples of their fields.
#pragma once

#include <pybind11/pybind11.h>

#include "row_program.h"

namespace sdattn::tuples {

namespace py = pybind11;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// (address, stride, stride, stride, stride)
inline Tensor4 tensor(const py::tuple& t) {
  Tensor4 x;
  x.data = pointer<void>(t[0].cast<int64_t>());
  for (int i = 0; i < 4; ++i) x.stride[i] = t[i + 1].cast<int64_t>();
  return x;
}

// (B, H, M, N, D, Dv)
inline void set_sizes(Attention& a, const py::tuple& sizes, int dtype) {
  int64_t* size[] = {&a.B, &a.H, &a.M, &a.N, &a.D, &a.Dv};
  for (int i = 0; i < 6; ++i) *size[i] = sizes[i].cast<int64_t>();
  a.dtype = static_cast<DType>(dtype);
}

// (steps, drop, nms, active, height, width, weights, radius)
inline PictureProgram picture_program(const py::tuple& t) {
  PictureProgram p;
  p.steps = t[0].cast<int64_t>();
  p.drop = t[1].cast<int64_t>();
  p.nms = t[2].cast<bool>();
  p.active = pointer<uint8_t>(t[3].cast<int64_t>());
  p.height = t[4].cast<int64_t>();
  p.width = t[5].cast<int64_t>();
  p.weights = pointer<float>(t[6].cast<int64_t>());
  p.radius = t[7].cast<int64_t>();
  return p;
}

inline RowProgram row_program(const py::tuple& rows) {
  RowProgram p;
  int i = 0;
  const auto next = [&] { return rows[i++]; };
  p.content = pointer<uint8_t>(next().cast<int64_t>());
  p.gate = pointer<float>(next().cast<int64_t>());
  p.gate_heads = next().cast<int64_t>();
  p.phrases = pointer<int32_t>(next().cast<int64_t>());
  p.drop = pointer<int32_t>(next().cast<int64_t>());
  p.random_ratio = next().cast<float>();
  p.seed = static_cast<uint64_t>(next().cast<int64_t>());
  p.threshold = next().cast<float>();
  p.renormalize = next().cast<int>();
  p.head_mode = pointer<uint8_t>(next().cast<int64_t>());
  p.capture_tokens = pointer<int32_t>(next().cast<int64_t>());
  p.capture_count = next().cast<int64_t>();
  p.capture_final = next().cast<bool>();
  p.capture_mean = next().cast<bool>();
  return p;
}

}  // namespace sdattn::tuples
