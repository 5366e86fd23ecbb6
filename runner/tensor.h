// Tensors, and the element types an artifact may hold under the names of all formats that meet here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace t3c {

struct Dtype {
  const char* name;         // numpy's, which manifests have
  const char* safetensors;  // in the header of the store
  const char* npy;          // in the header of a .npy file, little-endian
  uint8_t code;             // DLPack's DLDataTypeCode
  size_t bytes;
};

inline constexpr Dtype kDtypes[] = {
    {"float32", "F32", "<f4", 2, 4}, {"float64", "F64", "<f8", 2, 8}, {"float16", "F16", "<f2", 2, 2},
    {"int8", "I8", "|i1", 0, 1},     {"uint8", "U8", "|u1", 1, 1},    {"int32", "I32", "<i4", 0, 4},
    {"int64", "I64", "<i8", 0, 8},   {"bool", "BOOL", "|b1", 6, 1},
};

// The type that has `name` in the given format, or nullptr.
inline const Dtype* find_dtype(std::string_view name, const char* Dtype::* format = &Dtype::name) {
  for (const Dtype& dtype : kDtypes) {
    if (name == dtype.*format) return &dtype;
  }
  return nullptr;
}

inline const Dtype* find_dtype(uint8_t code, size_t bits) {
  for (const Dtype& dtype : kDtypes) {
    if (code == dtype.code && bits == 8 * dtype.bytes) return &dtype;
  }
  return nullptr;
}

// Row-major values that belong to another.
struct Tensor {
  const Dtype* dtype;
  std::vector<int64_t> shape;
  const void* data;
};

}  // namespace t3c
