#pragma once

#include <stdexcept>
#include <string>

#include "t3c.h"

namespace t3c {

// What the C API returns as a status and t3c_error's text.
struct Error : std::runtime_error {
  Error(t3c_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  t3c_status status;
};

}  // namespace t3c
