// SPDX-License-Identifier: Apache-2.0
// Weights into records and back, and memory in 2 MiB pages for them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

#include "blocks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vllm_ext {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Zeros, on whole 2 MiB pages where the system gives them: with 4 KiB pages a cold 2-bit weight is read at 60 % of
// the speed.
at::Tensor empty_huge(int64_t num_bytes) {
  TORCH_CHECK_VALUE(num_bytes >= 0, "num_bytes must not be negative, got ", num_bytes);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (num_bytes >= kHugePage) {
    const auto size = static_cast<size_t>(divide_up(num_bytes, kHugePage) * kHugePage);
    const auto padded = size + static_cast<size_t>(kHugePage);
    void* mapped = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(mapped != MAP_FAILED, "cannot allocate ", num_bytes, " bytes for packed weights");
    const auto start = reinterpret_cast<uintptr_t>(mapped);
    const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
    // Advice: without huge pages the memory is only slower.
    (void)madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    return at::from_blob(
        reinterpret_cast<void*>(aligned), {num_bytes}, [mapped, padded](void*) { munmap(mapped, padded); }, at::kByte);
  }
#endif
  return at::empty({num_bytes}, at::kByte).zero_();
}

// Place of record (row block, chunk) of a half (0: the weight, or gate; 1: up).
struct RecordOrder {
  int64_t blocks, chunks, size;
  bool gate_up;
  uint8_t* find(uint8_t* start, int half, int64_t block, int64_t chunk) const {
    const int64_t place = gate_up ? 2 * block + half : block;
    return start + (place * chunks + chunk) * size;
  }
};

RecordOrder order_records(int64_t N, int64_t K, int64_t bits, int64_t group_size, bool gate_up) {
  check_record_format(bits, group_size);
  check_groups(K, group_size);
  TORCH_CHECK_VALUE(!gate_up || N % 2 == 0, "a gate_up weight has an even number of rows, got ", N);
  return {divide_up(gate_up ? N / 2 : N, kRows), divide_up(K, kDepth), record_bytes(bits, count_headers(group_size)),
          gate_up};
}

void repack_block(const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                  int64_t bits, int64_t group_size, bool gate_up, const at::Tensor& out) {
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.scalar_type() == at::kByte, "codes must be uint8 [N, K]");
  const int64_t N = codes.size(0), K = codes.size(1);
  const RecordOrder order = order_records(N, K, bits, group_size, gate_up);
  const int64_t columns = group_size == -1 ? K : group_size, groups = group_size == -1 ? 1 : K / group_size;
  TORCH_CHECK_VALUE(
      scales.scalar_type() == at::kHalf && scales.dim() == 2 && scales.size(0) == N && scales.size(1) == groups,
      "scales must be float16 [", N, ", ", groups, "], got ", scales.scalar_type(), " ", scales.sizes());
  TORCH_CHECK_VALUE(!zeros || (zeros->scalar_type() == at::kByte && zeros->sizes() == scales.sizes()),
                    "zeros must be uint8 [", N, ", ", groups, "]");
  const int halves = gate_up ? 2 : 1;
  const int64_t num_bytes = halves * order.blocks * order.chunks * order.size;
  TORCH_CHECK_VALUE(out.scalar_type() == at::kByte && out.is_contiguous() && out.numel() == num_bytes,
                    "out must be contiguous uint8 of ", num_bytes, " bytes, got ", out.numel());
  const at::Tensor code_rows = codes.contiguous(), scale_rows = scales.contiguous();
  const at::Tensor zero_rows = zeros ? zeros->contiguous() : at::Tensor();
  const auto* code = code_rows.const_data_ptr<uint8_t>();
  const auto* scale = scale_rows.const_data_ptr<at::Half>();
  const auto* zero = zeros ? zero_rows.const_data_ptr<uint8_t>() : nullptr;
  auto* start = out.data_ptr<uint8_t>();
  const int headers = count_headers(group_size);
  const int64_t rows = gate_up ? N / 2 : N;
  at::parallel_for(0, halves * order.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      const int half = static_cast<int>(place % halves);
      const int64_t block = place / halves;
      for (int64_t chunk = 0; chunk < order.chunks; ++chunk) {
        uint8_t* record = order.find(start, half, block, chunk);
        std::memset(record, 0, static_cast<size_t>(order.size));
        for (int n = 0; n < kRows && block * kRows + n < rows; ++n) {
          const int64_t row = half * rows + block * kRows + n;
          for (int header = 0; header < headers; ++header) {
            const int64_t k = chunk * kDepth + header * (kDepth / headers);
            if (k >= K) break;
            auto* line = reinterpret_cast<at::Half*>(record + header * kLine);
            line[n] = scale[row * groups + k / columns];
            line[kRows + n] = static_cast<float>(zero ? zero[row * groups + k / columns] : 1 << (bits - 1));
          }
          const int64_t depth = std::min<int64_t>(kDepth, K - chunk * kDepth);
          for (int k = 0; k < depth; ++k) {
            write_code(record + kLine * headers, static_cast<int>(bits), n, k, code[row * K + chunk * kDepth + k]);
          }
        }
      }
    }
  });
}

at::Tensor dequantize_block(const at::Tensor& arena, int64_t offset, int64_t bits, int64_t group_size, int64_t N,
                            int64_t K, bool gate_up) {
  TORCH_CHECK_VALUE(arena.dim() == 1 && arena.scalar_type() == at::kByte && arena.is_contiguous(),
                    "arena must be contiguous uint8 [bytes]");
  TORCH_CHECK_VALUE(N >= 0 && N < kSizeLimit && K > 0 && K < kSizeLimit, "a weight cannot be [", N, ", ", K, "]");
  const RecordOrder order = order_records(N, K, bits, group_size, gate_up);
  const int halves = gate_up ? 2 : 1;
  check_section(arena, offset, multiply_sizes({halves, order.blocks, order.chunks, order.size}));
  auto* start = arena.data_ptr<uint8_t>() + offset;
  const int headers = count_headers(group_size);
  const int64_t rows = gate_up ? N / 2 : N;
  at::Tensor weight = at::empty({N, K}, at::kFloat);
  auto* out = weight.data_ptr<float>();
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int half = gate_up && row >= rows;
      const int64_t in_half = row - half * rows, n = in_half % kRows;
      for (int64_t chunk = 0; chunk < order.chunks; ++chunk) {
        const uint8_t* record = order.find(start, half, in_half / kRows, chunk);
        const int64_t depth = std::min<int64_t>(kDepth, K - chunk * kDepth);
        for (int k = 0; k < depth; ++k) {
          const auto* line = reinterpret_cast<const at::Half*>(record + k / (kDepth / headers) * kLine);
          const int code = read_code(record + kLine * headers, static_cast<int>(bits), static_cast<int>(n), k);
          out[row * K + chunk * kDepth + k] =
              static_cast<float>(line[n]) * (static_cast<float>(code) - static_cast<float>(line[kRows + n]));
        }
      }
    }
  });
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_ext_cpu, CPU, library) {
  library.impl("repack_block", &repack_block);
  library.impl("dequantize_block", &dequantize_block);
}

// No tensor among its arguments, so no device to choose by.
TORCH_LIBRARY_IMPL(vllm_ext_cpu, CompositeExplicitAutograd, library) { library.impl("empty_huge", &empty_huge); }

}  // namespace vllm_ext
