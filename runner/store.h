// The weight store: a safetensors file, mapped rather than read (https://huggingface.co/docs/safetensors).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "dtype.h"

namespace t3c {

struct StoredTensor {
  const Dtype* dtype;
  std::vector<int64_t> shape;
  const void* data;
};

class Store {
 public:
  // Maps the file; an Error when it is not well formed.
  explicit Store(const std::string& path);
  ~Store();
  Store(const Store&) = delete;

  const StoredTensor* find(const std::string& name) const;
  // Give back the memory that reading took; what is read again comes from the file again.
  void drop_pages() const;

 private:
  void read_header(const std::string& path);

  char* mapped_;
  size_t bytes_;
  std::map<std::string, StoredTensor> tensors_;
};

}  // namespace t3c
