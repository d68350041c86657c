"""Losses of whole methods: density from a VAE, several tasks, sentence pairs."""

from fastmix.losses.density import vae_log_prob
from fastmix.losses.multi_task import MultiTaskLoss
from fastmix.losses.sentence_pair import SentencePairHead, in_batch_similarity_loss, similarity_distillation_loss
from fastmix.ops.importance_weighted_log_prob import importance_weighted_log_prob

__all__ = [
    "MultiTaskLoss",
    "SentencePairHead",
    "importance_weighted_log_prob",
    "in_batch_similarity_loss",
    "similarity_distillation_loss",
    "vae_log_prob",
]
