// TVM's virtual machine by way of its FFI, whose C functions are all that is linked: no C++ standard library has to be
// the one TVM was built with.
#pragma once

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"

namespace t3c {

class VirtualMachine {
 public:
  // Loads the code of `library`. Memory of a call is kept for the next one until release_memory; fresh pages would cost
  // a fifth of a call.
  explicit VirtualMachine(const std::string& library);
  ~VirtualMachine();
  VirtualMachine(const VirtualMachine&) = delete;

  // A function of the library; an Error where it has none of that name.
  tvm::ffi::Function function(const std::string& name) const;

  static void release_memory();

 private:
  tvm::ffi::Any executable_, machine_;
};

// Row-major values as an argument: themselves where they begin at a multiple of 64 bytes, which compiled code assumes,
// else a copy. They must outlive it.
tvm::ffi::Tensor tensor_of(const void* data, const Dtype& dtype, std::vector<int64_t> shape);

// The tensors of a result, in order: one, or those of nested tuples.
std::vector<tvm::ffi::Tensor> tensors_of(const tvm::ffi::Any& result);

// Calls `function` with any number of arguments.
tvm::ffi::Any call(const tvm::ffi::Function& function, const std::vector<tvm::ffi::Any>& arguments);

}  // namespace t3c
