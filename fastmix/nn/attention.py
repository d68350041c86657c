"""Multi-head attention with PyTorch's interface."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmix.ops._check import dtype_name, shape_text
from fastmix.ops.scaled_attention import RelativeBias, Rotary, scaled_attention
from fastmix.reference import scaled_attention as reference


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on :func:`fastmix.scaled_attention`: its constructor, state dict and results.

    A row that may attend to nothing gives the output projection's bias and weights 0, where PyTorch's gives NaN.
    Vaswani et al., Attention Is All You Need (arXiv:1706.03762).

    Args:
        embed_dim: channels E of queries and output.
        num_heads: heads H, a divisor of embed_dim.
        dropout: rate of dropout of the attention weights, in training.
        bias: whether the projections have biases.
        add_bias_kv: appends a learned key and value to each sequence, which all queries see.
        add_zero_attn: appends a key and a value of zeros likewise.
        kdim: channels of the keys, None for embed_dim.
        vdim: channels of the values, None for embed_dim.
        batch_first: whether tensors are [B, length, channels], or [length, B, channels].
        device: of the parameters.
        dtype: of the parameters.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        prefix_len: Tensor | None = None,
        rotary: Rotary | None = None,
        relative_bias: RelativeBias | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from query to key and value.

        Args:
            query: [T, B, E], with batch_first [B, T, E]; without a batch [T, E].
            key: [S, B, kdim], [B, S, kdim] or [S, kdim].
            value: [S, B, vdim], [B, S, vdim] or [S, vdim].
            key_padding_mask: [B, S] or [S]; bool, True where a key is *not* attended to, or float, added to the scores.
            need_weights: whether to return the weights too, which takes [B, H, T, S] memory and several times as long.
            attn_mask: [T, S] or [B·H, T, S]; bool, True where a pair is *not* attended to, or float likewise.
            average_attn_weights: whether the weights are the heads' mean.
            is_causal: key j is attended to by the queries i ≥ j. An attn_mask that is given besides is taken for this
                same mask and not read, unless keys are appended (add_bias_kv, add_zero_attn): then it is needed.
            prefix_len: [B], int32 or int64; the first prefix_len keys are seen by all queries, the rest causally.
            rotary: tables of a rotary position embedding of the projected queries and keys.
            relative_bias: T5's bias by distance, weight [buckets, H].
            scale: of the scores, None for 1/√(E/H).

        Returns:
            The output, of query's shape, and the weights with dropout applied: [B, T, S], [B, H, T, S] unless averaged,
            without B where there is no batch; None unless needed.

        Raises:
            TypeError: a mask is neither bool nor float.
            ValueError: a shape does not fit, or an option cannot be combined with appended keys.
        """
        self._check_inputs(query, key, value)
        batched, batch_first = query.ndim == 3, self.batch_first or query.ndim == 2
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q[None], k[None], v[None]
        elif not batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        appended = (self.bias_k is not None) + self.add_zero_attn
        if appended:
            options = {"prefix_len": prefix_len, "rotary": rotary, "relative_bias": relative_bias}
            self._check_appended(options, is_causal and attn_mask is None)
            k, v, is_causal = self._append(k, self.bias_k), self._append(v, self.bias_v), False
        elif is_causal:
            attn_mask = None
        q, k, v = (x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = self._merge(key_padding_mask, attn_mask, (*q.shape[:3], k.shape[2]), appended, batched)

        dropout_p = self.dropout if self.training else 0.0
        options = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        options |= {"prefix_len": prefix_len, "rotary": rotary, "relative_bias": relative_bias}
        if dropout_p > 0:  # the same weights are dropped from the output and from what is returned
            options["dropout_seed"] = torch.randint(2**63 - 1, (1,), device=q.device)
        output = scaled_attention(q, k, v, **options).transpose(1, 2).flatten(2)
        output = self.out_proj(output if batch_first else output.transpose(0, 1))
        weights = None
        if need_weights:
            q, k, _, *others = reference.op_arguments(q, k, v, **options)
            weights = reference.attention_weights(q, k, *others)[0].to(q.dtype)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """In as few products as the inputs allow."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif key is value:
            weight_q, weight_kv = weight.split((self.embed_dim, 2 * self.embed_dim))
            bias_kv = None if bias is None else bias[self.embed_dim :]
            return F.linear(query, weight_q, biases[0]), *F.linear(key, weight_kv, bias_kv).chunk(2, dim=-1)
        else:
            weights = weight.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _append(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, S, E] with the learned key or value and the zeros behind it."""
        rows = [x]
        if bias is not None:
            rows.append(bias.to(x.dtype).expand(len(x), -1, -1))
        if self.add_zero_attn:
            rows.append(x.new_zeros(len(x), 1, x.shape[2]))
        return torch.cat(rows, dim=1)

    def _merge(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        sizes: tuple[int, int, int, int],
        appended: int,
        batched: bool,
    ) -> Tensor | None:
        """Both masks as one that broadcasts to `sizes`, [B, H, T, S]: bool (True = attend) or float."""
        b, h, t, s = sizes[0], sizes[1], sizes[2], sizes[3] - appended
        masks = []
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, [(b, s) if batched else (s,)])
            masks.append(key_padding_mask.reshape(b, 1, 1, s))
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, [(t, s), (b * h, t, s)])
            masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (b, h)))
        if len(masks) == 2 and masks[0].dtype != masks[1].dtype:
            dtype = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
            masks = [_added(mask, dtype) for mask in masks]
        masks = [~mask if mask.dtype == torch.bool else mask for mask in masks]
        if appended:
            masks = [F.pad(mask, (0, appended), value=mask.dtype == torch.bool) for mask in masks]
        if len(masks) == 2:
            return masks[0] & masks[1] if masks[0].dtype == torch.bool else masks[0] + masks[1]
        return masks[0] if masks else None

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.ndim not in (2, 3):
            raise ValueError(f"query must be [T, E], or a batch of them in 3 dimensions, got {shape_text(query)}")
        length_dim = 1 if query.ndim == 3 and self.batch_first else 0
        batch = query.shape[1 - length_dim : 2 - length_dim] if query.ndim == 3 else ()
        for name, x, dim in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            wanted = [*batch, dim]
            if x.ndim != query.ndim or [*x.shape[:length_dim], *x.shape[length_dim + 1 :]] != wanted:
                wanted.insert(length_dim, "length")
                raise ValueError(f"{name} must be [{', '.join(map(str, wanted))}], got {shape_text(x)}")
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"value must be as long as key, {shape_text(key)}, got {shape_text(value)}")

    def _check_appended(self, options: dict[str, object], needs_mask: bool) -> None:
        for name, value in options.items():
            if value is not None:
                raise ValueError(f"{name} must be None where add_bias_kv or add_zero_attn append keys without a place")
        if needs_mask:
            raise ValueError("attn_mask must be the causal mask where is_causal and keys are appended, got None")


def _check_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating-point, got {dtype_name(mask.dtype)}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(str(list(shape)) for shape in shapes)}, got {shape_text(mask)}")


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's bool mask (True = ignore) as one that is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
