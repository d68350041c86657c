"""g-mlp-pytorch on fastmix. Imports it: `fastmix.integrations.lucidrains` does so when asked."""

from __future__ import annotations

import torch.nn.functional as F
from g_mlp_pytorch import g_mlp_pytorch
from torch import Tensor, nn

from fastmix.integrations._bypass import layer_norm_options, needed, needed_norm
from fastmix.integrations._replace import Replacement
from fastmix.ops.token_mixing import token_linear


class FusedSpatialGatingUnit(g_mlp_pytorch.SpatialGatingUnit):
    """SpatialGatingUnit in one call, or two where an activation stands between the linear map and the gate.

    The unit's own forward answers where its norm was hooked or exchanged since.
    """

    def forward(self, x: Tensor, gate_res: Tensor | None = None) -> Tensor:
        if _obstacle(self):
            return super().forward(x, gate_res)
        weight, bias = self.weight, self.bias
        if self.circulant_matrix:
            weight = _circulant(weight) * self.circulant_pos_x[:, :, None] * self.circulant_pos_y[:, None, :]
        if self.causal:
            tokens = x.shape[1]
            weight, bias = weight[:, :tokens, :tokens].tril(), bias[:, :tokens]
        if self.heads == 1:
            weight, bias = weight[0], bias[0]
        res, gate = x.chunk(2, dim=-1)
        options = {"added": gate_res, **layer_norm_options(self.norm)}
        if needed("act", self.act, nn.Identity):
            return self.act(token_linear(gate, weight, bias, **options)) * res
        return token_linear(gate, weight, bias, gate=res, **options)


def _circulant(row: Tensor) -> Tensor:
    """[heads, S] → [heads, S, S] as g-mlp-pytorch builds it: element (i, k) is row[S − 1 + k − i] for k ≤ i, else 0."""
    size = row.shape[1]
    return F.pad(row, (0, size - 1)).unfold(1, size, 1).flip(1)


def _obstacle(unit: nn.Module) -> str | None:
    return needed_norm("norm", unit.norm)


REPLACEMENTS = (
    Replacement(g_mlp_pytorch.SpatialGatingUnit, FusedSpatialGatingUnit, "fastmix.token_linear", _obstacle),
)
