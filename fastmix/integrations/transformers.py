"""fastmix inside transformers, without touching its code: attention, FNet's transform, decoding under a trie."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastmix.generation import Trie
from fastmix.integrations._masks import pass_own_masks, pass_structure
from fastmix.integrations._replace import Replacement, Report, load_replacements, put_back, replace
from fastmix.integrations._trie_processor import TrieLogitsProcessor

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.utils import ModelOutput

__all__ = ["TrieLogitsProcessor", "accelerate", "generate_with_trie", "register", "restore"]


def register() -> None:
    """Makes ``attn_implementation="fastmix"`` known to transformers: :func:`fastmix.scaled_attention`.

    For every model that takes its attention from transformers' registry (``from_pretrained(…,
    attn_implementation="fastmix")``, ``from_config``, ``model.set_attn_implementation("fastmix")``), by attention
    function and mask function both. Causal masks, padding on either side or between, sliding windows and static caches
    reach the kernel as structure: no mask of queries × keys is built, and nothing is read back from a GPU. What is no
    such band (chunks, packed sequences, a model's own mask function) is a dense bool mask, and so is a structured one
    that a model computes with. Grouped queries are not repeated; ``scaling``, ``dropout`` (other random
    numbers than PyTorch's), ``is_causal`` and T5's ``position_bias``, with its gradient, are honoured, and without a
    mask the module is causal by the same rules as with ``"sdpa"``. Padding queries that attend to nothing give 0.

    Attention sinks, soft-capped scores, head masks and paged caches raise a ValueError in the model's forward.
    ``output_attentions=True`` warns and gives None, as with ``"sdpa"``. A second call changes nothing.

    Args:
        None.

    Returns:
        None.

    Raises:
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("fastmix.integrations.transformers needs transformers: pip install fastmix[transformers]")
    from fastmix.integrations import _attention

    _attention.register()


def accelerate(model: nn.Module) -> Report:
    """Replaces, in place, the modules of a transformers model for which fastmix has kernels.

    ``FNetBasicFourierTransform`` becomes :func:`fastmix.fourier_mixing`: the same function, Re(fft2) over tokens and
    channels, also in bfloat16 and float16, in which torch.fft refuses or, under autocast, answers in float32: fastmix
    keeps the input's dtype.

    ``T5Attention`` and ``MT5Attention`` give :func:`fastmix.scaled_attention` their table of buckets
    (:class:`fastmix.RelativeBias`) instead of a bias of queries × keys, and ``RoFormerSelfAttention`` its sines and
    cosines (:class:`fastmix.Rotary`), rotating by itself only what goes into a cache. If all attention layers of such a
    model are replaced, its attention implementation becomes ``"fastmix"`` too (:func:`register`), so that masks stay
    structure; if not, T5's layers compute as before. Projections are called as modules, with their hooks and LoRA.
    Attention dropout draws other random numbers than PyTorch's; RoFormer's own forward answers where weights are
    asked for, while T5's are None, as with ``"sdpa"``.

    The state dict, the modules' hooks and the model's own code stay as they are; a second call changes nothing, and
    copies and pickles of the model stay accelerated. Subclasses, and modules whose forward, Fourier transform or
    RoFormer's dropout was exchanged, are left alone.

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
    replacements = _replacements()
    report = replace(model, replacements, "transformers models")
    register()
    pass_structure(model, replacements)
    return report


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
    pass_own_masks(model)


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
    return load_replacements("transformers", dict.fromkeys(("_fnet", "_t5", "_roformer"), "transformers"))
