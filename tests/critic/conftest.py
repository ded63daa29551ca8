"""A tiny backbone and made-up pairs, so that the whole trainer runs in seconds."""

import json
import signal

import pytest
import yaml
from critic_testing import make_records, save_backbone, tiny_config

from lambda_return_ext.critic.cli import main

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """A two-layer Llama with random weights and a tokenizer of words, in a folder."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def write_pairs(tmp_path):
    """Write records, or lines as they are, to a JSONL file and return its path."""

    def write(records, name="pairs.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def config_file(tmp_path, tiny_backbone, write_pairs):
    """A configuration file of a run that takes about a second."""
    path = tmp_path / "config.yaml"
    content = tiny_config(tmp_path / "run", write_pairs(make_records()), tiny_backbone)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def train(config_file):
    """Run `lambda-critic train` on the tiny configuration; returns the exit code."""
    return lambda *arguments: main(["train", "--config", str(config_file), *arguments])


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"
