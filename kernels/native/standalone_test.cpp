// SPDX-License-Identifier: Apache-2.0
// The inner loops of every instruction set of this machine, without torch, on buffers of exactly the size that they
// may touch: made for -fsanitize=address,undefined. Exits 0 when all is well; else says what is not.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "detect.h"
#include "self_test.h"

using namespace vllm_ext;

namespace {

int failures = 0;
std::mt19937 generator(1);

void check(bool holds, const Kernels& kernels, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0) {
  if (holds) return;
  ++failures;
  std::printf("%s: %s (%lld, %lld, %lld)\n", kernels.name, what, static_cast<long long>(a), static_cast<long long>(b),
              static_cast<long long>(c));
}

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::vector<float> draw_floats(int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// fp16 bits of a whole number below 2048, or of a power of two; enough for headers.
uint16_t make_half(int value) {
  if (value == 0) return 0;
  int exponent = 0;
  while (value >> (exponent + 1)) ++exponent;
  return static_cast<uint16_t>((exponent + 15) << 10 | (value << (10 - exponent) & 0x3ff));
}

void test_codes(const Kernels& kernels) {
  for (int bits : {2, 3, 4, 5, 6, 8}) {
    std::vector<uint8_t> codes(static_cast<size_t>(kLine * 4 * bits));
    std::vector<int> expected;
    for (int n = 0; n < kRows; ++n) {
      for (int k = 0; k < kDepth; ++k) {
        expected.push_back(draw(0, (1 << bits) - 1));
        write_code(codes.data(), bits, n, k, expected.back());
      }
    }
    for (int i = 0; i < kRows * kDepth; ++i) {
      check(read_code(codes.data(), bits, i / kDepth, i % kDepth) == expected[static_cast<size_t>(i)], kernels,
            "a code is not read as written", bits, i);
    }
  }
}

void test_records(const Kernels& kernels, int bits, int headers, int planes, int tokens) {
  const int64_t chunks = 2, size = record_bytes(bits, headers), rows = tokens * planes;
  std::vector<uint8_t> weights[2];
  for (auto& weight : weights) {
    weight.resize(static_cast<size_t>(chunks * size));
    for (uint8_t& byte : weight) byte = static_cast<uint8_t>(draw(0, 255));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int i = 0; i < headers * kRows; ++i) {
        uint8_t* header = &weight[static_cast<size_t>(chunk * size + i / kRows * kLine + i % kRows * 2)];
        const uint16_t scale = make_half(draw(1, 9)), zero = make_half(draw(0, (1 << bits) - 1));
        std::memcpy(header, &scale, 2);
        std::memcpy(header + kLine / 2, &zero, 2);
      }
    }
  }
  // AMX loads whole tiles of 16 rows.
  std::vector<int8_t> codes(static_cast<size_t>((chunks * rows + (kernels.needs & kNeedAmxInt8 ? 16 : 0)) * kDepth));
  for (int8_t& code : codes) code = static_cast<int8_t>(draw(-127, 127));
  const int64_t groups = chunks * headers;
  std::vector<float> scales = draw_floats(groups * tokens), sums(static_cast<size_t>(groups * tokens));
  const int columns = kDepth / headers;
  const auto value = [&](int64_t chunk, int64_t token, int k) {
    const int8_t* row = &codes[static_cast<size_t>((chunk * rows + token * planes) * kDepth)];
    return planes == 1 ? int{row[k]} : 256 * row[k] + row[kDepth + k];
  };
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t token = 0; token < tokens; ++token) {
      int sum = 0;
      for (int k = 0; k < columns; ++k) {
        sum += value(group / headers, token, static_cast<int>(group % headers) * columns + k);
      }
      sums[static_cast<size_t>(group * tokens + token)] = static_cast<float>(sum);
    }
  }
  std::vector<float> out(static_cast<size_t>(tokens * 2 * kRows), std::numeric_limits<float>::quiet_NaN());
  const Activations x{codes.data(), scales.data(), sums.data(), rows * kDepth, tokens, tokens, planes};
  kernels.multiply_records({{weights[0].data(), weights[1].data()}, weights[0].data(), bits, headers, chunks, x, out.data()});
  for (int64_t token = 0; token < tokens; ++token) {
    for (int i = 0; i < 2 * kRows; ++i) {
      double expected = 0, magnitude = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint8_t* record = &weights[i / kRows][static_cast<size_t>(chunk * size)];
        for (int k = 0; k < kDepth; ++k) {
          uint16_t halves[2];
          const uint8_t* header = record + k / columns * kLine + i % kRows * 2;
          std::memcpy(&halves[0], header, 2);
          std::memcpy(&halves[1], header + kLine / 2, 2);
          const auto widen = [](uint16_t half) {
            return half ? std::ldexp(1.0 + (half & 0x3ff) / 1024.0, (half >> 10) - 15) : 0.0;
          };
          const int code = read_code(record + kLine * headers, bits, i % kRows, k);
          const double factor = scales[static_cast<size_t>((chunk * headers + k / columns) * tokens + token)];
          const double term = widen(halves[0]) * (code - widen(halves[1])) * factor * value(chunk, token, k);
          expected += term;
          magnitude += std::fabs(term);
        }
      }
      const float actual = out[static_cast<size_t>(token * 2 * kRows + i)];
      check(std::fabs(actual - expected) <= 1e-5 * magnitude + 1e-6, kernels, "a product is wrong (bits, headers, tokens)",
            bits, headers, tokens);
    }
  }
}

void test_plain(const Kernels& kernels, Element element, int64_t depth, int tokens, int rows) {
  const int64_t stride = divide_up(depth, kDepth) * kDepth, size = element_bytes(element);
  const std::vector<float> values = draw_floats(rows * depth);
  std::vector<uint8_t> weight(static_cast<size_t>(rows * depth * size));
  kernels.store_row(values.data(), rows * depth, element, weight.data());
  std::vector<float> rounded(values.size());
  kernels.load_row(weight.data(), element, rows * depth, 1.0f, rounded.data());
  std::vector<float> x(static_cast<size_t>(tokens * stride), 0.0f);
  for (int token = 0; token < tokens; ++token) {
    for (int64_t k = 0; k < depth; ++k) x[static_cast<size_t>(token * stride + k)] = values[static_cast<size_t>(k)];
  }
  std::vector<float> out(static_cast<size_t>(tokens * 2 * kRows));
  kernels.multiply_plain(
      {{weight.data(), weight.data()}, {rows, rows}, element, depth, x.data(), stride, tokens, out.data()});
  const double limit = element == Element::kBf16 ? 4e-3 : element == Element::kFp16 ? 5e-4 : 0.0;
  for (size_t i = 0; i < values.size(); ++i) {
    check(std::fabs(rounded[i] - values[i]) <= limit * std::fabs(values[i]) + (limit > 0 ? 1e-7 : 0), kernels,
          "an element is not rounded to nearest", static_cast<int>(element), depth);
  }
  for (int i = 0; i < tokens * 2 * kRows; ++i) {
    const int row = i % kRows, token = i / (2 * kRows);
    double expected = 0, magnitude = 0;
    for (int64_t k = 0; row < rows && k < depth; ++k) {
      const double term = double{rounded[static_cast<size_t>(row * depth + k)]} * x[static_cast<size_t>(token * stride + k)];
      expected += term;
      magnitude += std::fabs(term);
    }
    check(std::fabs(out[static_cast<size_t>(i)] - expected) <= 1e-5 * magnitude, kernels, "a plain product is wrong",
          static_cast<int>(element), depth, tokens);
  }
}

void test_rounding(const Kernels& kernels) {
  for (int64_t n : {1, 8, 15, 16, 17, 40, 128}) {
    const std::vector<float> x = draw_floats(n);
    float largest = 0;
    for (float value : x) largest = std::max(largest, std::fabs(value));
    check(kernels.find_largest(x.data(), n) == largest, kernels, "the largest magnitude is wrong", n);
    std::vector<int8_t> codes(static_cast<size_t>(n));
    const float scale = kernels.round_group(x.data(), n, largest, codes.data());
    for (int64_t i = 0; i < n; ++i) {
      const auto place = static_cast<size_t>(i);
      check(codes[place] == static_cast<int>(std::nearbyintf(x[place] / scale)), kernels, "a value is misrounded", n, i);
    }
    for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      std::vector<float> poisoned = x;
      poisoned[static_cast<size_t>(n / 2)] = bad;
      const float found = kernels.find_largest(poisoned.data(), n);
      check(found != found, kernels, "a value that is not finite is lost", n);
    }
  }
  for (int headers : {1, 2, 4}) {
    for (int planes : {1, 2}) {
      std::vector<float> x = draw_floats(kDepth);
      std::fill(x.begin(), x.begin() + kDepth / headers / 2, 0.0f);
      std::vector<int8_t> codes(static_cast<size_t>(planes * kDepth));
      std::vector<float> scales(static_cast<size_t>(headers)), sums(static_cast<size_t>(headers));
      kernels.round_chunk(x.data(), headers, planes, nullptr, {codes.data(), scales.data(), sums.data(), 1});
      for (int k = 0; k < kDepth; ++k) {
        const auto group = static_cast<size_t>(k / (kDepth / headers)), place = static_cast<size_t>(k);
        const int integer = planes == 1 ? int{codes[place]} : 256 * codes[place] + codes[place + kDepth];
        check(std::fabs(scales[group] * static_cast<float>(integer) - x[place]) <= 1.001f * scales[group], kernels,
              "activations are misrounded", headers, planes, k);
      }
    }
  }
}

void test_rest(const Kernels& kernels) {
  for (int64_t n : {1, 7, 16, 33}) {
    for (Element element : {Element::kBf16, Element::kFp16, Element::kFp32}) {
      const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
      const std::vector<float> values(static_cast<size_t>(n), n % 2 ? nan : infinity);
      std::vector<uint8_t> bytes(static_cast<size_t>(n * element_bytes(element)));
      std::vector<float> back(static_cast<size_t>(n));
      kernels.store_row(values.data(), n, element, bytes.data());
      kernels.load_row(bytes.data(), element, n, 2.0f, back.data());
      for (float value : back) check(n % 2 ? value != value : value == infinity, kernels, "not finite, not kept", n);
    }
  }
  const int tokens = 3;
  std::vector<float> pairs = draw_floats(tokens * 2 * kRows), hidden(static_cast<size_t>(tokens * kRows));
  pairs[0] = -200.0f;
  pairs[1] = 200.0f;
  pairs[2] = -1e38f;
  kernels.apply_swiglu(pairs.data(), tokens, hidden.data(), kRows);
  for (int i = 0; i < tokens * kRows; ++i) {
    const double gate = pairs[static_cast<size_t>(i / kRows * 2 * kRows + i % kRows)];
    const double up = pairs[static_cast<size_t>(i / kRows * 2 * kRows + kRows + i % kRows)];
    const double expected = gate / (1 + std::exp(-gate)) * up;
    check(std::fabs(hidden[static_cast<size_t>(i)] - expected) <= 2e-6 * std::fabs(expected) + 1e-30, kernels,
          "SwiGLU is wrong", i);
  }
  const std::vector<float> weights = {0.5f, -2.0f, 3.0f};
  const std::vector<int32_t> rows = {1, 0, 1};
  std::vector<float> sums(2 * 2 * kRows, 1.0f);
  kernels.add_weighted(pairs.data(), weights.data(), rows.data(), tokens, sums.data(), 2 * kRows);
  for (size_t i = 0; i < 2 * kRows; ++i) {
    check(std::fabs(sums[i] - (1 - 2 * pairs[2 * kRows + i])) <= 1e-5, kernels, "a weighted sum is wrong");
    const float expected = 1 + 0.5f * pairs[i] + 3 * pairs[4 * kRows + i];
    check(std::fabs(sums[2 * kRows + i] - expected) <= 1e-5f * (1 + std::fabs(expected)), kernels,
          "a weighted sum is wrong");
  }
}

void test_thread_state(const Kernels& kernels) {
  volatile float tiny = 2e-38f;
  const ThreadState saved = kernels.enter();
  [[maybe_unused]] volatile float flushed = tiny / 16;
  kernels.leave(saved);
  volatile float denormal = tiny / 16;
#if defined(__x86_64__)
  check(flushed == 0, kernels, "denormals are not flushed after enter");
#endif
  check(denormal > 0, kernels, "denormals are still flushed after leave");
}

}  // namespace

int main() {
  const unsigned features = find_features();
  for (const Kernels* const* table = kTables; *table; ++table) {
    const Kernels& kernels = **table;
    if (!can_run(kernels, features)) {
      std::printf("%s: not on this machine\n", kernels.name);
      continue;
    }
    test_thread_state(kernels);
    const ThreadState saved = kernels.enter();
    test_codes(kernels);
    for (int bits : {2, 3, 4, 5, 6, 8}) {
      for (int headers : {1, 2, 4}) {
        for (int planes : {1, 2}) {
          for (int tokens : {1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 29}) test_records(kernels, bits, headers, planes, tokens);
        }
      }
    }
    for (Element element : {Element::kBf16, Element::kFp16, Element::kFp32}) {
      for (int tokens : {1, 2, 3, 6, 11}) {
        test_plain(kernels, element, 128, tokens, 16);
        test_plain(kernels, element, 41, tokens, 5);
        test_plain(kernels, element, 17, tokens, 13);
      }
    }
    test_rounding(kernels);
    test_rest(kernels);
    kernels.leave(saved);
    check(agree(kernels, kScalarKernels, 37, 1e-5f), kernels, "products are not those of the scalar kernels");
    std::printf("%s: done\n", kernels.name);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
