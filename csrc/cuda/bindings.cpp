// Python's door to the CUDA kernels. Tensors arrive as addresses and strides; nothing here knows of torch.

#include <stdexcept>
#include <string>

#include "../tuples.h"
#include "attention.h"

using namespace sdattn;
using namespace sdattn::python;
using namespace sdattn::tuples;

namespace {

void raise_on(int error) {
  if (error == cuda::ok) return;
  const std::string message = sdattn_cuda_message(error);
  if (error == cuda::bad_size || error == cuda::bad_dtype) throw std::invalid_argument(message);
  throw std::runtime_error("CUDA: " + message + " (error " + std::to_string(error) + ")");
}

// What `rows` points to lies on the device.
void attention(const Tuple& sizes, int dtype, float scale, const Tuple& query, const Tuple& key,
               const Tuple& value, const Tuple& out, const Tuple& bias, int bias_dtype, int64_t maps,
               int64_t bits, const Tuple& rows, int64_t max_content, int64_t max_drop, int64_t stream) {
  cuda::Call call;
  Attention& a = call.attention;
  set_inputs(a, sizes, dtype, scale, query, key, value, bias, bias_dtype, bits, rows);
  a.out = tensor(out);
  a.maps = pointer<float>(maps);
  call.max_content = max_content;
  call.max_drop = max_drop;
  int error;
  {
    WithoutLock unlocked;
    error = sdattn_cuda_attention(&call, pointer<void>(stream));
  }
  raise_on(error);
}

// (B, H, height, width, C)
void smooth(const Tuple& sizes, int dtype, int64_t x, int64_t out, int64_t where, int64_t weights, int64_t radius,
            int64_t stream) {
  cuda::Smoothing s;
  int64_t* size[] = {&s.B, &s.H, &s.height, &s.width, &s.C};
  for (int i = 0; i < 5; ++i) *size[i] = sizes.at<int64_t>(i);
  s.dtype = static_cast<DType>(dtype);
  s.x = pointer<void>(x);
  s.out = pointer<void>(out);
  s.where = pointer<uint8_t>(where);
  s.weights = pointer<float>(weights);
  s.radius = radius;
  int error;
  {
    WithoutLock unlocked;
    error = sdattn_cuda_smooth(&s, pointer<void>(stream));
  }
  raise_on(error);
}

PyObject* info() {
  return Py_BuildValue("{s:i,s:i,s:s}", "runtime", sdattn_cuda_runtime_version(), "driver", sdattn_cuda_driver_version(),
                       "architectures", sdattn_cuda_architectures());
}

PyMethodDef methods[] = {method<attention>("attention"), method<smooth>("smooth"), method<info>("info"), {}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_cuda",
    "The CUDA kernels of sdattn_fast. Addresses and strides in, nothing of torch; see sdattn_fast.backend.cuda.",
    0,
    methods,
};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModuleDef_Init(&module); }
