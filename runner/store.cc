#include "store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>

#include "error.h"
#include "json.h"

namespace t3c {
namespace {

// Bytes of a tensor; nothing where they are more than `most`.
std::optional<uint64_t> bytes_of(const std::vector<int64_t>& shape, const Dtype& dtype, uint64_t most) {
  uint64_t bytes = dtype.bytes;
  for (int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) return std::nullopt;
  }
  return bytes <= most ? std::optional(bytes) : std::nullopt;
}

}  // namespace

Store::Store(const std::string& path) : path_(path) {
  int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat found {};
  bool opened = file >= 0 && fstat(file, &found) == 0;
  bytes_ = static_cast<size_t>(found.st_size);
  void* mapped = opened ? mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  if (file >= 0) close(file);
  if (mapped == MAP_FAILED) throw Error(T3C_BAD_ARTIFACT, path + " cannot be mapped: " + std::strerror(errno));
  mapped_ = static_cast<char*>(mapped);
  try {
    read_header();
  } catch (...) {
    munmap(mapped_, bytes_);
    throw;
  }
}

Store::~Store() { munmap(mapped_, bytes_); }

// The length of the header (little-endian, as all machines that artifacts are for), the header, the tensors.
void Store::read_header() {
  uint64_t length = 0;
  if (bytes_ >= sizeof length) std::memcpy(&length, mapped_, sizeof length);
  if (bytes_ < sizeof length || length > bytes_ - sizeof length) {
    throw Error(T3C_BAD_ARTIFACT, path_ + " is damaged: it ends within its header");
  }
  const char* data = mapped_ + sizeof length + length;
  uint64_t room = bytes_ - sizeof length - length;
  for (const auto& [name, entry] : Json::parse(path_, std::string(mapped_ + sizeof length, length)).items()) {
    if (name == "__metadata__") continue;
    Tensor tensor{find_dtype(entry.at("dtype").text(), &Dtype::safetensors), {}, nullptr};
    if (!tensor.dtype) entry.fail("tensor " + name + " is of an unknown type");
    for (const Json& size : entry.at("shape").list()) tensor.shape.push_back(size.integer());
    std::vector<Json> offsets = entry.at("data_offsets").list();
    std::optional<uint64_t> bytes = bytes_of(tensor.shape, *tensor.dtype, room);
    if (offsets.size() != 2 || !bytes) entry.fail("tensor " + name + " is not in the file");
    int64_t begin = offsets[0].integer();
    if (begin < 0 || static_cast<uint64_t>(begin) > room - *bytes ||
        offsets[1].integer() != begin + static_cast<int64_t>(*bytes)) {
      entry.fail("tensor " + name + " is not in the file");
    }
    tensor.data = data + begin;
    tensors_.emplace(name, std::move(tensor));
  }
}

const Tensor& Store::at(const std::string& name) const {
  auto found = tensors_.find(name);
  if (found == tensors_.end()) throw Error(T3C_BAD_ARTIFACT, path_ + " lacks tensors: " + name);
  return found->second;
}

void Store::drop_pages() const { madvise(mapped_, bytes_, MADV_DONTNEED); }

}  // namespace t3c
