// Python's door to the CUDA kernels. Tensors arrive as addresses and strides; nothing here knows of torch.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../tuples.h"
#include "attention.h"

namespace py = pybind11;
using namespace sdattn;
using namespace sdattn::tuples;

// The tests compile the kernels for a machine that is emulated, under a name of its own.
#if !defined(SDATTN_MODULE)
#define SDATTN_MODULE _cuda
#endif

namespace {

void raise_on(int error) {
  if (error == cuda::ok) return;
  const std::string message = sdattn_cuda_message(error);
  if (error == cuda::bad_size || error == cuda::bad_dtype) throw std::invalid_argument(message);
  throw std::runtime_error("CUDA: " + message + " (error " + std::to_string(error) + ")");
}

// seed: of (1,) int64, or 0; it and whatever `rows` points to lie on the device.
void attention(const py::tuple& sizes, int dtype, float scale, const py::tuple& query, const py::tuple& key,
               const py::tuple& value, const py::tuple& out, const py::tuple& bias, int bias_dtype, int64_t maps,
               int64_t bits, const py::tuple& rows, int64_t seed, int64_t max_content, int64_t max_drop, int64_t stream) {
  cuda::Call call;
  Attention& a = call.attention;
  set_sizes(a, sizes, dtype);
  a.scale = scale;
  a.query = tensor(query);
  a.key = tensor(key);
  a.value = tensor(value);
  a.out = tensor(out);
  a.bias = tensor(bias);
  a.bias_dtype = static_cast<DType>(bias_dtype);
  a.maps = pointer<float>(maps);
  a.bits = pointer<int32_t>(bits);
  a.program = row_program(rows);
  call.seed = pointer<int64_t>(seed);
  call.max_content = max_content;
  call.max_drop = max_drop;
  int error;
  {
    py::gil_scoped_release release;
    error = sdattn_cuda_attention(&call, pointer<void>(stream));
  }
  raise_on(error);
}

// (B, H, height, width, C)
void smooth(const py::tuple& sizes, int dtype, int64_t x, int64_t out, int64_t where, int64_t weights, int64_t radius,
            int64_t stream) {
  cuda::Smoothing s;
  int64_t* size[] = {&s.B, &s.H, &s.height, &s.width, &s.C};
  for (int i = 0; i < 5; ++i) *size[i] = sizes[i].cast<int64_t>();
  s.dtype = static_cast<DType>(dtype);
  s.x = pointer<void>(x);
  s.out = pointer<void>(out);
  s.where = pointer<uint8_t>(where);
  s.weights = pointer<float>(weights);
  s.radius = radius;
  int error;
  {
    py::gil_scoped_release release;
    error = sdattn_cuda_smooth(&s, pointer<void>(stream));
  }
  raise_on(error);
}

py::dict info() {
  py::dict info;
  info["runtime"] = sdattn_cuda_runtime_version();
  info["driver"] = sdattn_cuda_driver_version();
  info["architectures"] = sdattn_cuda_architectures();
  return info;
}

}  // namespace

PYBIND11_MODULE(SDATTN_MODULE, m) {
  m.doc() = "The CUDA kernels of sdattn_fast. Addresses and strides in, nothing of torch; see sdattn_fast.backend.cuda.";
  m.def("attention", &attention);
  m.def("smooth", &smooth);
  m.def("info", &info);
}
