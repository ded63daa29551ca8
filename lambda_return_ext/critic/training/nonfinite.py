"""What happens when a loss, a gradient or a weight is infinite or NaN: never silently anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Rollout
from lambda_return_ext.critic.data.split import Item
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.ranks import Ranks
from lambda_return_ext.critic.task import Task


def say_nonfinite(
    task: Task,
    step: int,
    metrics: Mapping[str, float],
    items: Sequence[Item],
    display: Display,
    save: Callable[[], None],
) -> None:
    """Write down the batch of a step whose loss or gradient is not finite, and stop or say that it is left out.

    Args:
        task: the run.
        step: whose weights were not changed.
        metrics: of the step, with loss and gradient norm.
        items: of the step.
        display: where it is said.
        save: saves the run as it was before the step; called before it stops.

    Raises:
        FloatingPointError: the configuration says to stop.
    """
    run_dir = Path(task.config.run_dir)
    names = ("right", "wrong") if isinstance(items[0], TokenPair) else ("rollout",)
    kind = "pairs" if len(names) == 2 else "rollouts"
    told = [
        {"problem": item.problem, **{name: _told(one) for name, one in zip(names, item.rollouts, strict=True)}}
        for item in items
    ]
    numbers = {name: str(metrics[name]) for name in ("train/loss", "train/grad_norm")}
    record = {"step": step, **numbers, kind: told}
    task.ranks.on_first(lambda: checkpoint.save_nonfinite(run_dir, record))
    message = (
        f"loss or gradient is not finite at step {step}: loss {numbers['train/loss']}, gradient norm "
        f"{numbers['train/grad_norm']}; its {kind} are in {run_dir / checkpoint.NONFINITE}"
    )
    if task.config.training.nonfinite == "stop":
        save()
        raise FloatingPointError(
            f"{message}; all before it is saved, and --resume training.nonfinite=skip leaves such a batch out"
        )
    display.line(f"{message}; left out")


def _told(rollout: Rollout) -> dict[str, object]:
    return {**rollout.solution._asdict(), "reward": rollout.reward, "step_rewards": rollout.step_rewards}


def check_weights(parameters: Sequence[nn.Parameter], step: int, ranks: Ranks) -> None:
    """Refuse to go on with weights that are not finite: no later step could mend them.

    Raises:
        FloatingPointError: a weight of some rank is infinite or NaN.
    """
    broken = not all(_local(parameter).isfinite().all() for parameter in parameters)
    if ranks.max(torch.tensor(int(broken))):
        raise FloatingPointError(
            f"weights are not finite after step {step}, so they were not saved: --resume goes on from the last "
            "checkpoint; training.learning_rate may be too high"
        )


def _local(parameter: nn.Parameter) -> Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
