// The CPU op of external attention: checks, allocation, how heads are shared among threads, registration.
#include "cpu/external_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/jobs.h"

namespace fastmix {
namespace {

using torch::stable::Tensor;

constexpr int64_t kParts = 32;  // partial sums for the gradients of the memory, at most

// How the heads of all samples are cut: groups of heads, and pieces (several chunks) within a head. By the shape alone,
// since a group's piece has sums of its own.
struct Cut {
  int64_t groups, pieces;
};

// Runs first(pair, piece, buffer, worker) for all pieces of a head, between(pair, buffer, worker), then `second` as
// `first`; a buffer of `floats` belongs to a head meanwhile. Whole groups in parallel, or pieces where groups are few.
template <typename T, typename First, typename Between, typename Second>
void run(const ExternalAttention& shape, const Cut& cut, int64_t floats, double flops, const First& first,
         const Between& between, const Second& second) {
  const int64_t pairs = shape.pairs(), threads = torch::stable::get_num_threads();
  const auto grain = [](double work) { return static_cast<int64_t>(kGrainFlops / work) + 1; };
  std::atomic<bool> no_memory{false};
  const auto worker = [&]() {
    float* scratch = thread_scratch<float>(shape.scratch_size());
    if (!scratch) no_memory = true;
    return scratch;
  };
  if (cut.pieces == 1 || cut.groups % threads == 0 || cut.groups >= 4 * threads) {
    const double work = flops * static_cast<double>(pairs) / static_cast<double>(cut.groups);
    torch::stable::parallel_for(0, cut.groups, grain(work), [&](int64_t begin, int64_t end) {
      float* scratch = worker();
      const auto memory = allocate<float>(floats);
      if (!scratch || !memory) {
        no_memory = true;
        return;
      }
      const HeadWorker<T> worker{shape, scratch};
      for (int64_t pair = begin * pairs / cut.groups; pair < end * pairs / cut.groups; ++pair) {
        for (int64_t piece = 0; piece < cut.pieces; ++piece) first(pair, piece, memory.get(), worker);
        between(pair, memory.get(), worker);
        for (int64_t piece = 0; piece < cut.pieces; ++piece) second(pair, piece, memory.get(), worker);
      }
    });
  } else {
    const int64_t together = std::min(pairs, (threads + cut.pieces - 1) / cut.pieces);
    const auto memory = allocate<float>(together * floats);
    FASTMIX_CHECK(memory, "external_attention: no memory for ", together * floats, " float32");
    for (int64_t start = 0; start < pairs; start += together) {
      const int64_t count = std::min(together, pairs - start);
      const auto all_pieces = [&](const auto& body) {
        const double work = flops / static_cast<double>(2 * cut.pieces);
        torch::stable::parallel_for(0, count * cut.pieces, grain(work), [&](int64_t begin, int64_t end) {
          float* scratch = worker();
          for (int64_t i = begin; i < end && scratch; ++i) {
            const int64_t pair = i / cut.pieces;
            body(start + pair, i % cut.pieces, memory.get() + pair * floats, HeadWorker<T>{shape, scratch});
          }
        });
      };
      all_pieces(first);
      if (float* scratch = worker()) {
        for (int64_t pair = 0; pair < count; ++pair) {
          between(start + pair, memory.get() + pair * floats, HeadWorker<T>{shape, scratch});
        }
      }
      all_pieces(second);
    }
  }
  FASTMIX_CHECK(!no_memory, "external_attention: no memory for a head of ", shape.s, " tokens");
}

// Channels contiguous, as the kernels read them.
Tensor with_channels(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
Head<T> head(const Tensor& tensor, const ExternalAttention& shape, int64_t pair) {
  auto* data = static_cast<T*>(tensor.data_ptr());
  return {data + pair / shape.heads * tensor.stride(0) + pair % shape.heads * shape.d, tensor.stride(1)};
}

// groups ← mk or mv [M, d] as the right operand of a product with tokens.
template <typename T>
void pack_by_token(const Tensor& memory, const ExternalAttention& shape, float* groups) {
  pack_columns(static_cast<const T*>(memory.data_ptr()), shape.d, shape.d, shape.m, groups);
}

// The same of a product with rows along the memory.
template <typename T>
void pack_by_slot(const Tensor& memory, const ExternalAttention& shape, float* groups) {
  pack_groups(static_cast<const T*>(memory.data_ptr()), shape.d, shape.m, shape.d, groups);
}

ExternalAttention check(const Tensor& x, const Tensor& mk, const Tensor& mv, int64_t heads) {
  FASTMIX_CHECK(x.dim() == 3 && heads >= 1 && x.size(2) >= heads && x.size(2) % heads == 0,
                "x must be [B, S, C] with C a multiple of num_heads = ", heads);
  const int64_t size = x.size(2) / heads;
  for (const Tensor* memory : {&mk, &mv}) {
    FASTMIX_CHECK(memory->dim() == 2 && memory->size(0) >= 1 && memory->size(0) == mk.size(0) &&
                      memory->size(1) == size && memory->scalar_type() == x.scalar_type(),
                  "mk and mv must be [M, C/num_heads] = [M, ", size, "] of x's dtype");
  }
  return {x.size(0), heads, x.size(1), size, mk.size(0)};
}

std::tuple<Tensor, Tensor> external_attention_cpu(const Tensor& x, const Tensor& mk, const Tensor& mv, int64_t heads,
                                                  bool save) {
  using torch::headeronly::ScalarType;
  const ExternalAttention shape = check(x, mk, mv, heads);
  const Tensor input = with_channels(x), keys = torch::stable::contiguous(mk), values = torch::stable::contiguous(mv);
  Tensor output = torch::stable::new_empty(x, {shape.batch, shape.s, x.size(2)});
  Tensor saved = save ? torch::stable::new_empty(x, {shape.batch, heads, shape.s, shape.width()}, ScalarType::Float)
                      : torch::stable::new_empty(x, {0}, ScalarType::Float);
  if (output.numel() == 0) return {output, saved};
  const int64_t chunks = shape.chunks(), width = shape.width(), head_size = shape.s * width;
  auto* kept = save ? static_cast<float*>(saved.data_ptr()) : nullptr;
  const Workspace workspace(groups_size(shape.m, shape.d) + groups_size(shape.d, shape.m));
  FASTMIX_CHECK(workspace.data(), "external_attention: no memory for ", shape.m, " slots");
  float* const packed_keys = workspace.data();
  float* const packed_values = packed_keys + groups_size(shape.m, shape.d);
  for_dtype("x", x, [&](auto zero) {
    using T = decltype(zero);
    pack_by_token<T>(keys, shape, packed_keys);
    pack_by_slot<T>(values, shape, packed_values);
    // A head's buffer: maxima and sums of each chunk, and the softmax if it is not kept.
    const int64_t floats = 2 * chunks * width + (save ? 0 : head_size);
    const auto softmax = [&](int64_t pair, float* buffer, int64_t chunk) {
      return (save ? kept + pair * head_size : buffer + 2 * chunks * width) + shape.first_row(chunk) * width;
    };
    run<T>(
        shape, {shape.pairs(), chunks}, floats, 4.0 * shape.s * shape.m * shape.d,
        [&](int64_t pair, int64_t chunk, float* buffer, const HeadWorker<T>& worker) {
          worker.exponentials(head<const T>(input, shape, pair), chunk, packed_keys, softmax(pair, buffer, chunk),
                              buffer + chunk * width, buffer + (chunks + chunk) * width);
        },
        [&](int64_t, float* buffer, const HeadWorker<T>& worker) { worker.factors(buffer, buffer + chunks * width); },
        [&](int64_t pair, int64_t chunk, float* buffer, const HeadWorker<T>& worker) {
          worker.output(head<T>(output, shape, pair), chunk, packed_values, buffer + chunk * width,
                        softmax(pair, buffer, chunk));
        });
  });
  return {output, saved};
}

Cut cut_backward(const ExternalAttention& shape) {
  // Partial sums together are not much larger than a quarter of x, but for a large memory.
  const int64_t most = std::clamp<int64_t>(shape.pairs() * shape.s / (4 * shape.m), 4, kParts);
  int64_t parts = 4;
  while (2 * parts <= most) parts *= 2;
  const int64_t groups = std::min(shape.pairs(), parts);
  return {groups, std::min(shape.chunks(), parts / groups)};
}

// target [M, d] ← Σ over the parts, in their order.
template <typename T>
void sum_parts(const float* parts, int64_t count, int64_t stride, const ExternalAttention& shape, T* target) {
  torch::stable::parallel_for(0, shape.m, 1 + 65536 / (count * shape.d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < shape.d; j += kLanes) {
        const float* at = parts + i * shape.size() + j;
        Vec sum = load(at);
        for (int64_t part = 1; part < count; ++part) sum += load(at + part * stride);
        store_lanes(target + i * shape.d + j, sum, std::min<int64_t>(kLanes, shape.d - j));
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> external_attention_bwd_cpu(const Tensor& grad_output, const Tensor& x,
                                                              const Tensor& mk, const Tensor& mv, const Tensor& saved,
                                                              int64_t heads) {
  using torch::headeronly::ScalarType;
  const ExternalAttention shape = check(x, mk, mv, heads);
  FASTMIX_CHECK(grad_output.scalar_type() == x.scalar_type() && grad_output.dim() == 3 &&
                    std::equal(x.sizes().begin(), x.sizes().end(), grad_output.sizes().begin()),
                "grad_output must have x's shape and dtype");
  FASTMIX_CHECK(saved.scalar_type() == ScalarType::Float && saved.is_contiguous() && saved.dim() == 4 &&
                    saved.size(0) == shape.batch && saved.size(1) == heads && saved.size(2) == shape.s &&
                    saved.size(3) == shape.width(),
                "saved must be what the forward kept");
  const Tensor input = with_channels(x), grad = with_channels(grad_output);
  const Tensor keys = torch::stable::contiguous(mk), values = torch::stable::contiguous(mv);
  Tensor dx = torch::stable::new_empty(x, {shape.batch, shape.s, x.size(2)});
  Tensor dmk = torch::stable::empty_like(keys), dmv = torch::stable::empty_like(values);
  if (dx.numel() == 0) return {dx, torch::stable::zero_(dmk), torch::stable::zero_(dmv)};

  const Cut cut = cut_backward(shape);
  const int64_t chunks = shape.chunks(), width = shape.width(), head_size = shape.s * width;
  const int64_t parts = cut.groups * cut.pieces, part_size = shape.m * shape.size();
  const Workspace workspace(2 * parts * part_size + groups_size(shape.m, shape.d) + groups_size(shape.d, shape.m));
  FASTMIX_CHECK(workspace.data(), "external_attention: no memory for ", 2 * parts, " x ", part_size, " float32");
  float* const sums = workspace.data();
  float* const packed_values = sums + 2 * parts * part_size;
  float* const packed_keys = packed_values + groups_size(shape.m, shape.d);
  const auto* softmax = static_cast<const float*>(saved.data_ptr());
  for_dtype("x", x, [&](auto zero) {
    using T = decltype(zero);
    pack_by_slot<T>(keys, shape, packed_keys);
    pack_by_token<T>(values, shape, packed_values);
    // body(chunk, sums, whether these have been begun) for the chunks of a piece
    const auto for_chunks = [&](int64_t pair, int64_t piece, const auto& body) {
      // The group g with g·pairs/groups <= pair < (g + 1)·pairs/groups.
      const int64_t group = ((pair + 1) * cut.groups - 1) / shape.pairs();
      const int64_t first = piece * chunks / cut.pieces, last = (piece + 1) * chunks / cut.pieces;
      const bool begun = pair > group * shape.pairs() / cut.groups;
      float* const part = sums + 2 * (group * cut.pieces + piece) * part_size;
      for (int64_t chunk = first; chunk < last; ++chunk) body(chunk, part, begun || chunk > first);
    };
    // A head's buffer: Σ dP·P of each chunk and of all, and dP.
    const int64_t dots = (chunks + 1) * width;
    run<T>(
        shape, cut, dots + head_size, 10.0 * shape.s * shape.m * shape.d,
        [&](int64_t pair, int64_t piece, float* buffer, const HeadWorker<T>& worker) {
          for_chunks(pair, piece, [&](int64_t chunk, float* part, bool begun) {
            const int64_t first = shape.first_row(chunk) * width;
            worker.gradient_of_softmax(head<const T>(grad, shape, pair), chunk, packed_values,
                                       softmax + pair * head_size + first, buffer + dots + first,
                                       buffer + chunk * width, part + part_size, begun);
          });
        },
        [&](int64_t, float* buffer, const HeadWorker<T>&) {
          for (int64_t j = 0; j < width; j += kLanes) {
            Vec sum{};
            for (int64_t c = 0; c < chunks; ++c) sum += load(buffer + c * width + j);
            store(buffer + chunks * width + j, sum);
          }
        },
        [&](int64_t pair, int64_t piece, float* buffer, const HeadWorker<T>& worker) {
          for_chunks(pair, piece, [&](int64_t chunk, float* part, bool begun) {
            const int64_t first = shape.first_row(chunk) * width;
            worker.gradient_of_tokens(head<const T>(input, shape, pair), head<T>(dx, shape, pair), chunk, packed_keys,
                                      softmax + pair * head_size + first, buffer + chunks * width,
                                      buffer + dots + first, part, begun);
          });
        });
    sum_parts(sums, parts, 2 * part_size, shape, static_cast<T*>(dmk.data_ptr()));
    sum_parts(sums + part_size, parts, 2 * part_size, shape, static_cast<T*>(dmv.data_ptr()));
  });
  return {dx, dmk, dmv};
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("external_attention", TORCH_BOX(&fastmix::external_attention_cpu));
  m.impl("external_attention_bwd", TORCH_BOX(&fastmix::external_attention_bwd_cpu));
}
