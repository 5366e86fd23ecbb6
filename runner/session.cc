#include "session.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <set>

#include "cpu.h"
#include "error.h"

namespace t3c {
namespace {

// A measured 90th percentile is taken this much larger when it is held against a budget.
constexpr double kLatencyMargin = 1.1;

std::string printed(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

struct Limit {
  const char* name;
  double cost, limit;
  bool holds() const { return limit == 0 || cost <= limit; }
};

std::vector<Limit> limits(const Profile& profile, const t3c_budget& budget) {
  bool measured = profile.latency_source.rfind("measured", 0) == 0;
  return {{"latency_ms", profile.latency_ms * (measured ? kLatencyMargin : 1), budget.latency_ms},
          {"energy_mj", profile.energy_mj, budget.energy_mj},
          {"size_mb", profile.size_mb, budget.size_mb}};
}

bool fits(const Profile& profile, const t3c_budget& budget) {
  for (const Limit& limit : limits(profile, budget)) {
    if (!limit.holds()) return false;
  }
  return true;
}

std::string excess(const Profile& profile, const t3c_budget& budget) {
  std::string text;
  for (const Limit& limit : limits(profile, budget)) {
    if (limit.holds()) continue;
    text += (text.empty() ? "" : ", ") + std::string(limit.name) + "=" + printed("%g", limit.limit) + " (needs " +
            printed("%.4g", limit.cost) + ")";
  }
  return text;
}

void check_budget(const t3c_budget& budget) {
  const std::pair<const char*, double> named[] = {{"latency_ms", budget.latency_ms},
                                                  {"energy_mj", budget.energy_mj},
                                                  {"size_mb", budget.size_mb},
                                                  {"max_drift", budget.max_drift}};
  for (const auto& [name, value] : named) {
    if (!(value >= 0)) {
      throw Error(T3C_BAD_INPUT,
                  std::string("budget ") + name + "=" + printed("%g", value) + " must be a positive number");
    }
  }
}

// Why this machine cannot run a target's library; empty when it can.
std::string refusal(const Target& target) {
  if (target.machine != kMachine) return "it is for " + target.machine + ", this is " + kMachine;
  std::set<std::string> features = cpu_features();
  std::string missing;
  for (const std::string& feature : target.features) {
    if (!features.count(feature)) missing += (missing.empty() ? "" : ", ") + feature;
  }
  return missing.empty() ? "" : "this CPU lacks " + missing;
}

Target pick(const std::string& folder, std::vector<Target>& targets, const char* wanted) {
  std::string names, refusals;
  for (Target& target : targets) {
    names += (names.empty() ? "" : ", ") + target.name;
    if (wanted && target.name != wanted) continue;
    std::string reason = refusal(target);
    if (reason.empty()) return std::move(target);
    refusals += (refusals.empty() ? "" : "; ") + target.name + ": " + reason;
  }
  if (refusals.empty()) throw Error(T3C_BAD_ARTIFACT, folder + " has no target '" + wanted + "'; it has " + names);
  throw Error(T3C_BAD_ARTIFACT, "no target of " + folder + " runs here: " + refusals);
}

template <typename Sizes, typename Show>
std::string shape_text(const Sizes& sizes, Show show) {
  std::string text;
  for (const auto& size : sizes) text += (text.empty() ? "" : ", ") + show(size);
  return "[" + text + "]";
}

}  // namespace

size_t choose(const std::vector<Profile>& profiles, const t3c_budget& budget) {
  check_budget(budget);
  std::vector<size_t> fitting;
  for (size_t i = 0; i < profiles.size(); ++i) {
    if (fits(profiles[i], budget)) fitting.push_back(i);
  }
  if (fitting.empty()) {
    throw Error(T3C_NO_PROFILE, "no profile fits the budget: " + excess(profiles[0], budget) +
                                    " is below the least profile, " + profiles[0].name);
  }
  if (budget.max_drift == 0) return fitting.back();
  size_t best = fitting[0];
  for (size_t i : fitting) {
    if (std::isnan(profiles[i].drift_bound)) {
      throw Error(T3C_BAD_INPUT, "a budget of max_drift needs a certificate: run t3c-compile certify on the artifact");
    }
    if (profiles[i].drift_bound <= budget.max_drift) return i;
    if (profiles[i].drift_bound < profiles[best].drift_bound) best = i;
  }
  throw Error(T3C_NO_PROFILE, "no profile fits the budget: max_drift=" + printed("%g", budget.max_drift) +
                                  " is below the least drift that can be had, " +
                                  printed("%.4g", profiles[best].drift_bound) + " with " + profiles[best].name);
}

Session::Session(const std::string& folder, const char* target) : Session(folder, read_manifest(folder), target) {}

Session::Session(const std::string& folder, Manifest manifest, const char* target)
    : inputs_(std::move(manifest.inputs)),
      target_(pick(folder, manifest.targets, target)),
      active_(target_.profiles.size() - 1),
      store_(folder + "/" + kStore),
      memory_(std::numeric_limits<size_t>::max(), {}) {
  std::string library = folder + "/" + target_.library;
  try {
    load(library);
  } catch (const tvm::ffi::Error& error) {
    // Whatever TVM says, library and manifest do not belong together.
    throw Error(T3C_BAD_ARTIFACT, library + " cannot be loaded: " + error.message());
  }
}

void Session::load(const std::string& library) {
  for (const Pack& pack : target_.packs) {
    for (const std::string& name : pack.tensors) {
      if (!store_.find(name)) throw Error(T3C_BAD_ARTIFACT, std::string(kStore) + " lacks " + name);
    }
  }
  machine_ = std::make_unique<VirtualMachine>(library);
  for (const Profile& profile : target_.profiles) functions_.push_back(machine_->function(profile.function));
  // Packed once, for all profiles, and pages of the store are let go as that goes on.
  tvm::ffi::Array<tvm::ffi::Any> packed;
  for (const Pack& pack : target_.packs) {
    std::vector<tvm::ffi::Any> raw;
    for (const std::string& name : pack.tensors) {
      const StoredTensor& tensor = *store_.find(name);
      raw.push_back(tensor_of(tensor.data, *tensor.dtype, tensor.shape));
    }
    for (const auto& tensor : tensors_of(call(machine_->function(pack.function), raw))) packed.push_back(tensor);
    store_.drop_pages();
  }
  weights_ = packed;
}

void Session::set_profile(const std::string& name) {
  std::string names;
  for (size_t i = 0; i < target_.profiles.size(); ++i) {
    if (target_.profiles[i].name == name) {
      active_ = i;
      return;
    }
    names += (i ? ", " : "") + target_.profiles[i].name;
  }
  throw Error(T3C_BAD_INPUT, "there is no profile '" + name + "'; there are " + names);
}

void Session::check_inputs(const t3c_tensor* inputs, size_t count) const {
  if (count != inputs_.size()) {
    throw Error(T3C_BAD_INPUT,
                std::to_string(count) + " inputs given, the model takes " + std::to_string(inputs_.size()));
  }
  std::map<std::string, int64_t> free;
  for (size_t i = 0; i < count; ++i) {
    const Input& want = inputs_[i];
    std::vector<int64_t> shape(inputs[i].shape, inputs[i].shape + inputs[i].rank);
    if (inputs[i].dtype != want.dtype) {
      throw Error(T3C_BAD_INPUT, "input '" + want.name + "' is " + inputs[i].dtype + ", the model takes " + want.dtype);
    }
    bool same = shape.size() == want.shape.size();
    for (size_t j = 0; same && j < shape.size(); ++j) {
      const Size& size = want.shape[j];
      int64_t expected = size.fixed == -1 ? free.emplace(size.symbol, shape[j]).first->second : size.fixed;
      same = shape[j] == expected && shape[j] > 0;
    }
    if (!same) {
      throw Error(T3C_BAD_INPUT,
                  "input '" + want.name + "' has shape " +
                      shape_text(shape, [](int64_t size) { return std::to_string(size); }) + ", the model takes " +
                      shape_text(want.shape, [](const Size& size) {
                        return size.fixed == -1 ? "'" + size.symbol + "'" : std::to_string(size.fixed);
                      }));
    }
  }
}

const std::vector<t3c_tensor>& Session::run(const t3c_tensor* inputs, size_t count) {
  check_inputs(inputs, count);
  std::vector<std::vector<int64_t>> shapes;
  std::vector<tvm::ffi::Any> arguments;
  for (size_t i = 0; i < count; ++i) {
    shapes.emplace_back(inputs[i].shape, inputs[i].shape + inputs[i].rank);
    const Dtype* dtype = find_dtype(inputs[i].dtype);
    if (!dtype) throw Error(T3C_BAD_INPUT, "input '" + inputs_[i].name + "': this runner knows no " + inputs[i].dtype);
    arguments.push_back(tensor_of(inputs[i].data, *dtype, shapes.back()));
  }
  arguments.push_back(weights_);
  outputs_.clear();
  results_.clear();
  std::pair memory{active_, std::move(shapes)};
  if (memory != memory_) {
    // What calls of another profile or other sizes have left is of no use to this one.
    VirtualMachine::release_memory();
    memory_ = std::move(memory);
  }
  results_ = tensors_of(call(functions_[active_], arguments));
  for (const tvm::ffi::Tensor& result : results_) {
    const Dtype* dtype = find_dtype(result.dtype().code, result.dtype().bits);
    if (!dtype) throw Error(T3C_BAD_ARTIFACT, "an output is of a type this runner does not know");
    outputs_.push_back({dtype->name, static_cast<size_t>(result.ndim()), result.shape().data(),
                        static_cast<const char*>(result.data_ptr()) + result.byte_offset()});
  }
  return outputs_;
}

}  // namespace t3c
