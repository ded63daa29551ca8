"""A tiny backbone and made-up pairs, so that the whole trainer runs in seconds."""

import json
import signal

import pytest
import yaml
from critic_testing import make_records, save_backbone, tiny_config

from lambda_return_ext.critic import files
from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.training import trainer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """A two-layer Llama with random weights and a tokenizer of words, in a folder."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(autouse=True)
def curves(request):
    """A stand-in for the picture at the end of a run, which takes as long as the run, but for tests that are marked."""
    if "draws" in request.keywords:
        yield
        return

    def plot_curves(run_dir, results):
        with files.atomic_path(run_dir / "curves.png") as temporary:
            temporary.write_bytes(b"no picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_curves", plot_curves)
        yield


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
