// A loaded artifact: which profile a budget gets, and running it.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "manifest.h"
#include "store.h"
#include "t3c.h"
#include "tensor.h"
#include "virtual_machine.h"

namespace t3c {

// The greatest profile that fits; where `budget` names a drift, the least that fits and is certified to meet it. An
// Error says the least that can be met.
size_t choose(const std::vector<Profile>& profiles, const t3c_budget& budget);

class Session {
 public:
  // Loads the target of that name, or the first that runs here where it is nullptr.
  Session(const std::string& folder, const char* target);

  const Target& target() const { return target_; }
  const std::vector<Input>& inputs() const { return inputs_; }
  size_t active() const { return active_; }
  void set_profile(const std::string& name);
  void set_budget(const t3c_budget& budget) { active_ = choose(target_.profiles, budget); }

  // Runs the active profile on what the model takes, else Error. What it returns lives until the next call.
  const std::vector<Tensor>& run(const std::vector<Tensor>& inputs);

 private:
  Session(const std::string& folder, Manifest manifest, const char* target);
  void check_inputs(const std::vector<Tensor>& inputs) const;

  std::vector<Input> inputs_;
  Target target_;
  size_t active_;
  // Before the machine: packed weights may be views of it.
  Store store_;
  std::optional<VirtualMachine> machine_;
  // The profile and sizes of inputs that the memory kept is of.
  std::pair<size_t, std::vector<std::vector<int64_t>>> memory_;
};

}  // namespace t3c
