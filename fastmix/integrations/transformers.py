"""fastmix inside transformers, without touching its code: FNet's Fourier transform, and decoding under a trie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastmix.generation import Trie
from fastmix.integrations._replace import Replacement, Report, load_replacements, put_back, replace
from fastmix.integrations._trie_processor import TrieLogitsProcessor

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.utils import ModelOutput

__all__ = ["TrieLogitsProcessor", "accelerate", "generate_with_trie", "restore"]


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, the modules of a transformers model for which fastmix has kernels.

    ``FNetBasicFourierTransform`` becomes :func:`fastmix.fourier_mixing`: the same function, Re(fft2) over tokens and
    channels, also in bfloat16 and float16, in which torch.fft refuses or, under autocast, answers in float32: fastmix
    keeps the input's dtype. The state dict, the modules' hooks and the model's own code stay as they are;
    a second call changes nothing, and copies and pickles of the model stay accelerated. Subclasses, and modules
    whose forward or Fourier transform was exchanged, are left alone.

    Args:
        model: a transformers model, or any module that contains parts of one.

    Returns:
        What fastmix computes in the model now: true if anything, printable, ``.replaced`` maps each module's name to
        what replaced it, ``.kept`` the name of each that was left alone to the reason.

    Raises:
        TypeError: model is not a module.
        ValueError: model has nothing to replace.
        ImportError: transformers is not installed.
    """
    return replace(model, _replacements(), "transformers models")


def restore(model: nn.Module) -> None:
    """Undoes :func:`accelerate`, in place; changes nothing in a model that was not accelerated.

    Args:
        model: the model, or a copy of it, accelerated or not.

    Returns:
        None.

    Raises:
        TypeError: model is not a module.
        ImportError: transformers is not installed.
    """
    put_back(model, _replacements())


def generate_with_trie(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    trie: Trie,
    **model_kwargs,
) -> Tensor | ModelOutput:
    """Generates keys of a trie: ``model.generate(**inputs, custom_generate=generate_with_trie, trie=trie, …)``.

    The same sequences and scores as ``generate`` with an exact ``prefix_allowed_tokens_fn``, by
    :func:`fastmix.generation.trie_beam_search`; without beams by the model's own greedy search or sampling under a
    :class:`TrieLogitsProcessor`. Where ``generate`` returns what `max_length` cut off, this does not: a
    result is a whole key and EOS, and a row for which there is none is prompt and pad, with score −inf.

    Lengths, beams, sampling, penalties, EOS and pad ids, return_dict_in_generate and the outputs to record are
    ``generate``'s own arguments; sequences_scores of beams are there without output_scores too. Logits processors are
    called where its beam search calls them, on log-probabilities, and those that depend on which tokens are left
    (top-k, top-p, renormalize_logits …) after the trie's mask. With beams, stopping criteria other than length and EOS
    are refused, and sampling draws other random numbers than transformers does. ``generate`` keeps a streamer and an
    assistant model to itself: they are not used.

    Args:
        model: a transformers model that generates; this and the next four arguments come from ``generate``.
        input_ids: prompts, or the decoder's start.
        logits_processor: all that ``generate`` made of its arguments, and the caller's.
        stopping_criteria: likewise.
        generation_config: likewise.
        trie: the keys, without EOS, on the device of the inputs; one for all of them or one for each (`Trie.concat`).
        model_kwargs: what the model's forward gets.

    Returns:
        What ``generate`` returns with these arguments: sequences [B · num_return_sequences, length] with the prompt in
        front, or an output object that holds them, their scores, and what else was asked for.

    Raises:
        TypeError: trie is no `Trie`.
        ValueError: the trie does not fit the inputs, no EOS is set or a key holds one, or an argument of ``generate``
            can't be honoured; the text names it.
    """
    from fastmix.integrations import _trie_generate

    return _trie_generate.generate(
        model, input_ids, logits_processor, stopping_criteria, generation_config, trie, model_kwargs
    )


def _replacements() -> tuple[Replacement, ...]:
    return load_replacements("transformers", {"_fnet": "transformers"})
