// What the processor this program runs on has: its features and its cores.
#pragma once

#include <set>
#include <string>

namespace t3c {

// The architecture, as `uname -m` calls it.
#if defined(__x86_64__)
inline constexpr char kMachine[] = "x86_64";
#elif defined(__aarch64__)
inline constexpr char kMachine[] = "aarch64";
#else
#error "artifacts are compiled for x86_64 and aarch64"
#endif

// Features as Linux names them: from /proc/cpuinfo on x86, from the auxiliary vector on arm64.
std::set<std::string> cpu_features();

// Have TVM run a thread on every core, where the environment does not say how many: left alone it takes every other
// processor for the second thread of a core, and on machines without such threads half of the cores are idle. It reads
// the variable when it first runs something in parallel.
void let_tvm_use_all_cores();

}  // namespace t3c
