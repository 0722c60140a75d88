// Python's door to the compiled core. Tensors arrive as addresses and strides; the core knows nothing of torch.

#include <new>
#include <stdexcept>
#include <string>

#include "../tuples.h"
#include "attention.h"
#include "backward.h"

using namespace sdattn;
using namespace sdattn::python;
using namespace sdattn::tuples;

namespace {

void raise_on(cpu::Error error) {
  if (error == cpu::bad_size) throw std::invalid_argument("too many tokens or too large a head dimension");
  if (error == cpu::out_of_memory) throw std::bad_alloc();
}

template <class Work>
void without_lock(Work work) {
  cpu::Error error;
  {
    WithoutLock unlocked;
    error = work();
  }
  raise_on(error);
}

void cpu_attention(const Tuple& sizes, int dtype, float scale, const Tuple& query, const Tuple& key,
                   const Tuple& value, const Tuple& out, const Tuple& bias, int bias_dtype, int64_t maps,
                   int64_t bits, const Tuple& rows, int64_t packed, int64_t out_bias, const Tuple& picture,
                   int threads) {
  Attention a;
  set_inputs(a, sizes, dtype, scale, query, key, value, bias, bias_dtype, bits, rows);
  a.out = tensor(out);
  a.maps = pointer<float>(maps);
  a.packed = pointer<void>(packed);
  a.out_bias = pointer<float>(out_bias);
  PictureProgram over;
  if (!picture.empty()) {
    over = picture_program(picture);
    a.picture = &over;
  }
  without_lock([&] { return cpu::attention(a, threads); });
}

// grads: of query, key, value, gate, the bias of tokens, the bias. relevance: to, tokens, how many, heads.
void cpu_backward(const Tuple& sizes, int dtype, float scale, const Tuple& query, const Tuple& key,
                  const Tuple& value, const Tuple& bias, int bias_dtype, int64_t bits, const Tuple& rows,
                  const Tuple& grad_out, int64_t grad_maps, const Tuple& grads, const Tuple& relevance,
                  int threads) {
  cpu::Backward w;
  set_inputs(w.forward, sizes, dtype, scale, query, key, value, bias, bias_dtype, bits, rows);
  w.grad_out = tensor(grad_out);
  w.grad_maps = pointer<float>(grad_maps);
  w.grad_query = tensor(grads.at<Tuple>(0));
  w.grad_key = tensor(grads.at<Tuple>(1));
  w.grad_value = tensor(grads.at<Tuple>(2));
  w.grad_gate = pointer<float>(grads.at<int64_t>(3));
  w.grad_bias_of_tokens = pointer<float>(grads.at<int64_t>(4));
  w.grad_bias = tensor(grads.at<Tuple>(5));
  w.relevance = pointer<float>(relevance.at<int64_t>(0));
  w.relevance_tokens = pointer<int32_t>(relevance.at<int64_t>(1));
  w.relevance_count = relevance.at<int64_t>(2);
  w.relevance_heads = pointer<uint8_t>(relevance.at<int64_t>(3));
  without_lock([&] { return cpu::backward(w, threads); });
}

int64_t cpu_packed_bytes(const Tuple& sizes, int dtype) {
  Attention a;
  set_sizes(a, sizes, dtype);
  return static_cast<int64_t>(cpu::packed_bytes(a));
}

void cpu_pack(const Tuple& sizes, int dtype, const Tuple& key, const Tuple& value, int64_t content, int64_t to,
              int threads) {
  Attention a;
  set_sizes(a, sizes, dtype);
  a.key = tensor(key);
  a.value = tensor(value);
  a.program.content = pointer<uint8_t>(content);
  without_lock([&] { return cpu::pack(a, threads, pointer<void>(to)); });
}

void cpu_smooth(const Tuple& sizes, int dtype, int64_t x, int64_t out, int64_t where, int64_t weights, int64_t radius,
                int64_t times, int threads) {
  cpu::Smoothing s;
  int64_t* size[] = {&s.B, &s.H, &s.height, &s.width, &s.C};
  for (int i = 0; i < 5; ++i) *size[i] = sizes.at<int64_t>(i);
  s.dtype = static_cast<DType>(dtype);
  s.x = pointer<void>(x);
  s.out = pointer<void>(out);
  s.where = pointer<uint8_t>(where);
  s.weights = pointer<float>(weights);
  s.radius = radius;
  s.times = times;
  without_lock([&] { return cpu::smooth(s, threads); });
}

// (P, d, L)
void cpu_gaussian_attention(const Tuple& sizes, int64_t features, int64_t values, int64_t out, float cutoff,
                            int threads) {
  cpu::GaussianAttention g;
  int64_t* size[] = {&g.P, &g.d, &g.L};
  for (int i = 0; i < 3; ++i) *size[i] = sizes.at<int64_t>(i);
  g.features = pointer<float>(features);
  g.values = pointer<float>(values);
  g.out = pointer<float>(out);
  g.cutoff = cutoff;
  without_lock([&] { return cpu::gaussian_attention(g, threads); });
}

bool cpu_set_isa(const char* name) { return cpu::set_isa(name); }

// isas: their names, between spaces.
PyObject* cpu_info() {
  std::string isas;
  for (const char* const* name = cpu::available_isas(); *name; ++name) {
    isas += (isas.empty() ? "" : " ") + std::string(*name);
  }
#if defined(__x86_64__) && defined(__GNUC__)
  const char* vendor = __builtin_cpu_is("amd") ? "amd" : __builtin_cpu_is("intel") ? "intel" : "other";
#else
  const char* vendor = "other";
#endif
#if defined(__VERSION__)
  const char* compiler = __VERSION__;
#else
  const char* compiler = "unknown";
#endif
  return Py_BuildValue("{s:s,s:s,s:O,s:s,s:s}", "isa", cpu::isa(), "isas", isas.c_str(), "openmp",
                       cpu::has_openmp() ? Py_True : Py_False, "vendor", vendor, "compiler", compiler);
}

PyMethodDef methods[] = {
    method<cpu_attention>("cpu_attention"),
    method<cpu_backward>("cpu_backward"),
    method<cpu_packed_bytes>("cpu_packed_bytes"),
    method<cpu_pack>("cpu_pack"),
    method<cpu_smooth>("cpu_smooth"),
    method<cpu_gaussian_attention>("cpu_gaussian_attention"),
    method<cpu_info>("cpu_info"),
    method<cpu_set_isa>("cpu_set_isa"),
    {},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_core",
    "The compiled core of sdattn_fast. Addresses and strides in, nothing of torch; see sdattn_fast.backend.",
    0,
    methods,
};

}  // namespace

PyMODINIT_FUNC PyInit__core() { return PyModuleDef_Init(&module); }
