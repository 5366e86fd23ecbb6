// The manifest of an artifact: what is in the folder, checked before anything in it is used.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace t3c {

inline constexpr char kStore[] = "weights.safetensors";

// One size of an input: a number, or a name where it is free.
struct Size {
  int64_t fixed;  // -1 where it is free
  std::string symbol;
};

struct Input {
  std::string name, dtype;
  std::vector<Size> shape;
};

// A profile on one target. `latency_ms` is the 90th percentile where it was measured; `drift_bound` NaN where the
// target is not certified.
struct Profile {
  std::string name, function, latency_source;
  double size_mb, latency_ms, energy_mj, drift_bound;
};

// A function of the library that packs these tensors of the store.
struct Pack {
  std::string function;
  std::vector<std::string> tensors;
};

struct Target {
  std::string name, machine, library;
  std::vector<std::string> features;
  std::vector<Profile> profiles;
  std::vector<Pack> packs;
  bool on_gpu = false;
};

// What the manifest says of a file.
struct File {
  int64_t bytes;
  std::string sha256;
};

struct Manifest {
  std::vector<Input> inputs;
  std::vector<Target> targets;
  std::map<std::string, File> files;
};

// Reads the manifest of `folder` and checks its schema version, structure and own hash. Error says what is wrong.
Manifest read_manifest(const std::string& folder);

// Checks size and SHA-256 of the file `name`. Error says that it is missing, truncated or changed.
void check_file(const std::string& folder, const Manifest& manifest, const std::string& name);

}  // namespace t3c
