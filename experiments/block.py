"""The backbone's last block, trained: the last of the layers that the frozen features come from, and a head on top.

What the frozen layers below it give is computed once. Only output tokens get a value, so that the prompt is read by
the block's keys and values alone: twenty times less work than the whole block over whole sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from lambda_return_ext.critic.data.rollouts import Solution


class BlockInputs(Mapping[Solution, Tensor]):
    """What the block reads of each solution: [P + T, H + 1], the last column 1 at the T output tokens.

    Args:
        prompts: [P, H] of each prompt.
        outputs: [T, H] of each solution.
    """

    def __init__(self, prompts: Mapping[tuple[int, ...], Tensor], outputs: Mapping[Solution, Tensor]):
        self.prompts = prompts
        self.outputs = outputs

    def __getitem__(self, solution: Solution) -> Tensor:
        parts = self.prompts[solution.prompt_ids], self.outputs[solution]
        return torch.cat([nn.functional.pad(part, (0, 1), value=float(k)) for k, part in enumerate(parts)])

    def __iter__(self) -> Iterator[Solution]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)


class TrainedBlock(nn.Module):
    """A Llama layer, the norm after it and a head.

    Args:
        base: the base model whose last layer it is; copied.
        head: from features [..., H] to values [..., 1].
    """

    def __init__(self, base: Any, head: nn.Module):
        super().__init__()
        self.block = copy.deepcopy(nn.ModuleDict({"layer": base.layers[-1], "norm": base.norm}))
        self.block.requires_grad_(True)
        self.rotary = copy.deepcopy(base.rotary_emb)
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Values [B, S, 1] of rows [B, S, H + 1] of `BlockInputs`, padded on the right; 0 at all but output tokens."""
        outputs = inputs[..., -1] > 0  # [B, S], contiguous in each row
        features, valid = self.features(inputs[..., :-1], outputs)
        values = self.head(features)[valid]
        return inputs.new_zeros(*outputs.shape, 1).masked_scatter(outputs[..., None], values)

    def features(self, hidden: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, H] of the output tokens, and where in [B, T] there is one."""
        layer: Any = self.block["layer"]
        attention, counts = layer.self_attn, outputs.sum(1)
        step, row = torch.arange(int(counts.max())), torch.arange(len(hidden))[:, None]
        places = (outputs.int().argmax(1)[:, None] + step).clamp(max=hidden.shape[1] - 1)  # [B, T]
        normed = layer.input_layernorm(hidden)
        cos, sin = self.rotary(hidden, torch.arange(hidden.shape[1])[None])  # [1, S, D]
        query = self._heads(attention.q_proj(normed[row, places]), attention.head_dim)
        key, value = (self._heads(proj(normed), attention.head_dim) for proj in (attention.k_proj, attention.v_proj))
        query = query * cos[0, places][:, None] + rotate_half(query) * sin[0, places][:, None]
        key = key * cos[:, None] + rotate_half(key) * sin[:, None]
        past = (torch.arange(hidden.shape[1]) <= places[..., None])[:, None]  # [B, 1, T, S]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, past, enable_gqa=True)
        features = hidden[row, places] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        features = features + layer.mlp(layer.post_attention_layernorm(features))
        return self.block["norm"](features), step < counts[:, None]

    @staticmethod
    def _heads(projected: Tensor, width: int) -> Tensor:
        return projected.unflatten(-1, (-1, width)).transpose(1, 2)
