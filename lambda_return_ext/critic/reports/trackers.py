"""Where metrics go besides `metrics.jsonl`: TensorBoard, or a service that the configuration asks for.

Each service's package is imported only when asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.config import Config
from lambda_return_ext.critic.errors import UserError, require


class Tracker(Protocol):
    """Takes the metrics of one run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""

    def close(self, failed: bool) -> None:
        """End the run."""


class TensorBoard:
    """Files for TensorBoard in the run folder."""

    def __init__(self, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.run_dir) / checkpoint.TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; a resumed one goes on under its id."""

    def __init__(self, config: Config, step: int):
        wandb = _package("wandb")
        run_id = _remembered(config, step, "wandb")
        self._run = wandb.init(
            project=config.tracking.project,
            name=_run_name(config),
            config=config.model_dump(),
            dir=config.run_dir,
            id=run_id,
            resume=None if run_id is None else "allow",
        )
        _remember(config, "wandb", self._run.id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or where MLflow puts it; a resumed one goes on under its id."""

    def __init__(self, config: Config, step: int):
        self._mlflow = _package("mlflow")
        run_id = _remembered(config, step, "mlflow")
        self._mlflow.set_experiment(config.tracking.project)
        run = self._mlflow.start_run(run_id=run_id, run_name=_run_name(config))
        if run_id is None:
            self._mlflow.log_params(checkpoint.flatten(config.model_dump()))
        _remember(config, "mlflow", run.info.run_id)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio:
    """A run of Trackio; a resumed one goes on under its name."""

    def __init__(self, config: Config, step: int):
        self._trackio = _package("trackio")
        name = _remembered(config, step, "trackio")
        run = self._trackio.init(
            project=config.tracking.project,
            name=name or _run_name(config),
            config=config.model_dump(),
            resume="never" if name is None else "allow",
        )
        _remember(config, "trackio", run.name)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        self._trackio.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        """End the run."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def check_trackers(config: Config) -> None:
    """Import what the configuration asks for.

    Raises:
        UserError: a tracker is named twice, or its package is not installed.
    """
    names = config.tracking.trackers
    if len(set(names)) < len(names):
        raise UserError(f"tracking.trackers must name each tracker once, got {names}")
    for name in names:
        if name != "tensorboard":
            _package(name)


class Trackers:
    """What the configuration asks for, started. A service that fails later on is left, said to be, and ends no run.

    Args:
        config: the run.
        step: the last step that counts; 0 starts a new run.
        say: shows a line.

    Raises:
        UserError: a service could not be started.
    """

    def __init__(self, config: Config, step: int, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in config.tracking.trackers:
            try:
                self._open[name] = TRACKERS[name](config, step)
            except Exception as error:
                if not _is_of_a_service(name, error):
                    raise
                raise UserError(f"tracking.trackers: {name} could not start its run: {error}") from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        self._each(lambda tracker: tracker.write(step, metrics), f"from step {step} on")

    def close(self, failed: bool) -> None:
        """End the run."""
        self._each(lambda tracker: tracker.close(failed), "at the end of the run")

    def _each(self, act: Callable[[Tracker], None], when: str) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:
                if not _is_of_a_service(name, error):
                    raise
                del self._open[name]
                self._say(f"{name} is left alone {when}, {checkpoint.METRICS} has everything: {error}")


def _is_of_a_service(tracker: str, error: Exception) -> bool:
    """Whether an error is that of a service, which may be out of reach, and not of the run folder, which must not."""
    return tracker != "tensorboard" and not (isinstance(error, OSError) and error.errno in checkpoint.WRITE_ERRORS)


def _package(name: str) -> Any:
    return require(name, f"tracking.trackers: {name}", name)


def _run_name(config: Config) -> str:
    return config.tracking.name or Path(config.run_dir).name


def _read(config: Config) -> dict[str, str]:
    path = Path(config.run_dir) / checkpoint.TRACKING
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _remembered(config: Config, step: int, tracker: str) -> str | None:
    """The tracker's own id of the run that is resumed."""
    return _read(config).get(tracker) if step else None


def _remember(config: Config, tracker: str, run_id: str) -> None:
    files.write_json(Path(config.run_dir) / checkpoint.TRACKING, {**_read(config), tracker: run_id})
