"""`lambda-critic train --dry-run`: check a configuration, its data and its model, and say what memory a rank needs."""

from __future__ import annotations

import math
from pathlib import Path

from rich.table import Table
from torch import nn

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import Config
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.evaluation.baselines import LOGITS_AT_ONCE
from lambda_return_ext.critic.model.features import SOLUTIONS_AT_ONCE, TOKENS_AT_ONCE
from lambda_return_ext.critic.model.value_model import check_packing
from lambda_return_ext.critic.ranks import Ranks, choose_device
from lambda_return_ext.critic.reports.tables import print_data
from lambda_return_ext.critic.reports.trackers import check_trackers
from lambda_return_ext.critic.task import Task, prepare

GIB = 2**30
ADAM_SLOTS = 2
# Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, without the attention scores, which fused attention does not
# keep: 34 bytes of activations a token, layer and hidden unit in 16 bits.
ACTIVATIONS = 17
TRAINING, BASELINE = "activations, about", "likelihood baseline at the end, on the first rank, about"


def dry_run(config: Config, ranks: int, resume: bool = False, overwrite: bool = False) -> dict[str, int]:
    """Show the resolved configuration, the data and the memory per rank; write nothing and train nothing.

    Args:
        config: the run.
        ranks: number of processes that it is to have.
        resume: as of `train`.
        overwrite: as of `train`.

    Returns:
        What `memory_per_rank` says.

    Raises:
        UserError: something is wrong that a run would refuse.
    """
    checkpoint.check_run_dir(config, resume, overwrite)
    check_trackers(config)
    # It only counts, which needs no GPU: a login node will do.
    device = choose_device("auto" if config.device == "cuda" else config.device)
    task, display = prepare(config, Ranks(0, ranks, device)), Display()
    if config.data.packing and not config.model.cache_features:
        check_packing(task.model)
    if resume:
        checkpoint.check_same_data(Path(config.run_dir), task.summary())
    display.line(config.to_yaml().rstrip())
    print_data(display, task.summary())
    memory = memory_per_rank(task, ranks)
    parameters = [*task.model.parameters()]
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in parameters)
    display.line(f"{everything:,} parameters, of which {trained:,} train; {task.steps} steps")
    display.line(f"device memory of each of {ranks} ranks, {config.training.strategy}:")
    table = Table()
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in memory.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_section()
    # Activations are gone once the baseline is measured; all else is still there.
    together = sum(memory.values()) - min(memory[TRAINING], memory.get(BASELINE, 0))
    table.add_row("the most at any time", f"{together / GIB:.3f}")
    display.console.print(table)
    if config.model.cache_features:
        size = cached_features(task)
        display.line(f"cached features: {size / GIB:.3f} GiB of main memory in each process")
    return memory


def memory_per_rank(task: Task, ranks: int) -> dict[str, int]:
    """Bytes on the device of each rank, by what they are for.

    Parameters, gradients and AdamW's two moments are counted. Activations are an estimate for the longest batch that
    the configuration allows; allocator and libraries come on top, a GiB or so.

    Args:
        task: the run.
        ranks: number of processes.
    """
    config, model = task.config, task.model
    training, sharded = config.training, config.training.strategy == "fsdp"
    share = ranks if sharded else 1
    held = sum(_bytes(parameter) for parameter in model.parameters())
    trained = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    memory = {
        "parameters": math.ceil(held / share),
        "gradients": math.ceil(trained / share),
        "AdamW moments": math.ceil(ADAM_SLOTS * trained / share),
    }
    half = training.precision == "bfloat16" or config.model.dtype == "bfloat16"
    if sharded:
        blocks = [*model.backbone_layers(), model.value_head]
        gathered = max(sum(_bytes(parameter, half) for parameter in block.parameters()) for block in blocks)
        outside = sum(_bytes(parameter, half) for parameter in model.backbone.parameters()) - sum(
            _bytes(parameter, half) for layer in model.backbone_layers() for parameter in layer.parameters()
        )
        memory["gathered layers (two at a time) and embedding"] = 2 * gathered + outside
    items, sides = math.ceil(training.batch_size / ranks), len(task.data.train[0].rollouts)
    tokens = sides * min(items, training.micro_batch_size or items) * config.data.max_length
    memory[TRAINING] = tokens * _activations_of_a_token(task, 2 if half else 4)
    if config.evaluation.baselines and not config.model.from_scratch:
        memory[BASELINE] = _likelihood_baseline(task)
    return memory


def _likelihood_baseline(task: Task) -> int:
    """Bytes of the whole language model, of keys, values and activations of what it reads at once, and of its logits.

    The logits are there three times: as they are, in float32 and as log-probabilities.
    """
    model, longest = task.backbone.language_model(empty=True), task.config.data.max_length
    config = model.config.get_text_config()
    itemsize = 2 if task.config.model.dtype == "bfloat16" else 4
    tokens = longest * min(SOLUTIONS_AT_ONCE, max(TOKENS_AT_ONCE // longest, 1))
    heads = getattr(config, "num_attention_heads", None) or 1
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) / heads
    features = math.ceil(tokens * (cached + ACTIVATIONS) * config.hidden_size * itemsize)
    logits = min(LOGITS_AT_ONCE, tokens * config.vocab_size) * (itemsize + 8)
    return sum(_bytes(parameter) for parameter in model.parameters()) + features + logits


def _bytes(parameter: nn.Parameter, half: bool = False) -> int:
    return parameter.numel() * (min(parameter.itemsize, 2) if half else parameter.itemsize)


def _activations_of_a_token(task: Task, itemsize: int) -> int:
    model, width = task.model, task.model.backbone.config.hidden_size
    head = 4 * (width + 2 * task.config.model.head.hidden_size)
    if task.config.model.cache_features:
        return head
    layers = max(len(model.backbone_layers()), 1)
    if model.backbone_frozen:
        return head + ACTIVATIONS * width * itemsize
    if task.config.model.gradient_checkpointing:
        return head + (layers + ACTIVATIONS) * width * itemsize
    return head + layers * ACTIVATIONS * width * itemsize


def cached_features(task: Task) -> int:
    """Bytes of the features from each prompt's last token on, each distinct solution once."""
    solutions = {rollout.solution for rollout in task.data.rollouts}
    itemsize = 2 if task.config.model.dtype == "bfloat16" else 4
    tokens = sum(1 + len(solution.output_ids) for solution in solutions)
    return tokens * task.model.backbone.config.hidden_size * itemsize
