"""Modules and models built on the ops.

Image models take [B, in_chans, H, W] and give logits, encoders and blocks take and give [B, S, C], RoFormer takes token
ids [B, S], and attentions take queries, keys and values as the peers do whose state dicts they load. All work with
autocast, ``torch.compile(fullgraph=True)``, ``with torch.device(…)`` and ``.to(…)``.
"""

from fastmix.nn._layers import Affine, DropPath
from fastmix.nn.attention import MultiheadAttention
from fastmix.nn.encoder import Encoder, ImageModel, PreNormBlock
from fastmix.nn.external_attention import EAMLP, ExternalAttention
from fastmix.nn.feed_forward_stack import FeedForwardBlock, FeedForwardStack
from fastmix.nn.fft_mixing import FourierMixing, GlobalFilter
from fastmix.nn.fnet import FNet, FNetBlock, LinearMixing, fnet_base, fnet_large
from fastmix.nn.gfnet import GFNet, GFNetBlock
from fastmix.nn.gmlp import GMLP, GMLPBlock, SpatialGatingUnit, gmlp_b16, gmlp_s16, gmlp_ti16
from fastmix.nn.gradient_normalized import GradientNormalized
from fastmix.nn.mixer import MixerBlock, MLPMixer, mixer_b16, mixer_l16, mixer_s16
from fastmix.nn.ntk_linear import NTKLinear
from fastmix.nn.residual import Residual
from fastmix.nn.resmlp import ResMLP, ResMLPBlock, resmlp_12, resmlp_24, resmlp_36
from fastmix.nn.rms_norm import RMSNorm
from fastmix.nn.roformer import RoFormerBlock, RoFormerEncoder, RoFormerForSeq2Seq
from fastmix.nn.roformer_sim import RoFormerSim, RoFormerSimOutput
from fastmix.nn.synthesizer import Synthesizer, SynthesizerEncoder
from fastmix.nn.t5_attention import T5Attention
from fastmix.nn.token_conv import TokenConv, TokenConvEncoder

__all__ = [
    "EAMLP",
    "GMLP",
    "Affine",
    "DropPath",
    "Encoder",
    "ExternalAttention",
    "FNet",
    "FNetBlock",
    "FeedForwardBlock",
    "FeedForwardStack",
    "FourierMixing",
    "GFNet",
    "GFNetBlock",
    "GMLPBlock",
    "GlobalFilter",
    "GradientNormalized",
    "ImageModel",
    "LinearMixing",
    "MLPMixer",
    "MixerBlock",
    "MultiheadAttention",
    "NTKLinear",
    "PreNormBlock",
    "RMSNorm",
    "ResMLP",
    "ResMLPBlock",
    "Residual",
    "RoFormerBlock",
    "RoFormerEncoder",
    "RoFormerForSeq2Seq",
    "RoFormerSim",
    "RoFormerSimOutput",
    "SpatialGatingUnit",
    "Synthesizer",
    "SynthesizerEncoder",
    "T5Attention",
    "TokenConv",
    "TokenConvEncoder",
    "fnet_base",
    "fnet_large",
    "gmlp_b16",
    "gmlp_s16",
    "gmlp_ti16",
    "mixer_b16",
    "mixer_l16",
    "mixer_s16",
    "resmlp_12",
    "resmlp_24",
    "resmlp_36",
]
