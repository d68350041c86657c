// fastmix._C: what is no tensor op. Build information, for `fastmix doctor`.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled kernels";
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = FASTMIX_TORCH_VERSION;
  m.attr("cpu_levels") = FASTMIX_CPU_LEVELS;
  m.attr("cuda_archs") = FASTMIX_CUDA_ARCHS;
}
