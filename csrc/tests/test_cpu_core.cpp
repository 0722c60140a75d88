// The core by itself, without Python: every instruction set of this machine against an obvious reference in double.
// tests/csrc/test_sanitizers.py compiles this with AddressSanitizer and UBSan. Buffers are exactly as large as they must
// be, so that a lane too many is found.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpu/attention.h"

using namespace sdattn;

namespace {

int failures = 0;
std::mt19937 random_bits(1);

float uniform() { return static_cast<float>(random_bits() >> 8) / 16777216.0f; }
float normal() { return uniform() + uniform() + uniform() + uniform() - 2.0f; }

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t u = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}

// Numbers of one dtype in a heap block without slack. `at` is what the kernel sees.
struct Numbers {
  DType dtype;
  size_t size;
  std::unique_ptr<char[]> memory;
  Numbers(DType dtype, size_t size) : dtype(dtype), size(size), memory(new char[size * (dtype == bfloat16 ? 2 : 4)]) {}
  void* data() { return memory.get(); }
  float at(size_t i) const {
    if (dtype == bfloat16) return from_bf16(reinterpret_cast<const uint16_t*>(memory.get())[i]);
    return reinterpret_cast<const float*>(memory.get())[i];
  }
  void set(size_t i, float x) {
    if (dtype == bfloat16) reinterpret_cast<uint16_t*>(memory.get())[i] = to_bf16(x);
    else reinterpret_cast<float*>(memory.get())[i] = x;
  }
  void fill(float scale) {
    for (size_t i = 0; i < size; ++i) set(i, scale * normal());
  }
};

Tensor4 dense(Numbers& x, int64_t b, int64_t c, int64_t d) { return {x.data(), {b * c * d, c * d, d, 1}}; }

struct Case {
  int64_t B, H, M, N, D, Dv;
  int kind;  // of the token side, see run
};

struct Row {
  std::vector<double> p;
  std::vector<bool> kept;
};

// Steps 1 to 6 on one row, spelled out.
Row reference_row(const Attention& a, int64_t b, int64_t h, int64_t m, std::vector<double> logits) {
  const RowProgram& r = a.program;
  const int mode = r.head_mode ? r.head_mode[h] : head_program;
  Row row{std::vector<double>(a.N, 0.0), std::vector<bool>(a.N, true)};
  double top = -INFINITY, sum = 0;
  for (double s : logits) top = std::fmax(top, s);
  for (int64_t n = 0; n < a.N; ++n) sum += row.p[n] = top == -INFINITY ? 0.0 : std::exp(logits[n] - top);
  for (double& p : row.p) p /= sum == 0 ? 1 : sum;
  if (mode == head_zero) return {std::vector<double>(a.N, 0.0), std::vector<bool>(a.N, false)};
  std::vector<int64_t> content;
  for (int64_t n = 0; n < a.N; ++n) {
    if (r.content && mode == head_program && r.content[b * a.N + n]) content.push_back(n);
  }
  if (content.empty()) return row;

  std::vector<double>& p = row.p;
  double mass = 0, left = 0, total = 0, highest = 0;
  for (int64_t n : content) mass += p[n];
  if (r.gate) {
    for (int64_t n : content) p[n] *= r.gate[(b * r.gate_heads + (r.gate_heads == 1 ? 0 : h)) * a.N + n];
  }
  if (r.phrases) {
    const std::vector<double> before = p;
    for (int64_t n : content) {
      const int32_t leader = r.phrases[b * a.N + n];
      if (leader < 0) continue;
      double phrase = 0;
      int members = 0;
      for (int64_t i : content) {
        if (r.phrases[b * a.N + i] == leader) phrase += before[i], ++members;
      }
      p[n] = phrase / members;
    }
  }
  const std::vector<double> ranked = p;
  for (int64_t n : content) {
    if (r.random_ratio >= 0 && philox_uniform(r.seeds[b], n, m, h) < r.random_ratio) row.kept[n] = false;
    if (r.drop) {
      int above = 0;  // n goes where fewer than k are larger
      for (int64_t i : content) above += ranked[i] > ranked[n];
      if (above < r.drop[b]) row.kept[n] = false;
    }
  }
  for (int64_t n : content) highest = row.kept[n] ? std::fmax(highest, p[n]) : highest;
  for (int64_t n : content) {
    if (r.threshold >= 0 && p[n] <= r.threshold * highest) row.kept[n] = false;
    if (!row.kept[n]) p[n] = 0;
    left += p[n];
  }
  for (double x : p) total += x;
  if (r.renormalize == renormalize_content) {
    for (int64_t n : content) p[n] *= mass / (left == 0 ? 1 : left);
  } else if (r.renormalize == renormalize_row) {
    for (double& x : p) x /= total == 0 ? 1 : total;
  }
  return row;
}

void expect_near(const char* isa, const char* what, const Case& c, double got, double expected, double tolerance) {
  if (std::fabs(got - expected) <= tolerance * (1 + std::fabs(expected))) return;
  if (++failures < 20) {
    std::printf("%s, %s, kind %d, %ldx%ldx%ldx%ldx%ld: %g, expected %g\n", isa, what, c.kind, long(c.B), long(c.H), long(c.M),
                long(c.N), long(c.D), got, expected);
  }
}

void run(const char* isa, const Case& c, DType dtype, int threads) {
  Attention a;
  a.B = c.B, a.H = c.H, a.M = c.M, a.N = c.N, a.D = c.D, a.Dv = c.Dv;
  a.dtype = dtype;
  a.scale = 0.3f;
  Numbers query(dtype, c.B * c.H * c.M * c.D), key(dtype, c.B * c.H * c.N * c.D), value(dtype, c.B * c.H * c.N * c.Dv);
  Numbers out(dtype, c.B * c.H * c.M * c.Dv), bias(dtype, c.M * c.N);
  query.fill(2), key.fill(1), value.fill(1), bias.fill(1);
  a.query = dense(query, c.H, c.M, c.D);
  a.key = dense(key, c.H, c.N, c.D);
  a.value = dense(value, c.H, c.N, c.Dv);
  a.out = dense(out, c.H, c.M, c.Dv);

  std::vector<uint8_t> content(c.B * c.N), head_mode(c.H);
  std::vector<float> gate(c.B * c.H * c.N), maps;
  std::vector<int32_t> phrases(c.B * c.N, -1), drop(c.B), tokens{static_cast<int32_t>(c.N - 1), 0}, bits;
  std::vector<int64_t> seeds(c.B, 12345678901234567);
  for (int64_t b = 0; b < c.B; ++b) {
    int32_t count = 0, leader = -1;
    for (int64_t n = 0; n < c.N; ++n) {
      content[b * c.N + n] = c.kind == 2 || random_bits() % 3 == 0;
      count += content[b * c.N + n];
      if (!content[b * c.N + n] || n % 5 > 2) continue;
      leader = leader < 0 ? static_cast<int32_t>(n) : leader;
      phrases[b * c.N + n] = leader;
    }
    seeds[b] += b;
    drop[b] = static_cast<int32_t>((c.kind == 2 ? 0.5 : 0.2) * count + 1e-9);
  }
  for (float& g : gate) g = 2 * uniform();
  for (int64_t h = 0; h < c.H; ++h) head_mode[h] = static_cast<uint8_t>(h % 3);

  RowProgram& r = a.program;
  if (c.kind > 0) r.content = content.data();
  if (c.kind == 1) r.gate = gate.data(), r.gate_heads = c.H, r.phrases = phrases.data(), r.head_mode = head_mode.data();
  if (c.kind == 1 || c.kind == 2) r.drop = drop.data(), r.threshold = 0.3f, r.renormalize = renormalize_content;
  if (c.kind == 3) r.random_ratio = 0.3f, r.seeds = seeds.data(), r.renormalize = renormalize_row;
  if (c.kind != 2) a.bias = {bias.data(), {0, 0, c.N, 1}}, a.bias_dtype = dtype;
  const int64_t words = (c.N + 31) / 32;
  bits.resize(c.B * c.H * c.M * words);
  a.bits = bits.data();
  r.capture_tokens = tokens.data();
  r.capture_count = c.N > 1 ? 2 : 1;
  r.capture_mean = false;
  maps.resize(c.B * c.H * r.capture_count * c.M);
  a.maps = maps.data();
  if (cpu::attention(a, threads) != cpu::ok) ++failures, std::printf("an error code\n");

  const double tolerance = dtype == bfloat16 ? 2e-2 : 2e-5;
  for (int64_t i = 0; i < c.B * c.H * c.M; ++i) {
    const int64_t bh = i / c.M, m = i % c.M, b = bh / c.H, h = bh % c.H;
    std::vector<double> logits(c.N);
    for (int64_t n = 0; n < c.N; ++n) {
      for (int64_t d = 0; d < c.D; ++d) logits[n] += double(query.at(i * c.D + d)) * key.at((bh * c.N + n) * c.D + d);
      logits[n] = logits[n] * a.scale + (a.bias.data ? bias.at(m * c.N + n) : 0.0f);
    }
    const Row row = reference_row(a, b, h, m, logits);
    for (int64_t d = 0; d < c.Dv; ++d) {
      double o = 0;
      for (int64_t n = 0; n < c.N; ++n) o += row.p[n] * value.at((bh * c.N + n) * c.Dv + d);
      expect_near(isa, "out", c, out.at(i * c.Dv + d), o, tolerance);
    }
    for (int64_t n = 0; n < c.N; ++n) {
      expect_near(isa, "bits", c, bits[i * words + n / 32] >> (n % 32) & 1, row.kept[n], 0);
    }
    for (int64_t t = 0; t < r.capture_count; ++t) {
      expect_near(isa, "maps", c, maps[(bh * r.capture_count + t) * c.M + m], row.p[tokens[t]], 2e-5);
    }
  }
}

// A folded layer: one query for all heads and one output, panels packed beforehand, against the heads one by one.
void run_folded(const char* isa, const Case& c, DType dtype, int threads) {
  Attention a;
  a.B = c.B, a.H = c.H, a.M = c.M, a.N = c.N, a.D = c.D, a.Dv = c.Dv;
  a.dtype = dtype;
  Numbers query(dtype, c.B * c.M * c.D), key(dtype, c.B * c.H * c.N * c.D), value(dtype, c.B * c.H * c.N * c.Dv);
  Numbers out(dtype, c.B * c.H * c.M * c.Dv), summed(dtype, c.B * c.M * c.Dv);
  query.fill(0.5f), key.fill(0.5f), value.fill(1);
  a.query = {query.data(), {c.M * c.D, 0, c.D, 1}};
  a.key = dense(key, c.H, c.N, c.D);
  a.value = dense(value, c.H, c.N, c.Dv);
  a.out = dense(out, c.H, c.M, c.Dv);
  std::vector<uint8_t> content(c.B * c.N), head_mode(c.H);
  for (uint8_t& x : content) x = random_bits() % 2;
  for (int64_t h = 0; h < c.H; ++h) head_mode[h] = static_cast<uint8_t>(h % 3);
  a.program.content = content.data();
  a.program.head_mode = head_mode.data();
  a.program.threshold = 0.3f;
  if (cpu::attention(a, threads) != cpu::ok) ++failures, std::printf("an error code\n");

  const size_t bytes = cpu::packed_bytes(a), start = 64;
  std::unique_ptr<char, void (*)(void*)> packed(static_cast<char*>(std::aligned_alloc(64, (bytes + start) / 64 * 64)), std::free);
  if (cpu::pack(a, threads, packed.get()) != cpu::ok) ++failures, std::printf("an error code\n");
  std::vector<float> bias(c.Dv);
  for (float& x : bias) x = normal();
  a.key = a.value = {};
  a.packed = packed.get();
  a.out = {summed.data(), {c.M * c.Dv, 0, c.Dv, 1}};
  a.out_bias = bias.data();
  if (cpu::attention(a, threads) != cpu::ok) ++failures, std::printf("an error code\n");
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t i = 0; i < c.M * c.Dv; ++i) {
      double expected = bias[i % c.Dv];
      for (int64_t h = 0; h < c.H; ++h) expected += out.at((b * c.H + h) * c.M * c.Dv + i);
      expect_near(isa, "folded", c, summed.at(b * c.M * c.Dv + i), expected, dtype == bfloat16 ? 3e-2 : 2e-5);
    }
  }
}

int64_t reflect(int64_t i, int64_t n) {
  while (i < 0 || i >= n) i = i < 0 ? -1 - i : 2 * n - 1 - i;
  return i;
}

// Programs over the picture: all of it at once for the memory it touches, then two rounds that decide nothing, which can be
// spelled out. A map of c.M * c.N numbers is kept or, with one round, computed again where it is large.
void run_picture(const char* isa, const Case& c, DType dtype, int64_t height, int64_t width, int64_t steps) {
  Attention a;
  a.B = c.B, a.H = c.H, a.M = c.M, a.N = c.N, a.D = c.D, a.Dv = c.Dv;
  a.dtype = dtype;
  a.scale = 0.3f;
  Numbers query(dtype, c.B * c.H * c.M * c.D), key(dtype, c.B * c.H * c.N * c.D), value(dtype, c.B * c.H * c.N * c.Dv);
  Numbers out(dtype, c.B * c.H * c.M * c.Dv);
  query.fill(2), key.fill(1), value.fill(1);
  a.query = dense(query, c.H, c.M, c.D);
  a.key = dense(key, c.H, c.N, c.D);
  a.value = dense(value, c.H, c.N, c.Dv);
  a.out = dense(out, c.H, c.M, c.Dv);
  const std::vector<uint8_t> content(c.B * c.N, 1);
  std::vector<uint8_t> active(c.B, 1);
  active[c.B - 1] = c.B == 1;
  std::vector<int32_t> tokens{0};
  std::vector<float> maps(c.B * c.M);
  const int64_t radius = 2;
  const float weights[] = {0.1f, 0.2f, 0.4f, 0.2f, 0.1f};
  PictureProgram over;
  over.steps = steps, over.drop = c.M / 5, over.nms = true, over.active = active.data();
  over.height = height, over.width = width, over.weights = weights, over.radius = steps > 1 ? radius : 0;
  a.picture = &over;
  a.program.content = content.data();
  a.program.threshold = 0.3f;
  a.program.renormalize = renormalize_content;
  a.program.capture_tokens = tokens.data(), a.program.capture_count = 1;
  a.maps = maps.data();
  if (cpu::attention(a, 2) != cpu::ok) ++failures, std::printf("an error code\n");
  for (int64_t i = 0; i < c.B * c.H * c.M * c.Dv; ++i) expect_near(isa, "finite", c, std::isfinite(out.at(i)), 1, 0);
  if (steps == 1) return;

  over.drop = 0, over.nms = false, over.steps = 2;
  a.program.threshold = -1.0f;
  a.program.renormalize = renormalize_row;
  if (cpu::attention(a, 2) != cpu::ok) ++failures, std::printf("an error code\n");
  for (int64_t bh = 0; bh < c.B * c.H; ++bh) {
    std::vector<double> p(c.M * c.N), smoothed(c.M * c.N);
    for (int64_t m = 0; m < c.M; ++m) {
      std::vector<double> logits(c.N);
      for (int64_t n = 0; n < c.N; ++n) {
        for (int64_t d = 0; d < c.D; ++d) {
          logits[n] += double(query.at((bh * c.M + m) * c.D + d)) * key.at((bh * c.N + n) * c.D + d);
        }
        logits[n] *= a.scale;
      }
      const double top = *std::max_element(logits.begin(), logits.end());
      double sum = 0;
      for (double& s : logits) sum += s = std::exp(s - top);
      for (int64_t n = 0; n < c.N; ++n) p[m * c.N + n] = logits[n] / sum;
    }
    smoothed = p;
    if (active[bh / c.H]) {
      for (int64_t m = 0; m < c.M; ++m) {
        for (int64_t n = 0; n < c.N; ++n) {
          double sum = 0;
          for (int64_t dy = -radius; dy <= radius; ++dy) {
            for (int64_t dx = -radius; dx <= radius; ++dx) {
              const int64_t from = reflect(m / width + dy, height) * width + reflect(m % width + dx, width);
              sum += double(weights[dy + radius]) * weights[dx + radius] * p[from * c.N + n];
            }
          }
          smoothed[m * c.N + n] = sum;
        }
      }
    }
    for (int64_t m = 0; m < c.M; ++m) {
      for (int64_t d = 0; d < c.Dv; ++d) {
        double o = 0;
        for (int64_t n = 0; n < c.N; ++n) o += smoothed[m * c.N + n] * value.at((bh * c.N + n) * c.Dv + d);
        expect_near(isa, "picture", c, out.at((bh * c.M + m) * c.Dv + d), o, dtype == bfloat16 ? 2e-2 : 2e-5);
      }
    }
  }
}

void run_smooth(const char* isa, int64_t height, int64_t width, int64_t C, DType dtype) {
  const int64_t radius = 5, pixels = height * width;
  std::vector<float> weights(2 * radius + 1);
  for (int64_t k = -radius; k <= radius; ++k) weights[k + radius] = std::exp(-0.1f * k * k) / 5.0f;
  Numbers x(dtype, 2 * pixels * C), out(dtype, 2 * pixels * C);
  x.fill(1);
  const uint8_t where[2] = {0, 1};
  cpu::Smoothing s;
  s.B = 1, s.H = 2, s.height = height, s.width = width, s.C = C;
  s.dtype = dtype, s.x = x.data(), s.out = out.data(), s.where = where, s.weights = weights.data(), s.radius = radius;
  if (cpu::smooth(s, 2) != cpu::ok) ++failures, std::printf("an error code\n");
  const Case shown{1, 2, height, width, C, C, 9};
  for (int64_t i = 0; i < 2 * pixels * C; ++i) {
    const int64_t h = i / (pixels * C), yx = i / C % pixels, c = i % C;
    double expected = h == 0 ? x.at(i) : 0.0;
    for (int64_t dy = -radius; h == 1 && dy <= radius; ++dy) {
      for (int64_t dx = -radius; dx <= radius; ++dx) {
        const int64_t from = reflect(yx / width + dy, height) * width + reflect(yx % width + dx, width);
        expected += double(weights[dy + radius]) * weights[dx + radius] * x.at((pixels + from) * C + c);
      }
    }
    expect_near(isa, "smooth", shown, out.at(i), expected, dtype == bfloat16 ? 2e-2 : 2e-5);
  }
}

}  // namespace

int main() {
  const Case shapes[] = {{1, 1, 1, 1, 1, 1, 0},   {2, 3, 33, 7, 5, 3, 0},     {1, 3, 65, 77, 40, 40, 0},
                         {1, 2, 31, 33, 13, 29, 0}, {1, 1, 40, 154, 80, 64, 0}, {1, 1, 9, 256, 256, 256, 0}};
  for (const char* const* name = cpu::available_isas(); *name; ++name) {
    cpu::set_isa(*name);
    for (Case c : shapes) {
      for (c.kind = 0; c.kind < 4; ++c.kind) {
        for (DType dtype : {float32, bfloat16}) run(*name, c, dtype, 1 + c.kind % 2);
      }
    }
    for (Case c : {Case{1, 1, 1, 1, 1, 1, 4}, Case{2, 4, 35, 7, 300, 37, 4}, Case{1, 3, 9, 77, 41, 301, 4}, Case{1, 2, 5, 200, 3, 5, 4}}) {
      for (DType dtype : {float32, bfloat16}) run_folded(*name, c, dtype, 2);
    }
    for (DType dtype : {float32, bfloat16}) {
      run_smooth(*name, 9, 13, 40, dtype);
      run_smooth(*name, 2, 3, 5, dtype);
      run_smooth(*name, 1, 17, 33, dtype);
    }
    for (DType dtype : {float32, bfloat16}) {
      for (int64_t steps : {1, 3}) {
        run_picture(*name, {2, 2, 35, 13, 8, 9, 10}, dtype, 5, 7, steps);
        run_picture(*name, {1, 3, 3, 77, 40, 40, 11}, dtype, 1, 3, steps);
        run_picture(*name, {1, 1, 320, 5, 4, 4, 12}, dtype, 20, 16, steps);
      }
      run_picture(*name, {1, 1, 5000, 256, 2, 2, 13}, dtype, 50, 100, 1);
    }
    std::printf("%s: done\n", *name);
  }
  std::printf(failures ? "%d failures\n" : "all right\n", failures);
  return failures != 0;
}
