#include "json.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include "error.h"

namespace t3c {
namespace {

namespace ffi = tvm::ffi;
using Object = ffi::Map<ffi::Any, ffi::Any>;

// TVM's parser calls itself for every level: a file of brackets alone would end the process.
constexpr int kDeepest = 64;

bool is_too_deep(const std::string& text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size() && depth <= kDeepest; ++i) {
    char c = text[i];
    if (c == '"') quoted = !quoted;
    if (quoted && c == '\\') ++i;
    if (!quoted) depth += (c == '{' || c == '[') - (c == '}' || c == ']');
  }
  return depth > kDeepest;
}

}  // namespace

Json::Json(std::string file, std::string place, const ffi::Any& value)
    : file_(std::move(file)), place_(std::move(place)), value_(std::make_shared<const ffi::Any>(value)) {}

Json Json::parse(const std::string& file, const std::string& text) {
  if (is_too_deep(text)) throw Error(T3C_BAD_ARTIFACT, file + " is damaged: it is nested too deeply");
  try {
    static const ffi::Function parse = ffi::Function::GetGlobalRequired("ffi.json.Parse");
    return Json(file, "", parse(ffi::String(text)));
  } catch (const ffi::Error& error) {
    throw Error(T3C_BAD_ARTIFACT, file + " is damaged: " + error.message() + "; lower the model again");
  }
}

void Json::fail(const std::string& what) const { throw Error(T3C_BAD_ARTIFACT, file_ + " is damaged: " + what); }

void Json::wrong_type() const { fail(place_ + " is missing or of the wrong type"); }

std::string Json::below(const std::string& key) const { return place_.empty() ? key : place_ + "/" + key; }

std::optional<Json> Json::find(const std::string& key) const {
  auto object = value_->as<Object>();
  if (!object) wrong_type();
  auto found = object->find(ffi::String(key));
  if (found == object->end()) return std::nullopt;
  return Json(file_, below(key), (*found).second);
}

Json Json::at(const std::string& key) const {
  std::optional<Json> found = find(key);
  return found ? *found : Json(file_, below(key), nullptr);  // reading it says that it is missing
}

std::vector<std::pair<std::string, Json>> Json::items() const {
  auto object = value_->as<Object>();
  if (!object) wrong_type();
  std::vector<std::pair<std::string, Json>> found;
  for (const auto& [key, value] : *object) {
    std::string name = key.cast<std::string>();
    found.emplace_back(name, Json(file_, below(name), value));
  }
  return found;
}

std::vector<Json> Json::list() const {
  auto array = value_->as<ffi::Array<ffi::Any>>();
  if (!array) wrong_type();
  std::vector<Json> found;
  for (const ffi::Any& value : *array) found.push_back(Json(file_, below(std::to_string(found.size())), value));
  return found;
}

bool Json::is_integer() const { return value_->type_index() == ffi::TypeIndex::kTVMFFIInt; }

int64_t Json::integer() const {
  if (!is_integer()) wrong_type();
  return value_->cast<int64_t>();
}

double Json::number() const {
  if (!is_integer() && value_->type_index() != ffi::TypeIndex::kTVMFFIFloat) wrong_type();
  return value_->cast<double>();
}

std::string Json::text() const {
  auto text = value_->as<ffi::String>();
  if (!text) wrong_type();
  return *text;
}

std::vector<std::string> Json::texts() const {
  std::vector<std::string> found;
  for (const Json& value : list()) found.push_back(value.text());
  return found;
}

}  // namespace t3c
