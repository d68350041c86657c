// Errors as Python users see them, and the one way to allocate.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastmix {

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// body(T{}) for the C++ type of a float32, bfloat16 or float16 tensor.
template <typename Body>
inline void for_dtype(const char* name, const torch::stable::Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return body(float{});
    case torch::headeronly::ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case torch::headeronly::ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      fail(name, " must be float32, bfloat16 or float16");
  }
}

}  // namespace fastmix

// A failed check is a ValueError with exactly this text. Never inside parallel_for: the text is lost there.
#define FASTMIX_CHECK(condition, ...)             \
  do {                                            \
    if (!(condition)) fastmix::fail(__VA_ARGS__); \
  } while (false)
