// Ours, because neither TVM's runtime nor a C library has it, and a cryptography library is as large as the runner.
#include "sha256.h"

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "error.h"

namespace t3c {
namespace {

constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr size_t kBlock = 64;

uint32_t rotated(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

uint32_t big_endian(const uint8_t* bytes) {
  return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | bytes[3];
}

void add_block(std::array<uint32_t, 8>& state, const uint8_t* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) w[i] = big_endian(block + 4 * i);
  for (int i = 16; i < 64; ++i) {
    uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
    uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
    uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
    uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
    uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const uint32_t add[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += add[i];
}

using Stream = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

std::string digest(const std::string& path, const Stream& file) {
  if (!file) throw Error(T3C_BAD_ARTIFACT, path + " cannot be read");
  std::array<uint32_t, 8> state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  // Whole blocks but at the end, where the padding of up to two blocks follows the bytes.
  std::vector<uint8_t> buffer(size_t{1} << 20);
  uint64_t total = 0;
  size_t filled;
  do {
    filled = std::fread(buffer.data(), 1, buffer.size() - 2 * kBlock, file.get());
    total += filled;
    size_t end = filled;
    if (filled < buffer.size() - 2 * kBlock) {
      if (std::ferror(file.get())) throw Error(T3C_BAD_ARTIFACT, path + " cannot be read");
      end = (filled + 9 + kBlock - 1) / kBlock * kBlock;
      std::memset(&buffer[filled], 0, end - filled);
      buffer[filled] = 0x80;
      for (int i = 0; i < 8; ++i) buffer[end - 1 - i] = static_cast<uint8_t>(8 * total >> 8 * i);
    }
    for (size_t i = 0; i < end; i += kBlock) add_block(state, &buffer[i]);
  } while (filled == buffer.size() - 2 * kBlock);
  std::string text;
  for (uint32_t word : state) {
    char digits[9];
    std::snprintf(digits, sizeof digits, "%08x", word);
    text += digits;
  }
  return text;
}

}  // namespace

std::string sha256_of_file(const std::string& path) {
  return digest(path, Stream(std::fopen(path.c_str(), "rb"), &std::fclose));
}

std::string sha256_of(std::string bytes) {
  return digest("memory", Stream(fmemopen(bytes.data(), bytes.size(), "rb"), &std::fclose));
}

}  // namespace t3c
