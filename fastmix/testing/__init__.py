"""The tolerance rule, and the cases that tests, benchmarks and `fastmix parity` share."""

# Op → the module that lists its cases as CASES. The names are the ops' own in every folder.
OPS = {
    "fft_mixing": "fastmix.testing.fft_mixing",
    "beam_search": "fastmix.testing.beam_search",
    "scaled_attention": "fastmix.testing.scaled_attention",
    "token_mixing": "fastmix.testing.token_mixing",
    "external_attention": "fastmix.testing.external_attention",
    "token_conv": "fastmix.testing.token_conv",
    "grad_norm": "fastmix.testing.grad_norm",
    "conv_grad_norm": "fastmix.testing.conv_grad_norm",
    "affine_grad_norm": "fastmix.testing.affine_grad_norm",
    "embedding_grad_norm": "fastmix.testing.embedding_grad_norm",
    "gradient_ratio": "fastmix.testing.gradient_ratio",
    "importance_weighted_log_prob": "fastmix.testing.importance_weighted_log_prob",
}
