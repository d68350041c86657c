// The trie's builder as Python sees it: NumPy arrays in, the bytes of an arena out.
#pragma once

#include <pybind11/pybind11.h>

namespace fastmix::trie {

void bind(pybind11::module_& module);

}  // namespace fastmix::trie
