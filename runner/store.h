// The weight store: a safetensors file, mapped rather than read (https://huggingface.co/docs/safetensors).
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "tensor.h"

namespace t3c {

class Store {
 public:
  // Maps the file; an Error when it is not well formed.
  explicit Store(const std::string& path);
  ~Store();
  Store(const Store&) = delete;

  // An Error where there is none of that name.
  const Tensor& at(const std::string& name) const;
  // Give back the memory that reading took; what is read again comes from the file again.
  void drop_pages() const;

 private:
  void read_header();

  std::string path_;
  char* mapped_;
  size_t bytes_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace t3c
