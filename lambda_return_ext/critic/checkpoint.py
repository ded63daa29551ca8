"""The run folder: created once, never overwritten unasked, every file written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lambda_return_ext.critic.config import Config, load_config
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.files import atomic_path, write_json, write_text
from lambda_return_ext.critic.model.value_model import ValueModel
from lambda_return_ext.critic.ranks import Ranks, shard_like, unshard

CONFIG = "config.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
TRACKING = "tracking.json"
NONFINITE = "nonfinite.jsonl"
BEST = "best.safetensors"
CHECKPOINTS = "checkpoints"
RUN_FILES = (CONFIG, DATA, METRICS, RESULTS, CURVES, TENSORBOARD, TRACKING, NONFINITE, BEST, CHECKPOINTS)
INSPECT = "inspect.html"  # written when asked for; a new run leaves it alone
# What may differ when a run goes on: it changes no number but for rounding.
MAY_CHANGE = (
    "run_dir",  # the same folder, spelt differently or moved
    "training.save_every",
    "training.save_total_limit",
    "training.nonfinite",
    "training.micro_batch_size",
    "training.strategy",
    "evaluation.baselines",
)
# A tracker that cannot reach its server raises OSErrors too, which have other numbers.
WRITE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOENT,
)


@contextmanager
def explain_failed_writes(run_dir: Path) -> Iterator[None]:
    """Turn what the system says about a full disk or a folder that cannot be written into a sentence.

    Raises:
        UserError: a file could not be written; the newest checkpoint is still whole.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in WRITE_ERRORS:
            raise
        newest = latest_checkpoint(run_dir)
        kept = "no checkpoint was saved yet" if newest is None else f"{newest} is intact, and --resume goes on from it"
        raise UserError(f"run_dir = {run_dir} must be writable and have room, got: {error}; {kept}") from error


def check_run_dir(config: Config, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that a run must not touch; write nothing.

    Raises:
        UserError: it could not be written; or the folder has something in it and neither flag was given; or --resume
            finds another configuration in it; or --overwrite finds no run in it.
    """
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir must be a folder or not exist yet, got the file {config.run_dir!r}")
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        denied = errno.EACCES if nearest.is_dir() else errno.ENOTDIR
        raise UserError(f"run_dir = {run_dir} must be writable: {OSError(denied, os.strerror(denied), str(nearest))}")
    if not run_dir.exists():
        return
    if not any(run_dir.iterdir()):
        return
    if not (resume or overwrite):
        raise UserError(f"run_dir = {run_dir} is not empty: give --resume to go on, --overwrite to start again")
    saved = run_dir / CONFIG
    if not saved.is_file():
        raise UserError(f"run_dir = {run_dir} is not empty and holds no {CONFIG}, so it is no run: choose another")
    if resume:
        before, now = flatten(load_config(saved).model_dump()), flatten(config.model_dump())
        keys = dict.fromkeys((*now, *before))  # of a mapping such as data.columns each may have others
        differ = [key for key in keys if now.get(key) != before.get(key) and key not in MAY_CHANGE]
        changed = [f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in differ]
        if changed:
            raise UserError(f"--resume must have the configuration of the run in {run_dir}: {'; '.join(changed)}")


def config_path(run_dir: Path) -> Path:
    """The configuration of a finished or broken off run.

    Raises:
        UserError: the folder holds no run.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise UserError(f"RUN must be the folder of a run, with a {CONFIG} in it, got {str(run_dir)!r}")
    return path


def saved_config(run_dir: Path) -> Config:
    """The configuration of a run that is looked at: on this machine, which may lack the CUDA device of that one.

    Raises:
        UserError: the folder holds no run.
    """
    config = load_config(config_path(run_dir))
    return config.model_copy(update={"device": "auto"}) if config.device == "cuda" else config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def open_run_dir(config: Config, data: Mapping[str, Any], overwrite: bool) -> Path:
    """Create the run folder and write down what the run depends on; `overwrite` removes an older run's files.

    Raises:
        UserError: the folder cannot be written, or the run in it was trained on other data.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in RUN_FILES:
                path = run_dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        check_same_data(run_dir, data)
        write_text(run_dir / CONFIG, config.to_yaml())
        write_json(run_dir / DATA, data)
    except OSError as error:
        raise UserError(f"run_dir = {run_dir} must be writable: {error}") from error
    return run_dir


def check_same_data(run_dir: Path, data: Mapping[str, Any]) -> None:
    """Refuse a run folder whose data file has changed since: its split would be another one.

    Raises:
        UserError: the run in the folder was trained on other data.
    """
    path = run_dir / DATA
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else data
    except ValueError as error:
        raise UserError(f"{path} must be what a run wrote there: {error}") from error
    if before.keys() != data.keys():
        raise UserError(f"{path} must be what this version writes there: the run in {run_dir} was made by another one")
    if before != data:
        raise UserError(f"{data['path']} is not the file that the run in {run_dir} was trained on: its content changed")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and, as JSON in the same file's header, the rest: one file, so the two cannot disagree."""
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"state": json.dumps(state)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["state"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:  # the last three of a foreign header
        raise UserError(f"{path} must be a checkpoint of this trainer: {error}") from error


def load_model(model: ValueModel, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of a checkpoint back into the model, sharded or not; all that it saves must be there."""
    wanted = model.saved_tensors()
    if wanted.keys() != tensors.keys():
        raise UserError(f"the checkpoint must hold {sorted(wanted)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"the checkpoint must hold a {name} of shape {list(wanted[name].shape)}, got {list(tensor.shape)}"
            )
    model.load_state_dict({name: shard_like(tensors[name], wanted[name]) for name in wanted}, strict=False)


def gather(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors whole and on the CPU of the first rank, which writes them; none on the others. All must call it.

    A machine with eight ranks has not the main memory for eight models with their moments.
    """
    gathered = {}
    for name, tensor in tensors.items():
        all_of_it = unshard(tensor)
        if ranks.is_first:
            gathered[name] = all_of_it.cpu()
    return gathered


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint with the highest step, or None where there is none."""
    return max((run_dir / CHECKPOINTS).glob("step-*.safetensors"), default=None)


def save_best(run_dir: Path, model: ValueModel, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write the model alone, as the best so far; all ranks must call it."""
    tensors = gather(model.saved_tensors(), ranks)
    ranks.on_first(lambda: save_tensors(run_dir / BEST, tensors, state))


def save_checkpoint(
    run_dir: Path,
    model: ValueModel,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    limit: int | None,
    ranks: Ranks,
) -> None:
    """Write all that a killed run needs to go on as if nothing had happened, then remove what is too old.

    All ranks must call it; the first writes. The file is the same however the model is sharded, so that a run may go on
    with another number of ranks or another strategy.

    Args:
        run_dir: the run folder.
        model: the model.
        optimizer: its optimizer.
        progress: any JSON; `step` names the file.
        limit: so many of the newest checkpoints are kept; None keeps all.
        ranks: this process among all.
    """
    optimizer_state = optimizer.state_dict()
    sharded = {f"model.{name}": tensor for name, tensor in model.saved_tensors().items()}
    for index, slots in optimizer_state["state"].items():
        sharded |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
    tensors = gather(sharded, ranks)
    tensors |= {f"rng.{name}": _of_all_ranks(state, ranks) for name, state in _random_states().items()}
    state = {"param_groups": optimizer_state["param_groups"], "progress": dict(progress)}

    def write() -> None:
        folder = run_dir / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        save_tensors(folder / f"step-{progress['step']:08d}.safetensors", tensors, state)
        for path in sorted(folder.glob("step-*.safetensors"))[: -limit if limit else 0]:
            path.unlink()

    ranks.on_first(write)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def _of_all_ranks(state: Tensor, ranks: Ranks) -> Tensor:
    """[ranks, n] from a state [n] on each rank."""
    table = state.new_zeros(ranks.size, len(state))
    table[ranks.rank] = state
    return ranks.sum(table)


def load_best(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a run's best checkpoint.

    Raises:
        UserError: the run has none yet, or it is damaged.
    """
    path = run_dir / BEST
    if not path.exists():
        raise UserError(f"RUN must have had a validation, which saves its {BEST}, got {str(run_dir)!r} without one")
    return load_tensors(path)


def load_checkpoint(path: Path, model: ValueModel, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote and return its `progress`.

    Random states are restored where there are as many ranks as before; else each rank keeps the one it started with.
    """
    tensors, state = load_tensors(path)
    load_model(model, {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            sharded = shard_like(tensor, parameters[int(index)]) if tensor.dim() else tensor
            slots.setdefault(int(index), {})[slot] = sharded
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
    if len(tensors["rng.cpu"]) == ranks.size:
        torch.set_rng_state(tensors["rng.cpu"][ranks.rank])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"][ranks.rank])
    return state["progress"]


def save_nonfinite(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Add a batch whose loss or gradient was not finite, in place of what a run that was killed said of later ones."""
    path = run_dir / NONFINITE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    before = [line for line in lines if json.loads(line)["step"] < record["step"]]
    write_text(path, "".join([*before, json.dumps(record) + "\n"]))
