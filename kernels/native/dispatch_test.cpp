// SPDX-License-Identifier: Apache-2.0
// How a table is chosen, without torch and with made-up tables. Exits 0 when all is well; else says what is not.
#include <csignal>
#include <cstdio>

#include "choice.h"
#include "self_test.h"

using namespace vllm_ext;

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("%s\n", what);
}

void fill(const RecordPair& pair, float value) {
  for (int i = 0; i < pair.x.tokens * 2 * kRows; ++i) pair.out[i] = value;
}

Kernels make_table(const char* name, void (*multiply_records)(const RecordPair&)) {
  Kernels table{};
  table.name = name;
  table.enter = [] { return ThreadState{0}; };
  table.leave = [](ThreadState) {};
  table.multiply_records = multiply_records;
  return table;
}

const Kernels right = make_table("right", [](const RecordPair& pair) { fill(pair, 1); });
const Kernels wrong = make_table("wrong", [](const RecordPair& pair) { fill(pair, 2); });
// As on a machine that offers an instruction and does not have it.
const Kernels faulty = make_table("faulty", [](const RecordPair&) { __builtin_trap(); });
const Kernels endless = make_table("endless", [](const RecordPair& pair) {
  for (volatile const RecordPair* still = &pair; still;) pause();
});

const Kernels* const tables[] = {&faulty, &wrong, &right, nullptr};
int tried[3];

bool works(const Kernels& kernels) {
  for (int i = 0; i < 3; ++i) tried[i] += tables[i] == &kernels;
  return agree_in_child(kernels, right);
}

}  // namespace

int main() {
  // What Python's faulthandler does, and what a server that ignores its children does.
  std::signal(SIGILL, [](int) { _exit(3); });
  std::signal(SIGCHLD, SIG_IGN);
  check(agree_in_child(right, right), "a table that is right is refused");
  check(!agree_in_child(wrong, right), "a table that is wrong is accepted");
  check(!agree_in_child(faulty, right), "a table that faults is accepted");
  check(!agree_in_child(endless, right, 1), "a table that does not end is accepted");

  Choice lesser(tables, works);
  lesser.set(right);
  check(&lesser.current() == &right && tried[0] + tried[1] + tried[2] == 0, "a lesser set tries the better ones");
  Choice best(tables, works);
  check(&best.current() == &right && tried[0] == 1 && tried[1] == 1, "a table that fails is not left for the next");
  check(&best.current() == &right && tried[0] == 1, "tables are tried at each call");
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
