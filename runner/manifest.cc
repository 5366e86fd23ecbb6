#include "manifest.h"

#include <sys/stat.h>

#include <fstream>
#include <iterator>
#include <limits>

#include "error.h"
#include "json.h"
#include "sha256.h"

namespace t3c {
namespace {

constexpr int kSchema = 3;
constexpr size_t kDigits = 64;
constexpr char kEnd[] = "\"\n}";  // after the hash of the manifest, which stands last

bool is_file(const std::string& path, int64_t* bytes = nullptr) {
  struct stat found;
  if (stat(path.c_str(), &found) != 0 || !S_ISREG(found.st_mode)) return false;
  if (bytes) *bytes = found.st_size;
  return true;
}

void check_schema(const std::string& path, const Json& manifest) {
  Json schema = manifest.at("schema");
  if (!schema.is_integer()) manifest.fail("it has no schema version");
  if (schema.integer() == kSchema) return;
  std::string way_out = schema.integer() > kSchema ? "build a newer runner" : "lower the model again";
  throw Error(T3C_BAD_ARTIFACT, path + " has schema " + std::to_string(schema.integer()) + ", this version reads " +
                                    std::to_string(kSchema) + ": " + way_out);
}

// A manifest's hash is that of the same bytes with zeros in its place.
void check_own_hash(const std::string& path, std::string text, const Json& manifest) {
  std::string held = manifest.at("sha256").text(), tail = held + kEnd;
  if (held.size() == kDigits && text.size() > tail.size() && text.substr(text.size() - tail.size()) == tail) {
    text.replace(text.size() - tail.size(), kDigits, kDigits, '0');
    if (sha256_of(text) == held) return;
  }
  throw Error(T3C_BAD_ARTIFACT, path + " is damaged: its SHA-256 is not the one it holds; lower the model again");
}

bool leaves_its_folder(const std::string& name) {
  return name.empty() || name[0] == '/' || ("/" + name + "/").find("/../") != name.npos;
}

}  // namespace

void check_file(const std::string& folder, const Manifest& manifest, const std::string& name) {
  std::string path = folder + "/" + name;
  const File& entry = manifest.files.at(name);
  int64_t bytes;
  if (!is_file(path, &bytes)) throw Error(T3C_BAD_ARTIFACT, folder + " is incomplete: " + name + " is missing");
  if (bytes != entry.bytes) {
    throw Error(T3C_BAD_ARTIFACT, path + " is truncated or changed: " + std::to_string(bytes) + " bytes, " +
                                      std::to_string(entry.bytes) + " expected");
  }
  if (sha256_of_file(path) != entry.sha256) {
    throw Error(T3C_BAD_ARTIFACT, path + " is damaged: its SHA-256 is not the manifest's; lower the model again");
  }
}

namespace {

Input read_input(const Json& entry) {
  Input input{entry.at("name").text(), entry.at("dtype").text(), {}};
  for (const Json& size : entry.at("shape").list()) {
    input.shape.push_back(size.is_integer() ? Size{size.integer(), ""} : Size{-1, size.text()});
  }
  return input;
}

void check_length(const Json& target, const std::string& name, const char* what, size_t length, size_t profiles) {
  if (length != profiles) target.fail("target '" + name + "' has " + std::to_string(length) + " " + what);
}

Target read_target(const std::string& name, const Json& entry, const std::vector<Json>& profiles) {
  Target target{name, entry.at("machine").text(), entry.at("library").text(), entry.at("features").texts(), {}, {}};
  std::vector<std::string> functions = entry.at("functions").texts();
  std::vector<Json> costs = entry.at("costs").list();
  check_length(entry, name, "functions", functions.size(), profiles.size());
  check_length(entry, name, "costs", costs.size(), profiles.size());
  std::vector<Json> bounds;
  if (auto certificate = entry.find("conformal")) {
    bounds = certificate->at("profiles").list();
    check_length(entry, name, "certified profiles", bounds.size(), profiles.size());
  }
  for (size_t i = 0; i < profiles.size(); ++i) {
    double latency = costs[i].find("latency_p90_ms").value_or(costs[i].at("latency_ms")).number();
    double drift = bounds.empty() ? std::numeric_limits<double>::quiet_NaN() : bounds[i].at("drift").at("l2").number();
    double size_mb = static_cast<double>(profiles[i].at("size_bytes").integer()) / 1e6;
    target.profiles.push_back({profiles[i].at("name").text(), functions[i], costs[i].at("source").text(), size_mb,
                               latency, costs[i].at("energy_mj").number(), drift});
  }
  for (const auto& [function, tensors] : entry.at("packs").items()) target.packs.push_back({function, tensors.texts()});
  auto kind = entry.find("kind");
  target.on_gpu = kind && kind->text() == "cuda";
  return target;
}

}  // namespace

Manifest read_manifest(const std::string& folder) {
  std::string path = folder + "/manifest.json";
  if (!is_file(path)) throw Error(T3C_BAD_ARTIFACT, folder + " is not a t3c artifact: it has no manifest.json");
  std::ifstream file(path, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(file), {});
  Json json = Json::parse(path, text);
  check_schema(path, json);

  Manifest manifest;
  for (const Json& entry : json.at("inputs").list()) manifest.inputs.push_back(read_input(entry));
  std::vector<Json> profiles = json.at("profiles").list();
  for (const auto& [name, entry] : json.at("targets").items()) {
    manifest.targets.push_back(read_target(name, entry, profiles));
  }
  if (profiles.empty() || manifest.targets.empty()) json.fail("it has no profiles or no targets");

  Json files = json.at("files");
  for (const Target& target : manifest.targets) {
    for (const std::string& name : {target.library, std::string(kStore)}) {
      if (!files.find(name)) json.fail(name + " has no hash");
    }
  }
  for (const auto& [name, entry] : files.items()) {
    if (leaves_its_folder(name)) entry.fail("bad file entry '" + name + "'");
    manifest.files[name] = {entry.at("bytes").integer(), entry.at("sha256").text()};
  }
  check_own_hash(path, text, json);
  return manifest;
}

}  // namespace t3c
