// Python's door to the compiled core. Tensors arrive as addresses and strides; the core knows nothing of torch.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/attention.h"
#include "cpu/backward.h"
#include "tuples.h"

namespace py = pybind11;
using namespace sdattn;
using namespace sdattn::tuples;

namespace {

void raise_on(cpu::Error error) {
  if (error == cpu::bad_size) throw std::invalid_argument("too many tokens or too large a head dimension");
  if (error == cpu::out_of_memory) throw std::bad_alloc();
}

void cpu_attention(const py::tuple& sizes, int dtype, float scale, const py::tuple& query, const py::tuple& key,
                   const py::tuple& value, const py::tuple& out, const py::tuple& bias, int bias_dtype, int64_t maps,
                   int64_t bits, const py::tuple& rows, int64_t packed, int64_t out_bias, const py::tuple& picture,
                   int threads) {
  Attention a;
  set_sizes(a, sizes, dtype);
  a.scale = scale;
  a.packed = pointer<void>(packed);
  a.out_bias = pointer<float>(out_bias);
  a.query = tensor(query);
  a.key = tensor(key);
  a.value = tensor(value);
  a.out = tensor(out);
  a.bias = tensor(bias);
  a.bias_dtype = static_cast<DType>(bias_dtype);
  a.maps = pointer<float>(maps);
  a.bits = pointer<int32_t>(bits);

  a.program = row_program(rows);
  PictureProgram over;
  if (!picture.empty()) {
    over = picture_program(picture);
    a.picture = &over;
  }
  cpu::Error error;
  {
    py::gil_scoped_release release;
    error = cpu::attention(a, threads);
  }
  raise_on(error);
}

// grads: of query, key, value, gate, the bias of tokens, the bias. relevance: to, tokens, how many, heads.
void cpu_backward(const py::tuple& sizes, int dtype, float scale, const py::tuple& query, const py::tuple& key,
                  const py::tuple& value, const py::tuple& bias, int bias_dtype, int64_t bits, const py::tuple& rows,
                  const py::tuple& grad_out, int64_t grad_maps, const py::tuple& grads, const py::tuple& relevance,
                  int threads) {
  cpu::Backward w;
  Attention& a = w.forward;
  set_sizes(a, sizes, dtype);
  a.scale = scale;
  a.query = tensor(query);
  a.key = tensor(key);
  a.value = tensor(value);
  a.bias = tensor(bias);
  a.bias_dtype = static_cast<DType>(bias_dtype);
  a.bits = pointer<int32_t>(bits);
  a.program = row_program(rows);
  w.grad_out = tensor(grad_out);
  w.grad_maps = pointer<float>(grad_maps);
  w.grad_query = tensor(grads[0]);
  w.grad_key = tensor(grads[1]);
  w.grad_value = tensor(grads[2]);
  w.grad_gate = pointer<float>(grads[3].cast<int64_t>());
  w.grad_bias_of_tokens = pointer<float>(grads[4].cast<int64_t>());
  w.grad_bias = tensor(grads[5]);
  w.relevance = pointer<float>(relevance[0].cast<int64_t>());
  w.relevance_tokens = pointer<int32_t>(relevance[1].cast<int64_t>());
  w.relevance_count = relevance[2].cast<int64_t>();
  w.relevance_heads = pointer<uint8_t>(relevance[3].cast<int64_t>());
  cpu::Error error;
  {
    py::gil_scoped_release release;
    error = cpu::backward(w, threads);
  }
  raise_on(error);
}

int64_t cpu_packed_bytes(const py::tuple& sizes, int dtype) {
  Attention a;
  set_sizes(a, sizes, dtype);
  return static_cast<int64_t>(cpu::packed_bytes(a));
}

void cpu_pack(const py::tuple& sizes, int dtype, const py::tuple& key, const py::tuple& value, int64_t content, int64_t to,
              int threads) {
  Attention a;
  set_sizes(a, sizes, dtype);
  a.key = tensor(key);
  a.value = tensor(value);
  a.program.content = pointer<uint8_t>(content);
  cpu::Error error;
  {
    py::gil_scoped_release release;
    error = cpu::pack(a, threads, pointer<void>(to));
  }
  raise_on(error);
}

void cpu_smooth(const py::tuple& sizes, int dtype, int64_t x, int64_t out, int64_t where, int64_t weights, int64_t radius,
                int64_t times, int threads) {
  cpu::Smoothing s;
  int64_t* size[] = {&s.B, &s.H, &s.height, &s.width, &s.C};
  for (int i = 0; i < 5; ++i) *size[i] = sizes[i].cast<int64_t>();
  s.dtype = static_cast<DType>(dtype);
  s.x = pointer<void>(x);
  s.out = pointer<void>(out);
  s.where = pointer<uint8_t>(where);
  s.weights = pointer<float>(weights);
  s.radius = radius;
  s.times = times;
  cpu::Error error;
  {
    py::gil_scoped_release release;
    error = cpu::smooth(s, threads);
  }
  raise_on(error);
}

// (P, d, L)
void cpu_gaussian_attention(const py::tuple& sizes, int64_t features, int64_t values, int64_t out, float cutoff,
                            int threads) {
  cpu::GaussianAttention g;
  int64_t* size[] = {&g.P, &g.d, &g.L};
  for (int i = 0; i < 3; ++i) *size[i] = sizes[i].cast<int64_t>();
  g.features = pointer<float>(features);
  g.values = pointer<float>(values);
  g.out = pointer<float>(out);
  g.cutoff = cutoff;
  cpu::Error error;
  {
    py::gil_scoped_release release;
    error = cpu::gaussian_attention(g, threads);
  }
  raise_on(error);
}

py::dict cpu_info() {
  py::list isas;
  for (const char* const* name = cpu::available_isas(); *name; ++name) isas.append(*name);
  py::dict info;
  info["isa"] = cpu::isa();
  info["isas"] = isas;
  info["openmp"] = cpu::has_openmp();
#if defined(__x86_64__) && defined(__GNUC__)
  info["vendor"] = __builtin_cpu_is("amd") ? "amd" : __builtin_cpu_is("intel") ? "intel" : "other";
#else
  info["vendor"] = "other";
#endif
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled core of sdattn_fast. Addresses and strides in, nothing of torch; see sdattn_fast.backend.";
  m.def("cpu_attention", &cpu_attention);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_packed_bytes", &cpu_packed_bytes);
  m.def("cpu_pack", &cpu_pack);
  m.def("cpu_smooth", &cpu_smooth);
  m.def("cpu_gaussian_attention", &cpu_gaussian_attention);
  m.def("cpu_info", &cpu_info);
  m.def("cpu_set_isa", [](const std::string& name) { return cpu::set_isa(name.c_str()); });
}
