// The gradient of a convolution's weight, every sample's squared norm of it, and the samples' own gradients: checks,
// threads, registration.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "cpu/conv_channels.h"
#include "cpu/conv_positions.h"
#include "cpu/jobs.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kParts = 16;       // of the samples, at most
constexpr int64_t kUnits = 8;        // of work to share among threads, if parts of the samples are few
constexpr int64_t kPieceBlocks = 8;  // of rows, at least, of a piece: each copies x for itself

// How the work is cut, by the shape alone, as a part of the samples has sums of its own: parts of the samples, pieces
// of the rows of dW.
struct Cut {
  int64_t parts, pieces;
};

Cut cut_work(const Conv& conv, int64_t elements) {
  // The parts' sums together take little memory beside x and g.
  const int64_t most = std::min(std::min(conv.batch, kParts), elements / (16 * conv.weights()));
  const int64_t parts = std::max<int64_t>(1, most);
  const int64_t pieces = std::min((kUnits + parts - 1) / parts, (conv.blocks() + kPieceBlocks - 1) / kPieceBlocks);
  return {parts, pieces};
}

template <typename T>
Volume<T> volume(const Tensor& tensor) {
  const auto* const data = static_cast<const T*>(tensor.data_ptr());
  Volume<T> result{data, data + 1, {}};
  for (int64_t i = 0; i < 5; ++i) {
    result.strides[i] = tensor.stride(i);
    result.end += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return result;
}

// One thread's part of the work: sample after sample, the rows of dW of some blocks.
template <typename Form, typename T>
struct ConvWorker {
  const Form& form;
  const Volume<T>&x, &g;
  int64_t first_block, last_block;
  float *scratch, *sums, *sample_grads;  // the last: dW of every sample, if they are wanted

  // totals (+)= weight·dW of the sample; ‖dW‖² of these rows.
  double add_sample(int64_t sample, float weight, float* totals, bool add) const {
    const Conv& conv = form.conv();
    double norm_sq = 0;
    for (int64_t first = first_block; first < last_block;) {
      const int64_t last = std::min(last_block, (first / conv.group_blocks() + 1) * conv.group_blocks());
      const int64_t boxes = conv.boxes(), at_once = form.blocks_at_once(last - first);
      for (int64_t box = 0; box < boxes; ++box) {
        const ConvTask task{sample, box, first, last};
        const ConvRows rows = form.copy(task, x, g, scratch);
        for (int64_t block = first; block < last; block += at_once) {
          const int64_t end = std::min(last, block + at_once);
          form.add(task, rows, scratch, block, end, sums, box > 0);
          if (box == boxes - 1) {
            float* const total = totals + (block - first_block) * form.block_size();
            norm_sq += add_sums(weight, (end - block) * form.block_size(), total, add);
            if (sample_grads) place(sample, block, end);
          }
        }
      }
      first = last;
    }
    return norm_sq;
  }

 private:
  void place(int64_t sample, int64_t first, int64_t last) const {
    for (int64_t block = first; block < last; ++block) {
      form.place(block, sums + (block - first) * form.block_size(), sample_grads + sample * form.conv().weights());
    }
  }

  // totals (+)= weight·sums; ‖sums‖²
  double add_sums(float weight, int64_t size, float* totals, bool add) const {
    double norm_sq = 0;
    for (int64_t first = 0; first < size; first += kChain * kLanes) {
      Vec squares{};
      for (int64_t i = first; i < std::min(size, first + kChain * kLanes); i += kLanes) {
        const Vec value = load(sums + i);
        squares += value * value;
        store(totals + i, add ? load(totals + i) + value * weight : value * weight);
      }
      norm_sq += horizontal_sum(squares);
    }
    return norm_sq;
  }
};

template <typename T, typename Form>
void run(const Form& form, const Cut& cut, const Volume<T>& x, const Volume<T>& g, const float* sample_weight,
         int64_t weight_stride, float* dw, float* norm_sq, float* sample_grads) {
  const Conv& conv = form.conv();
  const int64_t block_size = form.block_size(), size = conv.blocks() * block_size;
  const auto totals = allocate<float>(cut.parts > 1 ? cut.parts * size : 0);
  const auto norms = allocate<double>(cut.pieces * conv.batch);
  FASTMIX_CHECK(totals && norms, "conv_weight_grad_with_norm: no memory for ", cut.parts, " x ", size, " float32");
  const int64_t units = cut.parts * cut.pieces, most_blocks = (conv.blocks() + cut.pieces - 1) / cut.pieces;
  const int64_t grain = 1 + static_cast<int64_t>(kGrainFlops * static_cast<double>(units) / conv.flops());
  std::atomic<bool> no_memory{false};
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const int64_t sums = round_up(form.scratch_size(), kTileLanes);
    const Workspace memory(sums + 2 * most_blocks * block_size);
    if (!memory.data()) {
      no_memory = true;
      return;
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / cut.pieces, piece = unit % cut.pieces;
      const int64_t first_block = piece * conv.blocks() / cut.pieces;
      const int64_t last_block = (piece + 1) * conv.blocks() / cut.pieces;
      const ConvWorker<Form, T> worker{form,        x, g, first_block, last_block, memory.data(), memory.data() + sums,
                                       sample_grads};
      const int64_t first = part * conv.batch / cut.parts, last = (part + 1) * conv.batch / cut.parts;
      float* const own = memory.data() + sums + most_blocks * block_size;
      float* const total = cut.parts > 1 ? totals.get() + part * size + first_block * block_size : own;
      for (int64_t sample = first; sample < last; ++sample) {
        const float weight = sample_weight ? sample_weight[sample * weight_stride] : 1.0f;
        norms[piece * conv.batch + sample] = worker.add_sample(sample, weight, total, sample > first);
      }
      for (int64_t block = first_block; block < last_block && cut.parts == 1; ++block) {
        form.place(block, total + (block - first_block) * block_size, dw);
      }
    }
  });
  FASTMIX_CHECK(!no_memory, "conv_weight_grad_with_norm: no memory for ", form.scratch_size(), " float32");
  for (int64_t sample = 0; sample < conv.batch; ++sample) {
    double total = 0;
    for (int64_t piece = 0; piece < cut.pieces; ++piece) total += norms[piece * conv.batch + sample];
    norm_sq[sample] = static_cast<float>(total);
  }
  if (cut.parts == 1) return;
  const int64_t block_grain = 1 + kGrainElements / (cut.parts * block_size);
  torch::stable::parallel_for(0, conv.blocks(), block_grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* const sums = totals.get() + block * block_size;
      for (int64_t i = 0; i < block_size; i += kLanes) {
        Vec sum = load(sums + i);
        for (int64_t part = 1; part < cut.parts; ++part) sum += load(sums + part * size + i);
        store(sums + i, sum);
      }
      form.place(block, sums, dw);
    }
  });
}

Conv check(const Tensor& input, const Tensor& grad_output, const std::vector<int64_t>& kernel_size,
           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
           const std::vector<int64_t>& dilation, int64_t groups) {
  // Beyond, no size below is representable.
  constexpr int64_t kMost = int64_t{1} << 30, kMostTaps = int64_t{1} << 20;
  constexpr double kMostElements = 1e12;
  FASTMIX_CHECK(input.dim() == 5, "input must be [B, I, D, H, W]");
  FASTMIX_CHECK(grad_output.scalar_type() == input.scalar_type() && grad_output.dim() == 5 &&
                    grad_output.size(0) == input.size(0),
                "grad_output must be [B, O, D', H', W'] of input's dtype");
  FASTMIX_CHECK(groups >= 1 && input.size(1) % groups == 0 && grad_output.size(1) % groups == 0,
                "groups must divide the channels of input and of grad_output");
  const auto valid = [](const std::vector<int64_t>& sizes, int64_t least, int64_t most) {
    const auto fits = [&](int64_t size) { return least <= size && size <= most; };
    return sizes.size() == 3 && std::all_of(sizes.begin(), sizes.end(), fits);
  };
  FASTMIX_CHECK(valid(kernel_size, 1, kMostTaps) && valid(stride, 1, kMost) && valid(padding, 0, kMost) &&
                    valid(dilation, 1, kMost),
                "kernel_size, stride, padding and dilation must be three sizes each");
  Conv conv;
  conv.batch = input.size(0);
  conv.groups = groups;
  conv.channels = input.size(1) / groups;
  conv.rows = grad_output.size(1) / groups;
  double padded = static_cast<double>(input.size(1));
  for (int i = 0; i < 3; ++i) {
    padded *= static_cast<double>(input.size(i + 2) + 2 * padding[i]);
    conv.axes[i] = {input.size(i + 2), grad_output.size(i + 2), kernel_size[i], stride[i], padding[i], dilation[i]};
    const int64_t span = input.size(i + 2) + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    const int64_t output = span < 0 ? 0 : span / stride[i] + 1;
    FASTMIX_CHECK(conv.axes[i].output == output, "grad_output must have size ", output, " in dimension ", i + 2,
                  ", got ", conv.axes[i].output);
  }
  FASTMIX_CHECK(padded <= kMostElements, "a padded sample of input must have at most ", kMostElements, " elements");
  return conv;
}

// Fills dw and norm_sq, and sample_grads if they are wanted.
void compute(const Conv& conv, const Tensor& input, const Tensor& grad_output, const OptionalTensor& sample_weight,
             const Tensor& dw, const Tensor& norm_sq, const OptionalTensor& sample_grads) {
  const Cut cut = cut_work(conv, input.numel() + grad_output.numel());
  for_dtype("input", input, [&](auto zero) {
    using T = decltype(zero);
    const auto run_in = [&](const auto& form) {
      run<T>(form, cut, volume<T>(input), volume<T>(grad_output),
             sample_weight ? static_cast<const float*>(sample_weight->data_ptr()) : nullptr,
             sample_weight ? sample_weight->stride(0) : 0, static_cast<float*>(dw.data_ptr()),
             static_cast<float*>(norm_sq.data_ptr()),
             sample_grads ? static_cast<float*>(sample_grads->data_ptr()) : nullptr);
    };
    // What of the lanes is used: the sums over the lanes take the time of some kFold vectors of positions.
    constexpr double kFold = 4;
    const double vectors = static_cast<double>((conv.positions() + kTileLanes - 1) / kTileLanes);
    const ChannelLanes channels(conv);
    if (channels.efficiency() > static_cast<double>(conv.positions()) / (kTileLanes * (vectors + kFold))) {
      run_in(channels);
    } else {
      run_in(PositionLanes(conv));
    }
  });
}

Tensor new_weight(const Conv& conv, const Tensor& input, const std::vector<int64_t>& kernel_size) {
  return torch::stable::new_empty(
      input, {conv.groups * conv.rows, conv.channels, kernel_size[0], kernel_size[1], kernel_size[2]},
      ScalarType::Float);
}

std::tuple<Tensor, Tensor> conv_weight_grad_with_norm_cpu(const Tensor& input, const Tensor& grad_output,
                                                          const OptionalTensor& sample_weight,
                                                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                          std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                                          int64_t groups) {
  const Conv conv = check(input, grad_output, kernel_size, stride, padding, dilation, groups);
  FASTMIX_CHECK(!sample_weight || (sample_weight->scalar_type() == ScalarType::Float && sample_weight->dim() == 1 &&
                                   sample_weight->size(0) == conv.batch),
                "sample_weight must be float32 [B] = [", conv.batch, "]");
  Tensor dw = new_weight(conv, input, kernel_size);
  Tensor norm_sq = torch::stable::new_empty(input, {conv.batch}, ScalarType::Float);
  if (input.numel() == 0 || grad_output.numel() == 0) {
    return {torch::stable::zero_(dw), torch::stable::zero_(norm_sq)};
  }
  compute(conv, input, grad_output, sample_weight, dw, norm_sq, std::nullopt);
  return {dw, norm_sq};
}

Tensor conv_weight_grad_sample_cpu(const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation, int64_t groups) {
  const Conv conv = check(input, grad_output, kernel_size, stride, padding, dilation, groups);
  Tensor grads = torch::stable::new_empty(
      input, {conv.batch, groups * conv.rows, conv.channels, kernel_size[0], kernel_size[1], kernel_size[2]},
      ScalarType::Float);
  if (input.numel() == 0 || grad_output.numel() == 0) return torch::stable::zero_(grads);
  const Tensor norm_sq = torch::stable::new_empty(input, {conv.batch}, ScalarType::Float);
  compute(conv, input, grad_output, std::nullopt, new_weight(conv, input, kernel_size), norm_sq, grads);
  return grads;
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_IMPL(fastmix, CPU, m) {
  m.impl("conv_weight_grad_with_norm", TORCH_BOX(&fastmix::conv_weight_grad_with_norm_cpu));
  m.impl("conv_weight_grad_sample", TORCH_BOX(&fastmix::conv_weight_grad_sample_cpu));
}
