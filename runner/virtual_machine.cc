#include "virtual_machine.h"

#include <tvm/ffi/extra/module.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu.h"
#include "error.h"

namespace t3c {
namespace {

namespace ffi = tvm::ffi;

constexpr size_t kAlignment = 64;

// TVM's numbers for the host as a device, and for the allocator that keeps what is given back.
constexpr int kCpu = 1, kPooled = 2;

ffi::Function global(const char* name) { return ffi::Function::GetGlobalRequired(name); }

ffi::Function function_of(const ffi::Any& module, const std::string& name) {
  auto found = global("ffi.ModuleGetFunction")(module, ffi::String(name), true).as<ffi::Function>();
  if (!found) throw Error(T3C_BAD_ARTIFACT, "it has no function " + name);
  return *found;
}

// What a tensor that views memory keeps until it is gone.
struct View {
  DLManagedTensor managed{};
  std::vector<int64_t> shape;
  std::unique_ptr<void, decltype(&std::free)> copy{nullptr, &std::free};
};

}  // namespace

VirtualMachine::VirtualMachine(const std::string& library) {
  let_tvm_use_all_cores();
  executable_ = global("ffi.ModuleLoadFromFile")(ffi::String(library));
  machine_ = function_of(executable_, "vm_load_executable")();
  function("vm_initialization")(kCpu, 0, kPooled);
}

VirtualMachine::~VirtualMachine() {
  machine_ = nullptr;
  release_memory();
}

ffi::Function VirtualMachine::function(const std::string& name) const { return function_of(machine_, name); }

void VirtualMachine::release_memory() { global("vm.builtin.memory_manager.clear")(); }

ffi::Tensor tensor_of(const void* data, const Dtype& dtype, std::vector<int64_t> shape) {
  auto view = std::make_unique<View>();
  view->shape = std::move(shape);
  size_t bytes = dtype.bytes;
  for (int64_t size : view->shape) bytes *= static_cast<size_t>(size);
  if (reinterpret_cast<uintptr_t>(data) % kAlignment) {
    view->copy.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    if (!view->copy) throw std::bad_alloc();
    std::memcpy(view->copy.get(), data, bytes);
    data = view->copy.get();
  }
  DLTensor& tensor = view->managed.dl_tensor;
  tensor.data = const_cast<void*>(data);
  tensor.device = {kDLCPU, 0};
  tensor.ndim = static_cast<int32_t>(view->shape.size());
  tensor.dtype = {dtype.code, static_cast<uint8_t>(8 * dtype.bytes), 1};
  tensor.shape = view->shape.data();
  view->managed.manager_ctx = view.get();
  view->managed.deleter = [](DLManagedTensor* self) { delete static_cast<View*>(self->manager_ctx); };
  return ffi::Tensor::FromDLPack(&view.release()->managed);
}

std::vector<ffi::Tensor> tensors_of(const ffi::Any& result) {
  if (auto tensor = result.as<ffi::Tensor>()) return {*tensor};
  std::vector<ffi::Tensor> found;
  for (const ffi::Any& item : result.cast<ffi::Array<ffi::Any>>()) {
    for (const ffi::Tensor& tensor : tensors_of(item)) found.push_back(tensor);
  }
  return found;
}

ffi::Any call(const ffi::Function& function, const std::vector<ffi::Any>& arguments) {
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  function.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  return result;
}

}  // namespace t3c
