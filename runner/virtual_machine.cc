#include "virtual_machine.h"

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu.h"
#include "error.h"

namespace t3c {
namespace {

namespace ffi = tvm::ffi;

// What vectors of compiled code assume of where tensors begin.
constexpr size_t kAlignment = 64;

// TVM's numbers for the host as a device, and for the allocator that keeps what is given back.
constexpr int kCpu = 1, kPooled = 2;

ffi::Function global(const char* name) { return ffi::Function::GetGlobalRequired(name); }

ffi::Function function_of(const ffi::Any& module, const std::string& name) {
  ffi::Any found = global("ffi.ModuleGetFunction")(module, ffi::String(name), true);
  if (found == nullptr) throw Error(T3C_BAD_ARTIFACT, "it has no function " + name);
  return found.cast<ffi::Function>();
}

template <typename Work>
auto named(const std::string& library, const char* wrong, Work work) {
  try {
    return work();
  } catch (const ffi::Error& error) {
    throw Error(T3C_BAD_ARTIFACT, library + " " + wrong + ": " + error.message());
  } catch (const Error& error) {
    throw Error(error.status, library + " " + wrong + ": " + error.what());
  }
}

// What a tensor that views memory keeps until it is gone.
struct View {
  DLManagedTensor managed{};
  std::vector<int64_t> shape;
  std::unique_ptr<void, decltype(&std::free)> copy{nullptr, &std::free};
};

// `tensor` as an argument: its values where they are well aligned, else a copy.
ffi::Tensor argument(const Tensor& tensor) {
  auto view = std::make_unique<View>();
  view->shape = tensor.shape;
  view->managed.dl_tensor.data = const_cast<void*>(tensor.data);
  if (reinterpret_cast<uintptr_t>(tensor.data) % kAlignment) {
    size_t bytes = tensor.dtype->bytes;
    for (int64_t size : tensor.shape) bytes *= static_cast<size_t>(size);
    view->copy.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
    if (!view->copy) throw std::bad_alloc();
    view->managed.dl_tensor.data = std::memcpy(view->copy.get(), tensor.data, bytes);
  }
  view->managed.dl_tensor.device = {kDLCPU, 0};
  view->managed.dl_tensor.ndim = static_cast<int32_t>(view->shape.size());
  view->managed.dl_tensor.dtype = {tensor.dtype->code, static_cast<uint8_t>(8 * tensor.dtype->bytes), 1};
  view->managed.dl_tensor.shape = view->shape.data();
  view->managed.manager_ctx = view.get();
  view->managed.deleter = [](DLManagedTensor* self) { delete static_cast<View*>(self->manager_ctx); };
  return ffi::Tensor::FromDLPack(&view.release()->managed);
}

std::vector<ffi::Any> arguments(const std::vector<Tensor>& tensors) {
  std::vector<ffi::Any> found;
  for (const Tensor& tensor : tensors) found.push_back(argument(tensor));
  return found;
}

ffi::Any call(const ffi::Function& function, const std::vector<ffi::Any>& arguments) {
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  function.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
  return result;
}

// The tensors of a result, in order: one, or those of nested tuples.
void append(std::vector<ffi::Tensor>& tensors, const ffi::Any& result) {
  if (result.type_index() == ffi::TypeIndex::kTVMFFITensor) {
    tensors.push_back(result.cast<ffi::Tensor>());
  } else {
    for (const ffi::Any& item : result.cast<ffi::Array<ffi::Any>>()) append(tensors, item);
  }
}

}  // namespace

// In the order of making: what a library made is gone before it.
struct VirtualMachine::State {
  std::string library;
  ffi::Any executable, machine;
  std::vector<ffi::Function> functions;
  ffi::Function release;
  ffi::Array<ffi::Tensor> weights;
  std::vector<ffi::Tensor> results;
  std::vector<Tensor> outputs;
};

VirtualMachine::VirtualMachine(const std::string& library, const std::vector<std::string>& functions)
    : state_(std::make_unique<State>()) {
  let_tvm_use_all_cores();
  state_->library = library;
  named(library, "cannot be loaded", [&] {
    state_->executable = global("ffi.ModuleLoadFromFile")(ffi::String(library));
    state_->machine = function_of(state_->executable, "vm_load_executable")();
    function_of(state_->machine, "vm_initialization")(kCpu, 0, kPooled);
    for (const std::string& name : functions) state_->functions.push_back(function_of(state_->machine, name));
    state_->release = global("vm.builtin.memory_manager.clear");
  });
}

VirtualMachine::~VirtualMachine() {
  ffi::Function release = state_->release;
  state_.reset();
  release();
}

void VirtualMachine::pack(const std::string& function, const std::vector<Tensor>& stored) {
  named(state_->library, "cannot be loaded", [&] {
    std::vector<ffi::Tensor> packed;
    append(packed, call(function_of(state_->machine, function), arguments(stored)));
    for (const ffi::Tensor& tensor : packed) state_->weights.push_back(tensor);
  });
}

const std::vector<Tensor>& VirtualMachine::run(size_t function, const std::vector<Tensor>& inputs) {
  state_->outputs.clear();
  state_->results.clear();
  named(state_->library, "failed", [&] {
    std::vector<ffi::Any> all = arguments(inputs);
    all.push_back(state_->weights);
    append(state_->results, call(state_->functions[function], all));
    for (const ffi::Tensor& result : state_->results) {
      const Dtype* dtype = find_dtype(result.dtype().code, result.dtype().bits);
      if (!dtype) throw Error(T3C_BAD_ARTIFACT, "an output is of a type this runner does not know");
      const char* data = static_cast<const char*>(result.data_ptr()) + result.byte_offset();
      state_->outputs.push_back({dtype, {result.shape().begin(), result.shape().end()}, data});
    }
  });
  return state_->outputs;
}

void VirtualMachine::release_memory() {
  state_->outputs.clear();
  state_->results.clear();
  state_->release();
}

}  // namespace t3c
