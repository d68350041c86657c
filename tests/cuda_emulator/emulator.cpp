// The entry points of the FFT kernels that tests/test_cuda_emulated.py calls.
#include "cuda/fourier_mixing_launch.h"
#include "cuda/global_filter_launch.h"
#include "fibers.h"

using namespace fastmix;

extern "C" {

void set_order(int value) { fastmix::set_order(value); }

int64_t fourier_workspace(int64_t s, int64_t h, int with_lengths) { return fourier_sample_floats(s, h, with_lengths); }

int fourier_mixing(int dtype, const void* x, const int64_t* lengths, float exponent, int64_t b, int64_t s, int64_t h,
                   float* work, int64_t work_floats, void* y, int shared_block, int shared_multiprocessor) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const FourierLaunch op{b,      s, h, lengths, exponent, work, work_floats, {shared_block, shared_multiprocessor},
                           nullptr};
    launch_fourier_mixing<T>(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

int64_t filter_workspace_floats(int64_t h, int64_t w, int64_t c, int64_t images) {
  return filter_workspace(h, w, c, images);
}

int64_t filter_bwd_workspace_floats(int64_t b, int64_t h, int64_t w, int64_t c, int64_t images) {
  return filter_bwd_workspace(b, h, w, c, images);
}

int global_filter(int dtype, const void* x, const float* weight, int conjugate, int64_t b, int64_t h, int64_t w,
                  int64_t c, float* work, int64_t work_floats, void* y, int shared_block, int shared_multiprocessor) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const FilterLaunch op{b,
                          h,
                          w,
                          c,
                          reinterpret_cast<const float2*>(weight),
                          conjugate != 0,
                          work,
                          work_floats,
                          {shared_block, shared_multiprocessor},
                          nullptr};
    launch_global_filter<T>(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

int global_filter_bwd(int dtype, const void* dy, const void* x, const float* weight, int64_t b, int64_t h, int64_t w,
                      int64_t c, float* work, int64_t work_floats, void* dx, float* dw, int shared_block,
                      int shared_multiprocessor) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const FilterLaunch op{b,
                          h,
                          w,
                          c,
                          reinterpret_cast<const float2*>(weight),
                          true,
                          work,
                          work_floats,
                          {shared_block, shared_multiprocessor},
                          nullptr};
    launch_global_filter_bwd<T>(op, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx),
                                reinterpret_cast<float2*>(dw));
  });
}

}  // extern "C"
