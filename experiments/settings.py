"""The settings of the experiment, from `settings.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Settings = Mapping[str, Any]
PATH = Path(__file__).with_name("settings.yaml")


def load_settings(quick: bool) -> dict[str, Any]:
    """The settings, for a quick run with what `quick` replaces."""
    settings: dict[str, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    changes = settings.pop("quick")
    if quick:
        seeds, problems = changes.pop("seeds"), changes["rollouts"].pop("problems")
        merge(settings, changes)
        for part in settings["plan"]:
            part["seeds"] = min(part["seeds"], seeds)
        for family in settings["rollouts"]["families"].values():
            family["problems"] = min(family["problems"], problems)
    return settings


def merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put `changes` into `settings`, mapping by mapping."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), dict):
            merge(settings[key], value)
        else:
            settings[key] = value
