// fastmix._C: what is no tensor op. Build information, for `fastmix doctor`, and the trie's builder.
#include <pybind11/pybind11.h>

#include "trie/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled kernels, and the trie's builder";
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = FASTMIX_TORCH_VERSION;
  m.attr("cpu_levels") = FASTMIX_CPU_LEVELS;
  m.attr("cuda_archs") = FASTMIX_CUDA_ARCHS;
  fastmix::trie::bind(m);
}
