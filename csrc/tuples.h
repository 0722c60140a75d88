// How Python's arguments become the core's: tensors are addresses and strides, programs are tuples of their fields.
#pragma once

#include "python.h"
#include "row_program.h"

namespace sdattn::tuples {

using python::Tuple;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// (address, stride, stride, stride, stride)
inline Tensor4 tensor(const Tuple& t) {
  Tensor4 x;
  x.data = pointer<void>(t.at<int64_t>(0));
  for (int i = 0; i < 4; ++i) x.stride[i] = t.at<int64_t>(i + 1);
  return x;
}

// (B, H, M, N, D, Dv)
inline void set_sizes(Attention& a, const Tuple& sizes, int dtype) {
  int64_t* size[] = {&a.B, &a.H, &a.M, &a.N, &a.D, &a.Dv};
  for (int i = 0; i < 6; ++i) *size[i] = sizes.at<int64_t>(i);
  a.dtype = static_cast<DType>(dtype);
}

// (steps, drop, nms, active, height, width, weights, radius)
inline PictureProgram picture_program(const Tuple& t) {
  PictureProgram p;
  p.steps = t.at<int64_t>(0);
  p.drop = t.at<int64_t>(1);
  p.nms = t.at<bool>(2);
  p.active = pointer<uint8_t>(t.at<int64_t>(3));
  p.height = t.at<int64_t>(4);
  p.width = t.at<int64_t>(5);
  p.weights = pointer<float>(t.at<int64_t>(6));
  p.radius = t.at<int64_t>(7);
  return p;
}

inline RowProgram row_program(const Tuple& rows) {
  RowProgram p;
  Py_ssize_t i = 0;
  p.content = pointer<uint8_t>(rows.at<int64_t>(i++));
  p.gate = pointer<float>(rows.at<int64_t>(i++));
  p.gate_heads = rows.at<int64_t>(i++);
  p.phrases = pointer<int32_t>(rows.at<int64_t>(i++));
  p.drop = pointer<int32_t>(rows.at<int64_t>(i++));
  p.random_ratio = rows.at<float>(i++);
  p.seeds = pointer<int64_t>(rows.at<int64_t>(i++));
  p.threshold = rows.at<float>(i++);
  p.renormalize = rows.at<int>(i++);
  p.head_mode = pointer<uint8_t>(rows.at<int64_t>(i++));
  p.capture_tokens = pointer<int32_t>(rows.at<int64_t>(i++));
  p.capture_count = rows.at<int64_t>(i++);
  p.capture_final = rows.at<bool>(i++);
  p.capture_mean = rows.at<bool>(i++);
  return p;
}

// What a call's forward and its backward both read. bits: written by the one, read by the other.
inline void set_inputs(Attention& a, const Tuple& sizes, int dtype, float scale, const Tuple& query, const Tuple& key,
                       const Tuple& value, const Tuple& bias, int bias_dtype, int64_t bits, const Tuple& rows) {
  set_sizes(a, sizes, dtype);
  a.scale = scale;
  a.query = tensor(query);
  a.key = tensor(key);
  a.value = tensor(value);
  a.bias = tensor(bias);
  a.bias_dtype = static_cast<DType>(bias_dtype);
  a.bits = pointer<int32_t>(bits);
  a.program = row_program(rows);
}

}  // namespace sdattn::tuples
