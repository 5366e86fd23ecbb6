// TVM's virtual machine by way of its FFI, whose C functions are all that is linked: no C++ standard library has to be
// the one TVM was built with.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tensor.h"

namespace t3c {

// What TVM says is wrong becomes an Error.
class VirtualMachine {
 public:
  // Loads the code of `library`, whose `functions` run a profile each.
  VirtualMachine(const std::string& library, const std::vector<std::string>& functions);
  ~VirtualMachine();
  VirtualMachine(const VirtualMachine&) = delete;

  // Has a function of the library pack tensors of the store, and adds what it makes to the weights of all profiles. Some
  // may be tensors of the store as they are.
  void pack(const std::string& function, const std::vector<Tensor>& stored);

  // Runs a function on inputs and the weights. What it returns lives until the next run. Memory of a run is kept for
  // the next one until release_memory; fresh pages would cost a fifth of a call.
  const std::vector<Tensor>& run(size_t function, const std::vector<Tensor>& inputs);
  void release_memory();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace t3c
