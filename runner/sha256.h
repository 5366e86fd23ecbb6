#pragma once

#include <string>

namespace t3c {

// Hexadecimal SHA-256 (FIPS 180-4) of a file; an Error where it cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace t3c
