#include "npy.h"

#include <charconv>
#include <fstream>
#include <iterator>
#include <string_view>

#include "error.h"
#include "tensor.h"

namespace t3c {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicBytes = 6;

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw Error(T3C_BAD_INPUT, path + ": " + what);
}

bool is_npy(const std::string& path) { return path.size() >= 4 && path.compare(path.size() - 4, 4, ".npy") == 0; }

size_t bytes_of(const std::string& path, const std::vector<int64_t>& shape, size_t bytes) {
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) fail(path, "it is too large");
  }
  return bytes;
}

// Takes `expected` off the front of `text`.
bool take(std::string_view& text, std::string_view expected) {
  bool same = text.substr(0, expected.size()) == expected;
  if (same) text.remove_prefix(expected.size());
  return same;
}

// Takes a number off the front of `text`.
bool take(std::string_view& text, int64_t& number) {
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc()) return false;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  return true;
}

// The header is a Python dictionary; numpy writes it in this one form. False where it is another.
bool parse_header(std::string_view header, std::string& type, bool& fortran, std::vector<int64_t>& shape) {
  if (!take(header, "{'descr': '")) return false;
  type = header.substr(0, header.find('\''));
  if (!take(header, type) || !take(header, "', 'fortran_order': ")) return false;
  fortran = take(header, "True");
  if ((!fortran && !take(header, "False")) || !take(header, ", 'shape': (")) return false;
  for (int64_t size; take(header, size);) {
    shape.push_back(size);
    if (!take(header, ",")) break;
    take(header, " ");
  }
  return take(header, "), }") && header.find_first_not_of(" \n") == header.npos;
}

Array parse_npy(const std::string& path, const std::string& text) {
  size_t start = kMagicBytes + 2;
  if (text.size() < start + 4 || text.compare(0, kMagicBytes, kMagic) != 0) fail(path, "it is not a .npy file");
  size_t width = text[kMagicBytes] == 1 ? 2 : 4, length = 0;
  for (size_t i = 0; i < width; ++i) length |= size_t{static_cast<uint8_t>(text[start + i])} << 8 * i;
  start += width;
  std::string_view header = std::string_view(text).substr(start, length);
  std::string type;
  bool fortran;
  Array array;
  if (header.size() != length || !parse_header(header, type, fortran, array.shape)) {
    fail(path, "its .npy header is damaged");
  }
  if (fortran) fail(path, "it is in Fortran order: save numpy.ascontiguousarray of it");
  const Dtype* dtype = find_dtype(type, &Dtype::npy);
  if (!dtype) fail(path, "this runner knows no values of type " + type);
  array.dtype = dtype->name;
  array.bytes = text.substr(start + length);
  size_t expected = bytes_of(path, array.shape, dtype->bytes);
  if (array.bytes.size() != expected) {
    fail(path, "it holds " + std::to_string(array.bytes.size()) + " bytes of values, its header says " +
                   std::to_string(expected));
  }
  return array;
}

Array raw(const std::string& path, const t3c_input& wanted, std::string bytes) {
  const Dtype* dtype = find_dtype(wanted.dtype);
  if (!dtype) fail(path, std::string("this runner knows no values of type ") + wanted.dtype);
  Array array{wanted.dtype, {wanted.shape, wanted.shape + wanted.rank}, std::move(bytes)};
  int64_t* free = nullptr;
  for (int64_t& size : array.shape) {
    if (size != -1) continue;
    if (free) fail(path, std::string("raw values leave several sizes of ") + wanted.name + " open: give a .npy file");
    free = &size;
  }
  if (free) *free = 1;
  size_t one = bytes_of(path, array.shape, dtype->bytes);
  if (free && one) *free = static_cast<int64_t>(array.bytes.size() / one);
  if (bytes_of(path, array.shape, dtype->bytes) != array.bytes.size()) {
    fail(path, "it has " + std::to_string(array.bytes.size()) + " bytes, input " + wanted.name + " takes " +
                   (free ? "a multiple of " : "") + std::to_string(one));
  }
  return array;
}

}  // namespace

Array read_array(const std::string& path, const t3c_input& wanted) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, "it cannot be read");
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  return is_npy(path) ? parse_npy(path, bytes) : raw(path, wanted, std::move(bytes));
}

void write_array(const std::string& path, const t3c_tensor& tensor) {
  const Dtype& dtype = *find_dtype(tensor.dtype);
  std::ofstream file(path, std::ios::binary);
  size_t bytes = dtype.bytes;
  std::string shape;
  for (size_t i = 0; i < tensor.rank; ++i) {
    bytes *= static_cast<size_t>(tensor.shape[i]);
    shape += std::to_string(tensor.shape[i]) + (tensor.rank == 1 ? "," : i + 1 < tensor.rank ? ", " : "");
  }
  if (is_npy(path)) {
    std::string header = std::string("{'descr': '") + dtype.npy + "', 'fortran_order': False, 'shape': (";
    header += shape + "), }";
    // Values begin at a multiple of 64 bytes: magic, version and length take 10, the end of the line one.
    header.append(63 - (10 + header.size()) % 64, ' ');
    header += '\n';
    file.write(kMagic, kMagicBytes).put(1).put(0);
    file.put(static_cast<char>(header.size() & 0xff)).put(static_cast<char>(header.size() >> 8));
    file << header;
  }
  file.write(static_cast<const char*>(tensor.data), static_cast<std::streamsize>(bytes));
  file.close();
  if (!file) fail(path, "it cannot be written");
}

}  // namespace t3c
