#include "session.h"

#include <cmath>
#include <cstdio>
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
  if (target.on_gpu) return "it is CUDA code, which this runner does not load: use the Python package";
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

// The path of a file that is as the manifest says.
std::string checked(const std::string& folder, const Manifest& manifest, const std::string& name) {
  check_file(folder, manifest, name);
  return folder + "/" + name;
}

std::vector<std::string> functions(const Target& target) {
  std::vector<std::string> names;
  for (const Profile& profile : target.profiles) names.push_back(profile.function);
  return names;
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
      store_(checked(folder, manifest, kStore)),
      memory_(active_, {}) {
  std::vector<std::vector<Tensor>> stored;
  for (const Pack& pack : target_.packs) {
    stored.emplace_back();
    for (const std::string& name : pack.tensors) stored.back().push_back(store_.at(name));
  }
  // Everything that is used was checked: here is the first code of the artifact.
  machine_.emplace(checked(folder, manifest, target_.library), functions(target_));
  // Packed once, for all profiles, and pages of the store are let go as that goes on.
  for (size_t i = 0; i < stored.size(); ++i) {
    machine_->pack(target_.packs[i].function, stored[i]);
    store_.drop_pages();
  }
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

void Session::check_inputs(const std::vector<Tensor>& inputs) const {
  if (inputs.size() != inputs_.size()) {
    throw Error(T3C_BAD_INPUT,
                std::to_string(inputs.size()) + " inputs given, the model takes " + std::to_string(inputs_.size()));
  }
  std::map<std::string, int64_t> free;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Input& want = inputs_[i];
    const std::vector<int64_t>& shape = inputs[i].shape;
    if (inputs[i].dtype->name != want.dtype) {
      throw Error(T3C_BAD_INPUT,
                  "input '" + want.name + "' is " + inputs[i].dtype->name + ", the model takes " + want.dtype);
    }
    bool same = shape.size() == want.shape.size();
    for (size_t j = 0; same && j < shape.size(); ++j) {
      const Size& size = want.shape[j];
      int64_t expected = size.fixed == -1 ? free.emplace(size.symbol, shape[j]).first->second : size.fixed;
      same = shape[j] == expected && shape[j] > 0;
    }
    if (!same) {
      std::string found = shape_text(shape, [](int64_t size) { return std::to_string(size); });
      std::string wanted = shape_text(want.shape, [](const Size& size) {
        return size.fixed == -1 ? "'" + size.symbol + "'" : std::to_string(size.fixed);
      });
      throw Error(T3C_BAD_INPUT, "input '" + want.name + "' has shape " + found + ", the model takes " + wanted);
    }
  }
}

const std::vector<Tensor>& Session::run(const std::vector<Tensor>& inputs) {
  check_inputs(inputs);
  std::pair<size_t, std::vector<std::vector<int64_t>>> memory{active_, {}};
  for (const Tensor& input : inputs) memory.second.push_back(input.shape);
  if (memory != memory_) {
    // What calls of another profile or other sizes have left is of no use to this one.
    machine_->release_memory();
    memory_ = std::move(memory);
  }
  return machine_->run(active_, inputs);
}

}  // namespace t3c
