"""Sample many continuations of many prompts that all begin alike, on a CPU, from a model of the Llama family.

transformers keeps keys and values of the whole prompt for every row, and copies them at every token. Here the shared
beginning (the examples of the prompt) is kept once, and each row has a fixed buffer for what follows it: five times
as fast for the prompts of this experiment. A test compares the logits with those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half


class Rows:
    """Rows that are being continued: what they need of the model's past.

    Args:
        model: a Llama for causal language modelling.
        beginning: token ids that all prompts begin with.
        rest: of each of P prompts the token ids that follow.
        samples: how many rows each prompt gets.
        room: how many tokens a row may be continued by.
    """

    def __init__(self, model: Any, beginning: Sequence[int], rest: Sequence[Sequence[int]], samples: int, room: int):
        self.model = model
        size = max(map(len, rest)) + room
        self.length = torch.tensor([len(ids) for ids in rest]).repeat_interleave(samples)  # [R], tokens of its own
        self.shared: list[tuple[Tensor, Tensor]] = []  # of each layer keys and values [kv heads, S, D]
        self.own: list[tuple[Tensor, Tensor]] = []  # and of each row [R, kv heads, T, D]
        logits = []
        for number, ids in enumerate(rest):
            cache = DynamicCache(config=model.config)
            how = {"cache": cache, "use_cache": True, "logits_to_keep": 1}
            output = model(input_ids=torch.tensor([[*beginning, *ids]]), **how)
            logits.append(output.logits[0, -1])
            layers: Any = cache.layers
            for index, layer in enumerate(layers):
                keys, values = layer.keys[0], layer.values[0]
                if number == 0:
                    self.shared.append((keys[:, : len(beginning)].clone(), values[:, : len(beginning)].clone()))
                    heads, _, width = keys.shape
                    empty = keys.new_zeros(len(self.length), heads, size, width)
                    self.own.append((empty, empty.clone()))
                rows = slice(number * samples, (number + 1) * samples)
                for buffer, new in zip(self.own[index], (keys, values), strict=True):
                    buffer[rows, :, : len(ids)] = new[:, len(beginning) :]
        self.logits = torch.stack(logits).repeat_interleave(samples, 0)  # [R, V], of the next token

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.length = self.length[rows]
        self.own = [(keys[rows], values[rows]) for keys, values in self.own]

    def append(self, tokens: Tensor) -> None:
        """Take one more token [R] for each row, and compute the logits of the next."""
        base = self.model.model
        rows, shared = torch.arange(len(tokens)), self.shared[0][0].shape[1]
        hidden = base.embed_tokens(tokens)
        cos, sin = base.rotary_emb(hidden, (shared + self.length)[:, None])
        until = int(self.length.max()) + 1
        future = (torch.arange(until) > self.length[:, None])[:, None, None]
        for layer, before, own in zip(base.layers, self.shared, self.own, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            shape = (len(tokens), -1, attention.head_dim)
            query, key, value = (
                project(normed).view(shape) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
            own[0][rows, :, self.length], own[1][rows, :, self.length] = key, value
            query = query.view(len(tokens), key.shape[1], -1, attention.head_dim)  # [R, kv heads, group, D]
            flat = query.transpose(0, 1).flatten(1, 2)  # [kv heads, R * group, D]
            of_shared = (flat @ before[0].mT).unflatten(1, (len(tokens), -1)).transpose(0, 1)
            of_own = (query @ own[0][:, :, :until].mT).masked_fill(future, -torch.inf)
            weights = (torch.cat([of_shared, of_own], -1).float() * attention.scaling).softmax(-1).to(hidden.dtype)
            flat = weights[..., :shared].transpose(0, 1).flatten(1, 2)
            mixed = (flat @ before[1]).unflatten(1, (len(tokens), -1)).transpose(0, 1)
            mixed = mixed + weights[..., shared:] @ own[1][:, :, :until]
            hidden = hidden + attention.o_proj(mixed.reshape(len(tokens), -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.length = self.length + 1
        self.logits = self.model.lm_head(base.norm(hidden))


@torch.inference_mode()
def sample(
    model: Any,
    beginning: Sequence[int],
    rest: Sequence[Sequence[int]],
    samples: int,
    room: int,
    ends: Tensor,
    generator: torch.Generator,
) -> list[list[int] | None]:
    """Continuations at temperature 1 from the whole distribution, `samples` of each prompt, prompt by prompt.

    Args:
        model: a Llama for causal language modelling.
        beginning: token ids that all prompts begin with.
        rest: of each prompt the token ids that follow.
        samples: continuations of each.
        room: how many tokens one may have; one that has not ended by then is None.
        ends: bool [vocabulary], the tokens that end a continuation and do not belong to it.
        generator: of the random numbers.
    """
    rows = Rows(model, beginning, rest, samples, room)
    going = torch.arange(len(rows.length))
    written: list[list[int]] = [[] for _ in going]
    done = [False] * len(going)
    for _ in range(room + 1):
        tokens = torch.multinomial(rows.logits.float().softmax(-1), 1, generator=generator)[:, 0]
        for row, token, end in zip(going.tolist(), tokens.tolist(), ends[tokens].tolist(), strict=True):
            done[row] |= end
            if not done[row]:
                written[row].append(token)
        alive = torch.tensor([not done[row] for row in going.tolist()])
        if not alive.any() or max(map(len, written)) > room:
            break
        if alive.float().mean() < 0.8:  # it copies the buffers, so not at every end
            rows.keep(alive)
            going, tokens = going[alive], tokens[alive]
        rows.append(tokens)
    return [ids if over else None for ids, over in zip(written, done, strict=True)]
