"""One step on every layout of ranks and micro-batches; started by torchrun from test_distributed.py.

Usage: rank_testing.py CONFIG RECURRENT_BACKBONE OUTPUT
"""

import itertools
import json
import sys
import warnings

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import load_config
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.errors import OtherRankError, UserError
from lambda_return_ext.critic.evaluation.validation import measure
from lambda_return_ext.critic.model.value_model import check_packing
from lambda_return_ext.critic.ranks import gradients_wait, join_ranks, parallelize, whole
from lambda_return_ext.critic.task import build_collator, prepare
from lambda_return_ext.critic.training.interrupt import StopRequest
from lambda_return_ext.critic.training.trainer import build_forward_loss, tally, training_batch

STRATEGIES = ("ddp", "fsdp")
LOSSES = {
    "lambda": ["training.value_loss.use_lambda_return=true"],
    "pairwise": ["training.value_loss.use_lambda_return=false", "training.value_loss.use_pairwise=true"],
    "huber by sequence in a window": [
        "training.value_loss.use_lambda_return=true",
        "training.value_loss.error=huber",
        "training.value_loss.huber_delta=0.3",
        "training.value_loss.reduction=sequence",
        "training.value_loss.output_window=4",
    ],
    "both": ["training.value_loss.use_lambda_return=true", "training.value_loss.use_pairwise=true"],
}
# Pairs in a batch and in a micro-batch: even shares, two micro-batches a rank, and one pair for two ranks.
SIZES = {"8": (8, None), "8 by 2": (8, 2), "7 by 2": (7, 2), "1": (1, None)}
WHOLE = ["model.cache_features=false", "model.backbone_frozen=false"]
REDUCED = ["training.precision=bfloat16", "model.gradient_checkpointing=true"]


def step(task, module, pairs, micro_batch_size):
    """Loss and gradients of one batch, as the training loop computes them."""
    ranks, model = task.ranks, task.model
    collate = build_collator(task, [], Display(quiet=True))
    places = [(pair, (0.3 + 0.01 * i, 0.9 - 0.02 * i)) for i, pair in enumerate(pairs)]
    parts = ranks.micro_batches(places, micro_batch_size)
    window = task.config.training.value_loss.output_window
    batches = [training_batch(collate, part, places[0], False, window) for part in parts]
    *counts, tokens, _ = ranks.sum(tally(task.config, batches, StopRequest())).tolist()
    forward_loss = build_forward_loss(module, task.config)
    model.train()
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for number, batch in enumerate(batches, 1):
        with gradients_wait(module, number < len(batches)):
            part, _ = forward_loss(batch, torch.tensor(counts), torch.tensor(0.9, dtype=torch.float64))
            (part * ranks.size).backward()
        total += part.detach()
    gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return {"loss": ranks.sum(total), "tokens": torch.tensor(tokens), **gradients}


def run(config_file, ranks):
    """The loss and gradients of each case, and what validation measures."""
    results, measured = {}, {}
    for strategy, reduced, loss in itertools.product(STRATEGIES, (False, True), LOSSES):
        if reduced and loss != "both":
            continue
        overrides = [*WHOLE, f"training.strategy={strategy}", *REDUCED * reduced, *LOSSES[loss]]
        task = prepare(load_config(config_file, overrides), ranks)
        module = parallelize(task.model, ranks, task.config.training)
        for size, (pairs, micro_batch_size) in SIZES.items():
            tensors = step(task, module, task.data.train[:pairs], micro_batch_size)
            key = f"{strategy}{' reduced' * reduced}/{loss}/{size}"
            results |= {f"{key}/{name}": tensor for name, tensor in tensors.items()}
        if loss == "lambda":
            measured[strategy] = measure(task, build_collator(task, [], Display(quiet=True)))
    return results, measured


def fail_together(ranks, failing):
    """What each rank makes of an act at which some fail."""

    def act():
        if ranks.rank in failing:
            raise UserError(f"rank {ranks.rank} fails")
        return f"rank {ranks.rank} did it"

    try:
        said = ranks.together(act)
    except (UserError, OtherRankError) as error:
        said = repr(error)
    return said_by_all(ranks, said)


def refuse_packing(config_file, backbone, strategy, ranks):
    """What the probe says of a backbone on each rank."""
    task = prepare(
        load_config(config_file, [*WHOLE, f"training.strategy={strategy}", f"model.backbone={backbone}"]), ranks
    )
    parallelize(task.model, ranks, task.config.training)
    try:
        said = check_packing(task.model)
    except UserError as error:
        said = str(error)
    return said_by_all(ranks, said)


def gathered_by_all(config_file, ranks):
    """What each rank holds of a sharded model when the first one writes it, and whether that is the whole model."""
    task = prepare(load_config(config_file, [*WHOLE, "training.strategy=fsdp"]), ranks)
    before = {name: tensor.clone() for name, tensor in task.model.saved_tensors().items()}
    parallelize(task.model, ranks, task.config.training)
    tensors = checkpoint.gather(task.model.saved_tensors(), ranks)
    alike = all(torch.equal(tensors[name], before[name]) for name in tensors)
    return said_by_all(ranks, [len(tensors) / len(before), alike])


def said_by_all(ranks, said):
    everything = [None] * ranks.size
    dist.all_gather_object(everything, said)
    return everything


def main(config_file, recurrent_backbone, output):
    with join_ranks(load_config(config_file, [*WHOLE, "training.strategy=fsdp"])) as ranks:
        results, measured = run(config_file, ranks)
        measured["together"] = [fail_together(ranks, failing) for failing in ((), (0,), (1,), (0, 1))]
        own = load_config(config_file).model.backbone
        measured["packing"] = {
            strategy: [refuse_packing(config_file, backbone, strategy, ranks) for backbone in (own, recurrent_backbone)]
            for strategy in STRATEGIES
        }
        measured["gathered"] = gathered_by_all(config_file, ranks)
        if ranks.is_first:
            save_file(results, output)
            with open(f"{output}.json", "w", encoding="utf-8") as file:
                json.dump(measured, file)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(*sys.argv[1:])
