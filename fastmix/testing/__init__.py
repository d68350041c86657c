"""The tolerance rule, and the cases that tests, benchmarks and `fastmix parity` share."""

# Op → the module that lists its cases as CASES. The names are the ops' own in every folder.
OPS = {
    "fft_mixing": "fastmix.testing.fft_mixing",
    "beam_search": "fastmix.testing.beam_search",
    "scaled_attention": "fastmix.testing.scaled_attention",
    "token_mixing": "fastmix.testing.token_mixing",
    "external_attention": "fastmix.testing.external_attention",
    "token_conv": "fastmix.testing.token_conv",
}
