// The entry points of trie_beam_step that tests/test_beam_search_emulated.py calls.
#include "cuda/beam_search_launch.h"
#include "fibers.h"

using namespace fastmix;

extern "C" {

void set_order(int value) { fastmix::set_order(value); }

int64_t workspace_bytes(int64_t b, int64_t k, int64_t v, int64_t element_bytes, int64_t num_candidates) {
  return BeamPlan(b, k, v, element_bytes, num_candidates).bytes;
}

int64_t splits(int64_t b, int64_t k, int64_t v, int64_t element_bytes, int64_t num_candidates) {
  return BeamPlan(b, k, v, element_bytes, num_candidates).splits;
}

int trie_beam_step(int dtype, int64_t batch, int64_t beams, int64_t width, const void* logits, const int64_t* strides,
                   const float* totals, const int64_t* nodes, const uint8_t* arena, int64_t arena_bytes,
                   int64_t num_candidates, const int64_t* eos, int64_t num_eos, int64_t normalize, const float* bias,
                   const int64_t* bias_strides, unsigned char* workspace, float* scores, int64_t* beam_index,
                   int64_t* token, int64_t* node) {
  return with_type(dtype, [&](auto zero) {
    BeamStep step{};
    step.logits = logits;
    std::copy(strides, strides + 2, step.strides);
    step.totals = totals;
    step.nodes = nodes;
    step.arena = arena;
    step.arena_bytes = arena_bytes;
    step.bias = bias;
    if (bias) std::copy(bias_strides, bias_strides + 3, step.bias_strides);
    step.beams = beams;
    step.width = width;
    step.normalize = normalize;
    step.num_candidates = static_cast<int>(num_candidates);
    step.num_eos = static_cast<int>(num_eos);
    std::copy(eos, eos + num_eos, step.eos);
    step.scores = scores;
    step.beam_index = beam_index;
    step.token = token;
    step.node = node;
    const BeamPlan plan(batch, beams, width, sizeof(zero), num_candidates);
    if (!plan.fits()) throw std::runtime_error("too large");
    launch_beam_step<decltype(zero)>(step, plan, workspace, nullptr);
  });
}

}  // extern "C"
