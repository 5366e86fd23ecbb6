// Arrays in files: .npy (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html), or raw bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "t3c.h"

namespace t3c {

struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

// Reads a .npy file, or, where the name ends otherwise, the raw values of `wanted`, whose one free size follows from
// their number. An Error says what was wrong.
Array read_array(const std::string& path, const t3c_input& wanted);

// Writes a .npy file, or, where the name ends otherwise, the raw values.
void write_array(const std::string& path, const t3c_tensor& tensor);

}  // namespace t3c
