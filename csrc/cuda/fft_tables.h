// Plans on the device: tables of common/fft_plan.h, uploaded once per (device, length) and kept until the process ends
// (freeing them at exit would race with the CUDA runtime's own shutdown). Also the shapes of blocks that transform
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "common/cuda_launch.h"
#include "common/fft_plan.h"
#include "cuda/fft_block.cuh"

namespace fastmix {

constexpr int kMaxLength = 8192;
constexpr int kMaxThreads = 512;
constexpr int kMaxColumns = 16;  // 32 real columns: 64 bytes of a bf16 row

// Points that one thread can take in every pass of the radices.
template <int kElements>
int points_per_thread(const std::vector<int>& radices) {
  int points = 2 * kElements;
  for (const int radix : radices) points = std::min(points, radix * butterflies_per_thread<kElements>(radix));
  return points;
}

struct DevicePlan {
  const FftView* view = nullptr;
  int m = 0;
  int narrow_points = 0, wide_points = 0;  // points_per_thread<16>, <32>
};

inline FftView* upload_plan(const FftPlan& plan, cudaStream_t stream) {
  std::vector<float> tables;
  for (const auto& table : plan.twiddles) tables.insert(tables.end(), table.begin(), table.end());
  const size_t chirp = tables.size();
  tables.insert(tables.end(), plan.chirp.begin(), plan.chirp.end());
  const size_t spectrum = tables.size();
  tables.insert(tables.end(), plan.spectrum.begin(), plan.spectrum.end());

  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone) {
    throw std::runtime_error("a Fourier op needs one call with the same sizes before it is captured in a CUDA graph");
  }
  constexpr size_t kHeader = 64;
  static_assert(sizeof(FftView) <= kHeader, "the tables follow the view");
  std::vector<unsigned char> bytes(kHeader + tables.size() * sizeof(float));
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, bytes.size()), "tables of a Fourier transform");
  const float2* base = reinterpret_cast<const float2*>(static_cast<unsigned char*>(memory) + kHeader);
  const bool bluestein = plan.m > plan.n;
  FftView view{static_cast<int>(plan.n),
               static_cast<int>(plan.m),
               0,
               base,
               bluestein ? base + chirp / 2 : nullptr,
               bluestein ? base + spectrum / 2 : nullptr};
  for (size_t i = 0; i < plan.radices.size(); ++i) view.radices |= static_cast<uint64_t>(plan.radices[i] - 1) << 4 * i;
  std::memcpy(bytes.data(), &view, sizeof(view));
  if (!tables.empty()) std::memcpy(bytes.data() + kHeader, tables.data(), tables.size() * sizeof(float));
  // Waiting makes the tables visible to every stream; it happens once a length.
  check_cuda(cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  return static_cast<FftView*>(memory);
}

// The plan of a length ≥ 1 on the current device.
inline DevicePlan device_plan(int64_t n, cudaStream_t stream) {
  static std::mutex mutex;
  static auto* plans = new std::map<std::pair<int, int64_t>, DevicePlan>();
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  DevicePlan& entry = (*plans)[{device, n}];
  if (entry.view == nullptr) {
    const FftPlan& plan = fft_plan(n);
    entry.m = static_cast<int>(plan.m);
    entry.narrow_points = points_per_thread<16>(plan.radices);
    entry.wide_points = points_per_thread<32>(plan.radices);
    entry.view = upload_plan(plan, stream);
  }
  return entry;
}

// What any plan of a length up to n may need.
inline DevicePlan worst_plan(int64_t n) {
  // 17 is the first length that needs Bluestein.
  int64_t m = n < 17 ? n : 2 * n - 1;
  while (m > 1 && fft_radices(m).empty()) ++m;
  const std::vector<int> all(kRadices.begin(), kRadices.end());
  return {nullptr, static_cast<int>(m), points_per_thread<16>(all), points_per_thread<32>(all)};
}

inline size_t fft_shared_bytes(int points) { return sizeof(float2) * (padded(points) + 1); }

// How blocks share `total` real columns: `columns` complex ones a block.
struct BlockShape {
  bool wide;  // 32 values a thread, one block a multiprocessor; else 16 and two
  int columns, blocks, threads;
  size_t shared_bytes;
};

enum class BlockKind { kEither, kNarrow, kWide };

inline BlockShape block_shape(const DevicePlan& plan, int64_t total, const SharedLimits& limits,
                              BlockKind kind = BlockKind::kEither) {
  // A power of two: aligned reads, and the stride that padded() spreads over all banks.
  const auto most = [&](int points_per_thread, size_t bytes) {
    int columns = kMaxColumns;
    while (columns > 0 &&
           (columns * plan.m > kMaxThreads * points_per_thread || fft_shared_bytes(columns * plan.m) > bytes)) {
      columns /= 2;
    }
    return columns;
  };
  const size_t half = std::min(limits.multiprocessor / 2 - 1024, limits.block);
  const int narrow = most(plan.narrow_points, half), wide = most(plan.wide_points, limits.block);
  // Fewer than 8 real columns waste most of a 32-byte sector: rather one large block.
  const bool thin = narrow < std::min<int64_t>(4, (total + 1) / 2) && wide > narrow;
  BlockShape shape{};
  shape.wide = kind == BlockKind::kWide || (kind == BlockKind::kEither && thin);
  shape.columns = static_cast<int>(std::min<int64_t>(shape.wide ? wide : narrow, (total + 1) / 2));
  if (shape.columns == 0) {
    throw std::runtime_error("a transform of " + std::to_string(plan.m) + " points needs more shared memory");
  }
  shape.blocks = static_cast<int>((total + 2 * shape.columns - 1) / (2 * shape.columns));
  const int points_per_thread = shape.wide ? plan.wide_points : plan.narrow_points;
  shape.threads = (shape.columns * plan.m + points_per_thread - 1) / points_per_thread;
  shape.threads = (shape.threads + 31) / 32 * 32;
  shape.shared_bytes = fft_shared_bytes(shape.columns * plan.m);
  return shape;
}

}  // namespace fastmix
