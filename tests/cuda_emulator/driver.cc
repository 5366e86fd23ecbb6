// What TVM's CUDA runtime calls of libcudart and libcuda, on the host's memory: a module's "machine code" is the path of a
// library of kernels compiled for the processor, and a launch runs their threads as fibers.
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <chrono>
#include <string>
#include <vector>

#include "kernels.h"

extern "C" {
Place t3c_thread, t3c_block;
}

namespace {
constexpr size_t kStack = 64 << 10;
struct Fiber {
  jmp_buf state;
  ucontext_t start;
  std::vector<char> stack = std::vector<char>(kStack);
  bool began, done;
  unsigned long block_waits, warp_waits;
};
std::vector<Fiber> fibers(1024);
ucontext_t scheduler_start;
jmp_buf scheduler;
int current;
unsigned threads;
std::function<void()> kernel;
int slots[32][32][16];
unsigned long block_waits, warp_waits[32];  // of all threads of the block, of a warp
bool backwards;
int generation = 8;

void fiber_main() {
  kernel();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

void resume(int number) {
  Fiber& fiber = fibers[number];
  current = number;
  t3c_thread = {unsigned(number), 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.began) _longjmp(fiber.state, 1);
  fiber.began = true;
  setcontext(&fiber.start);
}

// Whether all that a fiber waits for have come: nobody waits a second time before all have the first.
bool may_run(int number) {
  Fiber& fiber = fibers[number];
  unsigned warp = number / 32, in_warp = std::min(threads - warp * 32, 32u);
  return block_waits >= fiber.block_waits * threads && warp_waits[warp] >= fiber.warp_waits * in_warp;
}

void run_block() {
  block_waits = 0;
  std::fill_n(warp_waits, 32, 0);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.began = fiber.done = false;
    fiber.block_waits = fiber.warp_waits = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, fiber_main, 0);
  }
  for (bool progress = true, left = true; left;) {
    progress = left = false;
    for (unsigned n = 0; n < threads; ++n) {
      int number = backwards ? threads - 1 - n : n;
      if (fibers[number].done) continue;
      left = true;
      if (!may_run(number)) continue;
      progress = true;
      resume(number);
    }
    if (left && !progress) t3c_fail("threads wait for each other");
  }
}
}  // namespace

extern "C" {
void t3c_run_backwards(int yes) { backwards = yes; }
void t3c_be_generation(int number) { generation = number; }

void t3c_wait(int warp_only) {
  Fiber& fiber = fibers[current];
  ++(warp_only ? fiber.warp_waits : fiber.block_waits);
  ++(warp_only ? warp_waits[current / 32] : block_waits);
  if (!_setjmp(fiber.state)) _longjmp(scheduler, 1);
}
int (*t3c_slots())[16] { return slots[t3c_thread.x / 32]; }

struct LaunchConfig { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned count; };

struct Function { void (*call)(void**); int count; };
// A launch with its arguments, each of eight bytes at the most.
struct Launch {
  LaunchConfig config;
  Function function;
  std::vector<uint64_t> arguments;

  void run() {
    threads = config.block[0];
    std::vector<void*> places;
    for (uint64_t& argument : arguments) places.push_back(&argument);
    kernel = [&] { function.call(places.data()); };
    for (unsigned z = 0; z < config.grid[2]; ++z)
      for (unsigned y = 0; y < config.grid[1]; ++y)
        for (unsigned x = 0; x < config.grid[0]; ++x) {
          t3c_block = {x, y, z};
          run_block();
        }
  }
};
using Graph = std::vector<Launch>;
static Graph* captured;

int cuLaunchKernelEx(const LaunchConfig* config, const Function* function, void** parameters, void**) {
  if (config->block[0] > 1024 || config->block[1] != 1 || config->block[2] != 1) return 1;
  if (config->grid[1] > 65535 || config->grid[2] > 65535) return 1;
  Launch launch{*config, *function, std::vector<uint64_t>(function->count)};
  // A narrower argument is followed by what is not read.
  for (int i = 0; i < function->count; ++i) memcpy(&launch.arguments[i], parameters[i], 8);
  // What is captured does not run.
  if (captured) captured->push_back(launch);
  else launch.run();
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen((const char*)image, RTLD_NOW);
  if (!*module) fprintf(stderr, "emulated CUDA: %s\n", dlerror());
  return *module ? 0 : 200;
}
int cuModuleUnload(void*) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto call = (void (*)(void**))dlsym(module, (std::string("t3c_call_") + name).c_str());
  auto count = (int*)dlsym(module, (std::string("t3c_count_") + name).c_str());
  if (!call || !count) return 500;
  *function = new Function{call, *count};
  return 0;
}
int cuGetErrorName(int, const char** text) { *text = "emulated error"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "emulated error"; return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int) { *device = 0; return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
// The compute capability: 8.0, or that of another generation.
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 75 ? generation : 0; return 0; }
int cuDeviceGetName(char* name, int size, int) { snprintf(name, size, "emulated"); return 0; }
int cuTensorMapEncodeTiled() { return 1; }

int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaDeviceGetAttribute(int* value, int, int) { *value = 1024; return 0; }
int cudaGetDeviceProperties(void*, int) { return 1; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
const char* cudaGetErrorName(int) { return "emulated error"; }
const char* cudaGetErrorString(int) { return "emulated error"; }
// What nobody writes is seen.
int cudaMalloc(void** memory, size_t size) {
  if (captured) return 900;
  *memory = aligned_alloc(256, (size + 511) / 256 * 256);
  memset(*memory, 0xa5, size);
  return 0;
}
int cudaMallocHost(void** memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFree(void* memory) { free(memory); return 0; }
int cudaFreeHost(void* memory) { free(memory); return 0; }
int cudaMemGetInfo(size_t* left, size_t* all) { *left = *all = size_t(1) << 33; return 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) { memcpy(to, from, size); return 0; }
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) { memcpy(to, from, size); return 0; }
int cudaStreamCreate(void** stream) { *stream = nullptr; return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { *stream = nullptr; return 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaEventCreate(void** event) { *event = nullptr; return 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
int cudaEventElapsedTime(float* time, void*, void*) { *time = 0; return 0; }
int cudaStreamBeginCapture(void*, int) { captured = new Graph; return 0; }
int cudaStreamEndCapture(void*, void** graph) { *graph = captured; captured = nullptr; return 0; }
int cudaGraphDestroy(void*) { return 0; }
int cudaGraphExecDestroy(void* graph) { delete (Graph*)graph; return 0; }
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) { *executable = graph; return 0; }
int t3c_graphs_launched;
int cudaGraphLaunch(void* graph, void*) {
  ++t3c_graphs_launched;
  for (Launch& launch : *(Graph*)graph) launch.run();
  return 0;
}
}
