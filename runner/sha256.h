#pragma once

#include <string>

namespace t3c {

// Hexadecimal SHA-256 (FIPS 180-4) of a file; an Error where it cannot be read.
std::string sha256_of_file(const std::string& path);

// The same of bytes in memory.
std::string sha256_of(std::string bytes);

}  // namespace t3c
