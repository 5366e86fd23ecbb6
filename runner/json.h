// A JSON document, read with checks: what is not as expected is an Error that names the file and the place.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace tvm::ffi {
class Any;
}

namespace t3c {

class Json {
 public:
  // TVM's FFI library parses.
  static Json parse(const std::string& file, const std::string& text);

  Json at(const std::string& key) const;
  std::optional<Json> find(const std::string& key) const;
  std::vector<std::pair<std::string, Json>> items() const;
  std::vector<Json> list() const;
  bool is_integer() const;  // true and false are none
  int64_t integer() const;
  double number() const;
  std::string text() const;
  std::vector<std::string> texts() const;

  [[noreturn]] void fail(const std::string& what) const;

 private:
  Json(std::string file, std::string place, const tvm::ffi::Any& value);
  std::string below(const std::string& key) const;
  [[noreturn]] void wrong_type() const;

  std::string file_, place_;
  std::shared_ptr<const tvm::ffi::Any> value_;
};

}  // namespace t3c
