#pragma once
#include <stdexcept>

// A failed assertion ends the process here, as it ends the CUDA context there.
#define CUDA_KERNEL_ASSERT(condition) \
  if (!(condition)) std::abort()
