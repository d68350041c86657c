// trie_beam_step on CUDA: the checks that guard memory, and the registration. The mathematics and what a block owns are
// told in beam_search_kernels.cuh. Results and the workspace come from Python; two launches, no allocation, nothing
// waits for the device. An arena whose sections do not fit gives no candidates: only the device could read it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "cuda/beam_search_launch.h"
#include "cuda/tensor_checks.h"

namespace fastmix {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_matrix(const Tensor& tensor, const char* name, ScalarType type, const char* type_name, const Tensor& logits,
                  int64_t columns) {
  check_on_device(tensor, name, logits, "logits");
  FASTMIX_CHECK(tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(0) == logits.size(0) &&
                    tensor.size(1) == columns && tensor.is_contiguous(),
                name, " must be ", type_name, " [", logits.size(0), ", ", columns, "], contiguous, got ",
                shape_text(tensor));
}

void check_bytes(const Tensor& tensor, const char* name, int64_t least, const Tensor& logits) {
  check_on_device(tensor, name, logits, "logits");
  FASTMIX_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 1 && tensor.is_contiguous() &&
                    reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 8 == 0,
                name, " must be uint8, one-dimensional, contiguous, aligned to 8 bytes");
  FASTMIX_CHECK(tensor.numel() >= least, name, " must have at least ", least, " bytes, got ", tensor.numel());
}

void check_logits(const Tensor& logits) {
  FASTMIX_CHECK(logits.is_cuda() && logits.dim() == 3, "logits must be a CUDA tensor [B, K, V], got ",
                shape_text(logits));
  FASTMIX_CHECK(logits.size(2) <= 1 || logits.stride(2) == 1, "logits must have stride 1 in V, got ", logits.stride(2));
}

BeamStep make_step(const Tensor& logits, const Tensor& beam_scores, const Tensor& nodes, const Tensor& arena,
                   int64_t num_candidates, const std::vector<int64_t>& eos, int64_t normalize,
                   const std::optional<Tensor>& bias) {
  const int64_t beams = logits.size(1), width = logits.size(2);
  check_matrix(beam_scores, "beam_scores", ScalarType::Float, "float32", logits, beams);
  check_matrix(nodes, "nodes", ScalarType::Long, "int64", logits, beams);
  check_bytes(arena, "trie", kTrieHeaderBytes + kTrieEntryBytes, logits);
  FASTMIX_CHECK(num_candidates >= 1 && num_candidates <= INT32_MAX / 4, "num_candidates must be in 1..", INT32_MAX / 4,
                ", got ", num_candidates);
  FASTMIX_CHECK(eos.size() <= kMaxEos, "eos_token_id must be at most ", kMaxEos, " tokens, got ", eos.size());
  FASTMIX_CHECK(normalize == kNone || normalize == kVocabulary || normalize == kAllowed,
                "normalize must be 0, 1 or 2, got ", normalize);
  BeamStep step{};
  step.logits = logits.data_ptr();
  step.strides[0] = logits.stride(0), step.strides[1] = logits.stride(1);
  step.totals = static_cast<const float*>(beam_scores.data_ptr());
  step.nodes = static_cast<const int64_t*>(nodes.data_ptr());
  step.arena = static_cast<const uint8_t*>(arena.data_ptr());
  step.arena_bytes = arena.numel();
  step.beams = static_cast<uint32_t>(beams);
  step.width = static_cast<uint32_t>(width);
  step.normalize = static_cast<int>(normalize);
  step.num_candidates = static_cast<int>(num_candidates);
  for (const int64_t token : eos) {
    FASTMIX_CHECK(token >= 0 && token < width, "eos_token_id must be in 0..V-1 = 0..", width - 1, ", got ", token);
    step.eos[step.num_eos++] = static_cast<int32_t>(token);
  }
  if (bias) {
    check_on_device(*bias, "bias", logits, "logits");
    FASTMIX_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 3 && bias->size(0) == logits.size(0) &&
                      bias->size(1) == beams && bias->size(2) == width,
                  "bias must be float32 ", shape_text(logits), ", got ", shape_text(*bias));
    step.bias = static_cast<const float*>(bias->data_ptr());
    for (int i = 0; i < 3; ++i) step.bias_strides[i] = bias->stride(i);
  }
  return step;
}

void trie_beam_step_out_cuda(const Tensor& logits, const Tensor& beam_scores, const Tensor& nodes, const Tensor& arena,
                             int64_t num_candidates, std::vector<int64_t> eos, int64_t normalize,
                             std::optional<Tensor> bias, Tensor workspace, Tensor scores, Tensor beam_index,
                             Tensor token, Tensor node) {
  check_logits(logits);
  BeamStep step = make_step(logits, beam_scores, nodes, arena, num_candidates, eos, normalize, bias);
  check_matrix(scores, "scores", ScalarType::Float, "float32", logits, num_candidates);
  check_matrix(beam_index, "beam_index", ScalarType::Long, "int64", logits, num_candidates);
  check_matrix(token, "token", ScalarType::Long, "int64", logits, num_candidates);
  check_matrix(node, "node", ScalarType::Long, "int64", logits, num_candidates);
  step.scores = static_cast<float*>(scores.data_ptr());
  step.beam_index = static_cast<int64_t*>(beam_index.data_ptr());
  step.token = static_cast<int64_t*>(token.data_ptr());
  step.node = static_cast<int64_t*>(node.data_ptr());

  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const auto run = [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const BeamPlan plan(logits.size(0), logits.size(1), logits.size(2), sizeof(T), num_candidates);
    FASTMIX_CHECK(plan.fits(), "trie_beam_step is too large: logits ", shape_text(logits), ", num_candidates ",
                  num_candidates);
    check_bytes(workspace, "workspace", plan.bytes, logits);
    launch_beam_step<T>(step, plan, static_cast<unsigned char*>(workspace.data_ptr()), current_stream(logits));
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<__half*>(nullptr));
    default:
      FASTMIX_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace fastmix

STABLE_TORCH_LIBRARY_FRAGMENT(fastmix, m) {
  m.def(
      "trie_beam_step_out(Tensor logits, Tensor beam_scores, Tensor nodes, Tensor arena, int num_candidates, "
      "int[] eos, int normalize, Tensor? bias, Tensor(a!) workspace, Tensor(b!) scores, Tensor(c!) beam_index, "
      "Tensor(d!) token, Tensor(e!) node) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmix, CUDA, m) {
  m.impl("trie_beam_step_out", TORCH_BOX(&fastmix::trie_beam_step_out_cuda));
}
