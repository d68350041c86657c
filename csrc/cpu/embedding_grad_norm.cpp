// Squared norms of a sample's gradient of an embedding table: Σ_v ‖Σ_(l: id_l = v) w_l·g_l‖² for each sample of ids
// [B, L] and g [B, L, D]. A sample's positions are sorted by their ids; then the rows of equal ids are added, a block
// of columns at a time, and squared. Sums of up to kChain rows are float32, sums of these and the norm float64.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlockColumns = 256;

struct Row {
  int64_t id, position;
  bool operator<(const Row& other) const { return id != other.id ? id < other.id : position < other.position; }
};

// rows ← those of a sample that count, sorted; how many they are.
int64_t sort_rows(const int64_t* ids, int64_t stride, int64_t length, const std::optional<int64_t>& padding,
                  Row* rows) {
  int64_t count = 0;
  for (int64_t position = 0; position < length; ++position) {
    const int64_t id = ids[position * stride];
    if (id != padding) rows[count++] = {id, position};
  }
  std::sort(rows, rows + count);
  return count;
}

// A block of columns of one sample's g, and its weights.
template <typename T>
struct Block {
  const T* g;
  int64_t stride, columns;
  const float* weights;  // or null
  int64_t weight_stride;

  // Σ over the rows' runs of equal ids of the squared norms of the runs' sums.
  double norm_sq(const Row* rows, const Row* end) const {
    double total = 0;
    while (rows < end) {
      const Row* const last = std::find_if(rows, end, [id = rows->id](const Row& row) { return row.id != id; });
      total += last - rows <= kChain ? short_run(rows, last) : long_run(rows, last);
      rows = last;
    }
    return total;
  }

 private:
  int64_t count(int64_t column) const { return std::min<int64_t>(kLanes, columns - column); }

  Vec weighted(const Row& row, int64_t column) const {
    const Vec value = load_lanes(g + row.position * stride + column, count(column));
    return weights ? value * weights[row.position * weight_stride] : value;
  }

  double short_run(const Row* rows, const Row* end) const {
    Vec squares{};
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec sum{};
      for (const Row* row = rows; row < end; ++row) sum += weighted(*row, j);
      squares += sum * sum;
    }
    return horizontal_sum(squares);
  }

  double long_run(const Row* rows, const Row* end) const {
    double sums[kBlockColumns] = {};
    for (; rows < end; rows += std::min<int64_t>(kChain, end - rows)) {
      const Row* const last = rows + std::min<int64_t>(kChain, end - rows);
      for (int64_t j = 0; j < columns; j += kLanes) {
        Vec sum{};
        for (const Row* row = rows; row < last; ++row) sum += weighted(*row, j);
        for (int64_t lane = 0; lane < count(j); ++lane) sums[j + lane] += sum[lane];
      }
    }
    double total = 0;
    for (int64_t j = 0; j < columns; ++j) total += sums[j] * sums[j];
    return total;
  }
};

Tensor embedding_grad_norm_sq_cpu(const Tensor& input, const Tensor& grad_output, const OptionalTensor& row_weight,
                                  std::optional<int64_t> padding_idx) {
  FASTMIX_CHECK(input.dim() == 2 && input.scalar_type() == ScalarType::Long, "input must be int64 [B, L]");
  const int64_t batch = input.size(0), length = input.size(1);
  FASTMIX_CHECK(grad_output.dim() == 3 && grad_output.size(0) == batch && grad_output.size(1) == length,
                "grad_output must be [B, L, D] = [", batch, ", ", length, ", D]");
  FASTMIX_CHECK(!row_weight || (row_weight->scalar_type() == ScalarType::Float && row_weight->dim() == 2 &&
                                row_weight->size(0) == batch && row_weight->size(1) == length),
                "row_weight must be float32 [B, L] = [", batch, ", ", length, "]");
  const int64_t d = grad_output.size(2);
  Tensor norm_sq = torch::stable::new_empty(grad_output, {batch}, ScalarType::Float);
  if (grad_output.numel() == 0) return torch::stable::zero_(norm_sq);
  const Tensor grad = d == 1 || grad_output.stride(2) == 1 ? grad_output : torch::stable::contiguous(grad_output);
  const int64_t blocks = (d + kBlockColumns - 1) / kBlockColumns;
  const auto rows = allocate<Row>(batch * length);
  const auto counts = allocate<int64_t>(batch);
  const auto partial = allocate<double>(batch * blocks);
  FASTMIX_CHECK(rows && counts && partial, "embedding_grad_norm_sq: no memory for ", batch * length, " rows");
  const auto* const ids = static_cast<const int64_t*>(input.data_ptr());
  constexpr int64_t kSortCost = 64;  // of a position, in elements read
  torch::stable::parallel_for(0, batch, 1 + kGrainElements / (length * kSortCost), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      counts[i] = sort_rows(ids + i * input.stride(0), input.stride(1), length, padding_idx, rows.get() + i * length);
    }
  });
  for_dtype("grad_output", grad, [&](auto zero) {
    using T = decltype(zero);
    const auto* const g = static_cast<const T*>(grad.data_ptr());
    const auto* const weights = row_weight ? static_cast<const float*>(row_weight->data_ptr()) : nullptr;
    const int64_t grain = 1 + kGrainElements / (length * std::min(d, kBlockColumns));
    torch::stable::parallel_for(0, batch * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / blocks, column = i % blocks * kBlockColumns;
        const Block<T> block{g + sample * grad.stride(0) + column, grad.stride(1), std::min(kBlockColumns, d - column),
                             weights ? weights + sample * row_weight->stride(0) : nullptr,
                             weights ? row_weight->stride(1) : 0};
        partial[i] = block.norm_sq(rows.get() + sample * length, rows.get() + sample * length + counts[sample]);
      }
    });
  });
  auto* const result = static_cast<float*>(norm_sq.data_ptr());
  for (int64_t i = 0; i < batch; ++i) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += partial[i * blocks + block];
    result[i] = static_cast<float>(total);
  }
  return norm_sq;
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("embedding_grad_norm_sq", TORCH_BOX(&fastmix::embedding_grad_norm_sq_cpu));
}
