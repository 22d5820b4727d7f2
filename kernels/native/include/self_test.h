// SPDX-License-Identifier: Apache-2.0
// Whether two tables give the same bits: asked before AMX is used, which hypervisors may offer and not have.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__unix__)
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#endif

#include "kernels.h"

namespace vllm_ext {

// limit: of a difference, as a part of the largest result; 0: the same bits.
static inline bool agree(const Kernels& kernels, const Kernels& trusted, int tokens = 37, float limit = 0) {
  constexpr int kChunks = 2;
  uint32_t state = 1;
  const auto draw = [&state] {
    state = state * 1664525u + 1013904223u;
    return static_cast<uint8_t>(state >> 24);
  };
  for (int bits : {2, 3, 4, 5, 6, 8}) {
    for (int headers : {1, 2, 4}) {
      const auto size = static_cast<std::size_t>(record_bytes(bits, headers));
      std::vector<uint8_t> weight(2 * kChunks * size);
      for (uint8_t& byte : weight) byte = draw();
      for (std::size_t record = 0; record < weight.size(); record += size) {
        for (int i = 0; i < headers * kRows; ++i) {
          // fp16: scales in [1, 2), zero points 0 or 1.
          uint8_t* header = &weight[record + static_cast<std::size_t>(kLine * (i / kRows) + 2 * (i % kRows))];
          header[1] = 0x3c;
          header[kLine / 2] = 0;
          header[kLine / 2 + 1] = i % 3 ? 0x3c : 0;
        }
      }
      for (int planes : {1, 2}) {
        // 16 more rows: tiles are loaded whole.
        std::vector<int8_t> codes(static_cast<std::size_t>((kChunks * tokens * planes + 16) * kDepth));
        for (int8_t& code : codes) code = static_cast<int8_t>(draw() % 255 - 127);
        const std::vector<float> factors(static_cast<std::size_t>(kChunks * headers * tokens), 0.5f);
        std::vector<float> out[2];
        for (int i = 0; i < 2; ++i) {
          out[i].resize(static_cast<std::size_t>(tokens * 2 * kRows));
          const Kernels& table = i ? trusted : kernels;
          const Activations x{codes.data(), factors.data(), factors.data(), int64_t{tokens} * planes * kDepth,
                              tokens,       tokens,         planes};
          const ThreadState saved = table.enter();
          table.multiply_records(
              {{weight.data(), weight.data() + kChunks * size}, weight.data(), bits, headers, kChunks, x, out[i].data()});
          table.leave(saved);
        }
        float largest = 0;
        for (float value : out[1]) largest = std::max(largest, std::fabs(value));
        for (std::size_t i = 0; i < out[0].size(); ++i) {
          // A NaN is no agreement either.
          if (!(std::fabs(out[0][i] - out[1][i]) <= limit * largest)) return false;
        }
      }
    }
  }
  return true;
}

// The same, in a child process: an instruction that does not work ends the child, not the server. False also where the
// child cannot be made, or takes longer than `seconds`.
static inline bool agree_in_child(const Kernels& kernels, const Kernels& trusted,
                                  [[maybe_unused]] unsigned seconds = 20) {
#if defined(__unix__)
  int ends[2];
  if (pipe(ends) != 0) return false;
  const pid_t child = fork();
  if (child == 0) {
    // Handlers of the parent would report its death; and nobody wants a core file of it.
    for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP, SIGABRT, SIGALRM}) signal(number, SIG_DFL);
    const rlimit none{0, 0};
    (void)setrlimit(RLIMIT_CORE, &none);
    sigset_t none_blocked;
    sigemptyset(&none_blocked);
    sigprocmask(SIG_SETMASK, &none_blocked, nullptr);
    alarm(seconds);
    const char answer = agree(kernels, trusted) ? 'y' : 'n';
    _exit(write(ends[1], &answer, 1) == 1 ? 0 : 1);
  }
  // Not the exit status: where the process ignores its children, there is none.
  while (child > 0 && waitpid(child, nullptr, 0) < 0 && errno == EINTR) continue;
  char answer = 'n';
  if (child > 0 && fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0 && read(ends[0], &answer, 1) != 1) answer = 'n';
  close(ends[0]);
  close(ends[1]);
  return answer == 'y';
#else
  return agree(kernels, trusted);
#endif
}

}  // namespace vllm_ext
