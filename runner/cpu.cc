#include "cpu.h"

#include <sched.h>
#include <stdlib.h>
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <fstream>
#include <sstream>

namespace t3c {

#if defined(__aarch64__)
std::set<std::string> cpu_features() {
  // Not from /proc/cpuinfo: an emulator shows its host's.
  const struct {
    const char* name;
    int vector;
    unsigned long bit;
  } known[] = {
      {"asimd", AT_HWCAP, HWCAP_ASIMD},     {"asimdhp", AT_HWCAP, HWCAP_ASIMDHP}, {"asimddp", AT_HWCAP, HWCAP_ASIMDDP},
      {"sve", AT_HWCAP, HWCAP_SVE},         {"sve2", AT_HWCAP2, HWCAP2_SVE2},     {"i8mm", AT_HWCAP2, HWCAP2_I8MM},
      {"bf16", AT_HWCAP2, HWCAP2_BF16},
  };
  std::set<std::string> features;
  for (const auto& feature : known) {
    if (getauxval(feature.vector) & feature.bit) features.insert(feature.name);
  }
  return features;
}
#else
std::set<std::string> cpu_features() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream flags(line.substr(line.find(':') + 1));
    std::set<std::string> features;
    for (std::string flag; flags >> flag;) features.insert(flag);
    // A process has the tile registers of AMX (state 18 of Linux's asm/fpu/types.h) only if it asks for them.
    const long request_permission = 0x1023, tiles = 18;
    if (features.count("amx_tile") && syscall(SYS_arch_prctl, request_permission, tiles) != 0) {
      for (const char* feature : {"amx_tile", "amx_int8", "amx_bf16"}) features.erase(feature);
    }
    return features;
  }
  return {};
}
#endif

namespace {

// Cores, not their threads, among the processors this process may use.
size_t cores() {
  cpu_set_t processors;
  if (sched_getaffinity(0, sizeof processors, &processors) != 0) return 1;
  std::set<std::string> siblings;
  for (int processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (!CPU_ISSET(processor, &processors)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(processor) + "/topology/thread_siblings_list");
    std::string line;
    if (!std::getline(file, line)) return CPU_COUNT(&processors);
    siblings.insert(line);
  }
  return siblings.size();
}

}  // namespace

void let_tvm_use_all_cores() {
  if (getenv("TVM_NUM_THREADS") || getenv("OMP_NUM_THREADS")) return;
  setenv("TVM_NUM_THREADS", std::to_string(cores()).c_str(), 0);
}

}  // namespace t3c
