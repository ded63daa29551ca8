"""The metrics of each step, as a file and for the trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.config import Config
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.ranks import Ranks
from lambda_return_ext.critic.reports.trackers import Trackers


class MetricLog:
    """Metrics of each step, as JSON lines and for the trackers of the configuration.

    Args:
        config: the run.
        step: the last step that counts; what a killed run logged after its checkpoint is removed.
        say: shows a line.
    """

    def __init__(self, config: Config, step: int, say: Callable[[str], None]):
        run_dir = Path(config.run_dir)
        path = run_dir / checkpoint.METRICS
        kept = [json.dumps(record) + "\n" for record in read_metrics(run_dir) if record["step"] <= step]
        files.write_text(path, "".join(kept))
        self._trackers = Trackers(config, step, say)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of one step; lists, which are curves, go to the JSON lines alone."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        self._trackers.write(step, numbers)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._file.close()
        self._trackers.close(failed=kind is not None)


class NoLog:
    """The log of a rank that writes none."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def open_log(config: Config, step: int, ranks: Ranks, display: Display) -> MetricLog | NoLog:
    """The log of a run, which the first rank writes."""
    return ranks.on_first(lambda: MetricLog(config, step, display.line)) or NoLog()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a line that a killed run left half written is left out."""
    path = run_dir / checkpoint.METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
