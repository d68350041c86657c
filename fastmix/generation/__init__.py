"""Generation under a prefix tree: the tree itself and the searches over it."""

from fastmix.generation._hypotheses import TrieBeamSearchOutput
from fastmix.generation.fixed import trie_decode_fixed
from fastmix.generation.lookahead import lookahead_bias
from fastmix.generation.search import trie_beam_search
from fastmix.generation.trie import Trie

__all__ = ["Trie", "TrieBeamSearchOutput", "lookahead_bias", "trie_beam_search", "trie_decode_fixed"]
