"""transformers' generation loop around the fused search: model inputs, cache, processors and outputs are its own.

Follows GenerationMixin._beam_search of transformers 5.17 to 5.23. What the search decides (which beams go on, which
keys are found) is fastmix's; a search with one beam is no search, and is GenerationMixin._sample under the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import (
    ALL_CACHE_NAMES,
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    ModelOutput,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fastmix.generation import Trie, trie_beam_search
from fastmix.integrations._trie_processor import TrieLogitsProcessor

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
# These depend on which tokens are left, so the trie's mask comes before them, as that of prefix_allowed_tokens_fn does.
_AFTER_MASK = (
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.WatermarkLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
    logits_process.LogitNormalization,
)


def generate(
    model,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    trie: Trie,
    model_kwargs: dict[str, Any],
) -> Tensor | ModelOutput:
    """`generate_with_trie`, with the arguments that GenerationMixin.generate passes to a decoding method."""
    if config._eos_token_tensor is None:
        raise ValueError("eos_token_id must be set, in the generation config or as an argument: it ends every key")
    mask = TrieLogitsProcessor(
        trie,
        eos_token_id=config._eos_token_tensor.tolist(),
        pad_token_id=int(config._pad_token_tensor),
        prompt_length=input_ids.shape[1],
    )
    _refuse(model, input_ids, config, trie)
    if config.num_beams == 1:
        return _without_beams(model, input_ids, processors, criteria, config, mask, model_kwargs)
    return _beam_search(model, input_ids, processors, criteria, config, mask, model_kwargs)


def _refuse(model, input_ids: Tensor, config: GenerationConfig, trie: Trie) -> None:
    """Errors for what would be ignored, or would give no result."""
    if (mode := config.get_generation_mode()) not in _MODES:
        raise ValueError(f"generate_with_trie does greedy search, sampling and beam search, got {mode.value}")
    if config.low_memory:
        raise ValueError("low_memory must not be set: transformers' beam search has none")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    if is_sharded and distributed and torch.distributed.get_world_size() > 1:
        raise ValueError("model must not be sharded by DeepSpeed ZeRO-3 or FSDP: synced_gpus is not supported")
    if trie.device != input_ids.device:
        raise ValueError(f"trie must be on the device of the inputs, {input_ids.device}, got {trie.device}")
    batch = len(input_ids) // max(config.num_beams, config.num_return_sequences)
    if trie.num_tries not in (1, batch):
        raise ValueError(f"trie must hold one trie or one for each of the {batch} inputs, got {trie.num_tries}")
    bos = config.forced_bos_token_id if input_ids.shape[1] == 1 else None
    if bos is not None and any(reader.child(reader.root, bos) < 0 for reader in trie.readers):
        raise ValueError(
            f"forced_bos_token_id must be a first token of the trie's keys, got {bos}; put it in front of the keys, "
            "or set it to None and pass it as decoder_input_ids"
        )


def _split(processors: LogitsProcessorList) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The processors before and after the trie's mask."""
    place = next((i for i, processor in enumerate(processors) if isinstance(processor, _AFTER_MASK)), len(processors))
    return LogitsProcessorList(processors[:place]), LogitsProcessorList(processors[place:])


def _without_beams(
    model,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    mask: TrieLogitsProcessor,
    model_kwargs: dict[str, Any],
) -> Tensor | ModelOutput:
    """Greedy search or sampling; rows that something stopped before the end of a key become pad."""
    before, after = _split(processors)
    output = model._sample(input_ids, LogitsProcessorList([*before, mask, *after]), criteria, config, **model_kwargs)
    sequences = output if isinstance(output, Tensor) else output.sequences
    generated, readers = sequences[:, input_ids.shape[1] :], mask.trie.readers
    for i, row in enumerate(generated.tolist()):
        reader = readers[i * len(readers) // len(generated)]
        length = next((n for n, token in enumerate(row) if token in mask.eos_token_ids), None)
        if length is None or not reader.ends(reader.walk(row[:length])):
            generated[i] = config._pad_token_tensor
    return output


def _beam_search(
    model,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    mask: TrieLogitsProcessor,
    model_kwargs: dict[str, Any],
) -> Tensor | ModelOutput:
    model_steps = _ModelSteps(model, input_ids, processors, config, mask, model_kwargs)
    found = trie_beam_search(
        model_steps,
        mask.trie,
        num_beams=config.num_beams,
        max_length=_max_length(criteria, config) - input_ids.shape[1],
        eos_token_id=mask.eos_token_ids,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
        num_return_sequences=config.num_return_sequences,
        normalize=model_steps.normalize,
        do_sample=config.do_sample,
    )
    prompts = input_ids[:: config.num_beams].repeat_interleave(config.num_return_sequences, 0)
    generated = found.sequences.flatten(0, 1)
    sequences = torch.cat([prompts, generated.where(generated >= 0, config._pad_token_tensor.to(generated.device))], 1)
    if not config.return_dict_in_generate:
        return sequences
    return model_steps.output(sequences, found.sequences, found.scores.flatten())


def _max_length(criteria: StoppingCriteriaList, config: GenerationConfig) -> int:
    """The only stopping criteria that a search for whole keys can keep: the length, and the EOS tokens."""
    max_length = config.max_length
    for criterion in criteria:
        if type(criterion) is stopping_criteria.MaxLengthCriteria:
            max_length = min(max_length, criterion.max_length)
        elif type(criterion) is not stopping_criteria.EosTokenCriteria or not torch.equal(
            criterion.eos_token_id.unique().cpu(), config._eos_token_tensor.unique().cpu()
        ):
            raise ValueError(
                "stopping_criteria with beams must be the maximum length and the EOS tokens of the generation config, "
                f"got {type(criterion).__name__}"
            )
    return max_length


class _ModelSteps:
    """The model as `trie_beam_search` steps it, with rows, cache and masks as transformers keeps them."""

    def __init__(self, model, input_ids, processors, config, mask, model_kwargs):
        self._model, self._config, self._mask, self._kwargs = model, config, mask, model_kwargs
        self._rows = input_ids  # [B·K, length], prompt and generated tokens
        self._prompt_length = input_ids.shape[1]
        self._before, self._after = _split(processors)
        self._records: dict[str, tuple] = {}
        self._past_rows: list[Tensor] = []
        keeps_scores = config.return_dict_in_generate and config.output_scores
        if keeps_scores or any(type(p) is not logits_process.LogitNormalization for p in processors):
            self.normalize = None
        else:
            self.normalize = "allowed" if processors else "vocab"  # fused with the search's step

    def __call__(self, tokens: Tensor | None, beam_index: Tensor | None, state: None) -> tuple[Tensor, None]:
        if tokens is None:
            first = not self._config.is_assistant
            outputs = self._model._prefill(self._rows, self._config, self._kwargs, is_first_iteration=first)
        else:
            outputs = self._next(tokens, beam_index)
        is_encoder_decoder = self._model.config.is_encoder_decoder
        self._kwargs = self._model._update_model_kwargs_for_generation(
            outputs, self._kwargs, is_encoder_decoder=is_encoder_decoder
        )
        logits = outputs.logits[:, -1].to(self._rows.device)
        scores = logits if self.normalize else self._processed(logits.float())
        if self._config.return_dict_in_generate:
            self._record(outputs, logits, scores)
        scores = scores.unflatten(0, (-1, self._config.num_beams))
        return scores[:, 0] if tokens is None else scores, None

    def _next(self, tokens: Tensor, beam_index: Tensor) -> ModelOutput:
        model, kwargs = self._model, self._kwargs
        beams = torch.arange(len(self._rows), device=beam_index.device).view_as(beam_index)
        rows = (beams[:, :1] + beam_index).flatten()
        self._rows = torch.cat([self._rows[rows], tokens.view(-1, 1)], 1)
        if (cache := next((name for name in ALL_CACHE_NAMES if name in kwargs), None)) is not None:
            if hasattr(model, "_reorder_cache"):
                kwargs[cache] = model._reorder_cache(kwargs[cache], rows)
            elif hasattr(kwargs[cache], "reorder_cache"):
                kwargs[cache].reorder_cache(rows)
            else:
                raise ValueError(f"model must have a cache whose rows can be reordered, got {type(model).__name__}")
        length = 1 if kwargs["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(self._rows, next_sequence_length=length, **kwargs)
        return model(**inputs, return_dict=True)

    def _processed(self, logits: Tensor) -> Tensor:
        """Log-probabilities under all processors and the mask; a row in which they exclude everything is −inf."""
        scores = self._before(self._rows, logits.log_softmax(-1))
        scores, _ = self._mask.mask(self._rows, scores)
        excluded = scores.amax(1, keepdim=True) == -torch.inf
        return self._after(self._rows, scores.masked_fill(excluded, 0.0)).masked_fill(excluded, -torch.inf)

    def _record(self, outputs: ModelOutput, logits: Tensor, scores: Tensor) -> None:
        config, decoder = self._config, "decoder_" if self._model.config.is_encoder_decoder else ""
        self._past_rows.append(self._rows)
        kept = {}
        if config.output_scores:
            kept["scores"] = scores
        if config.output_logits:
            kept["logits"] = logits.to(torch.float32, copy=True)
        if config.output_attentions:
            kept[f"{decoder}attentions"] = outputs[f"{decoder}attentions"]
            if decoder:
                kept["cross_attentions"] = outputs.cross_attentions
        if config.output_hidden_states:
            kept[f"{decoder}hidden_states"] = outputs[f"{decoder}hidden_states"]
        for name, value in kept.items():
            self._records[name] = (*self._records.get(name, ()), value)

    def output(self, sequences: Tensor, generated: Tensor, scores: Tensor) -> ModelOutput:
        """transformers' output of a beam search, of generated tokens [B, R, L] (−1: none)."""
        config, kwargs = self._config, self._kwargs
        fields = {
            "sequences": sequences,
            "sequences_scores": scores,
            "beam_indices": self._beam_indices(generated),
            "past_key_values": next((kwargs[name] for name in ALL_CACHE_NAMES if name in kwargs), None),
            **self._records,
        }
        if not self._model.config.is_encoder_decoder:
            return GenerateBeamDecoderOnlyOutput(**fields)
        encoder = kwargs["encoder_outputs"]
        if config.output_attentions:
            fields["encoder_attentions"] = encoder.get("attentions")
        if config.output_hidden_states:
            fields["encoder_hidden_states"] = encoder.get("hidden_states")
        return GenerateBeamEncoderDecoderOutput(**fields)

    def _beam_indices(self, generated: Tensor) -> Tensor:
        """The row of each step's scores that every generated token was chosen from, −1 behind the end."""
        batch, results, length = generated.shape
        indices = generated.new_full((batch, results, length), -1, dtype=torch.int32)
        first = torch.arange(batch, device=generated.device)[:, None] * self._config.num_beams
        for step, rows in enumerate(self._past_rows[:length]):
            history = rows[:, self._prompt_length :].view(batch, 1, self._config.num_beams, step)
            same = (history == generated[:, :, None, :step]).all(-1)
            row = first + same.int().argmax(-1)
            indices[:, :, step] = row.where(generated[:, :, step] >= 0, -1)
        return indices.flatten(0, 1)
