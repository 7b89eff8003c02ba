"""nn.MultiheadAttention whose projections are merged."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pareto_merging.model.convert import register
from pareto_merging.model.layer import ParetoModule, merged_property
from pareto_merging.model.linear import ParetoLinear

WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
MERGED_NAMES = ("in_proj_weight", "in_proj_bias", *WEIGHTS, "bias_k", "bias_v")


class ParetoAttention(ParetoModule, nn.MultiheadAttention):
    """nn.MultiheadAttention with merged projections: the same masks, layouts and results as the original at W(γ).

    The in-projection of self-attention is one product of [3E, E]; attention itself is scaled_dot_product_attention
    unless the weights are asked for.
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
    ) -> tuple[Tensor, Tensor | None]:
        if self._parameters.get("bias_k") is not None or self.add_zero_attn or query.is_nested:
            # rare forms: PyTorch's own forward on the merged tensors
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            where = "is_causal is set (it is a hint about the mask)"
            raise ValueError(f"attn_mask: expected a mask where {where}, got None")
        batched = query.ndim == 3
        if not batched and self.pareto.now.gamma.ndim == 2:
            raise ValueError(f"preference: expected one for an input without a batch, got {len(self.pareto.now.gamma)}")
        batch_dim = 0 if self.batch_first or not batched else 1
        q, k, v = (self._heads(t, batched) for t in self._project(query, key, value, batch_dim))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        # [batch, heads, L, head_dim] -> the layout that came in
        joined = attended.transpose(1, 2).flatten(2)
        joined = joined if self.batch_first else joined.transpose(0, 1)
        joined = joined if batched else joined.flatten(0, 1)
        out = self.out_proj
        if isinstance(out, ParetoLinear):
            return out.pareto_project(joined, "weight", out.bias, slice(None), batch_dim), weights
        return F.linear(joined, out.weight, out.bias), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batch_dim: int) -> tuple[Tensor, ...]:
        """Compute q, k and v: one product where they share their input."""
        bias, size = self.in_proj_bias, self.embed_dim
        thirds = [slice(i * size, (i + 1) * size) for i in range(3)]
        if not self._qkv_same_embed_dim:
            biases = [None if bias is None else bias[rows] for rows in thirds]
            inputs = zip((query, key, value), WEIGHTS, biases, strict=True)
            return tuple(self.pareto_project(x, name, b, slice(None), batch_dim) for x, name, b in inputs)
        project = functools.partial(self.pareto_project, name="in_proj_weight", bias=bias, batch_dim=batch_dim)
        if query is key and key is value:
            return project(query, rows=slice(None)).chunk(3, dim=-1)
        if key is value:
            return (project(query, rows=thirds[0]), *project(key, rows=slice(size, 3 * size)).chunk(2, dim=-1))
        return tuple(project(x, rows=rows) for x, rows in zip((query, key, value), thirds, strict=True))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Split the features of batches in any layout into heads [batch, heads, L, head_dim]."""
        x = x if batched else x.unsqueeze(0 if self.batch_first else 1)
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Make one float mask of both. It is added to the scores: [1 or batch, 1 or heads, 1 or L, S], or None."""
        batch, length, source = q.shape[0], q.shape[2], k.shape[2]
        mask = None
        if attn_mask is not None:
            shared, own, got = (length, source), (batch * self.num_heads, length, source), tuple(attn_mask.shape)
            if got not in (shared, own):
                raise ValueError(f"attn_mask: expected shape {shared} or {own}, got {got}")
            mask = _float_mask("attn_mask", attn_mask, q.dtype)
            mask = mask if mask.ndim == 2 else mask.view(batch, self.num_heads, length, source)
        if padding is not None:
            padding = padding if padding.ndim == 2 else padding.unsqueeze(0)
            if tuple(padding.shape) != (batch, source):
                raise ValueError(f"key_padding_mask: expected shape {(batch, source)}, got {tuple(padding.shape)}")
            padding = _float_mask("key_padding_mask", padding, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


def _float_mask(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected a boolean or floating-point mask, got {mask.dtype}")
    return mask.to(dtype)


for merged_name in MERGED_NAMES:
    setattr(ParetoAttention, merged_name, merged_property(merged_name))
register(nn.MultiheadAttention, ParetoAttention, lambda module, names: set(names) <= set(MERGED_NAMES))
