"""What the tests of the trainer share but for fixtures: a tiny backbone, made-up pairs, readers of a run's files."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lambda_return_ext.critic.data.batches import Batch
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Rollout, Solution

WORDS = [f"w{i}" for i in range(40)]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", "fine", "broken", *WORDS])}

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": len(VOCABULARY), "max_position_embeddings": 128, "head_dim": 16}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# With zero weights in the last layer the first gradients are almost zero, and Adam makes rounding errors as large as
# any other gradient.
WELL_CONDITIONED = "training.value_loss.lambda_return.bias_init=null"


def save_backbone(folder, **settings):
    """Save a two-layer Llama with random weights and a tokenizer of words."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 128, "num_key_value_heads": 1, **settings}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def make_backbone(architecture, **settings):
    """A tiny backbone of another kind, with weights large enough to tell its features apart."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SIZES, pad_token_id=0, initializer_range=0.3, **settings)
    return transformers.AutoModel.from_config(config)


def make_records(problems=24, pairs=3, seed=0):
    """Pairs whose wrong solution has the word "broken" where the right one has "fine"."""
    rng = random.Random(seed)

    def words(low, high):
        return rng.choices(WORDS, k=rng.randint(low, high))

    records = []
    for problem in range(problems):
        prompt = " ".join(words(3, 6))
        for _ in range(pairs):
            start, end = words(2, 5), words(2, 8)
            sides = {
                side: " ".join([*start, word, *end]) for side, word in (("chosen", "fine"), ("rejected", "broken"))
            }
            records.append({"problem_id": f"p{problem}", "prompt": prompt, **sides, "made_by": "test"})
    return records


def pair_of(problem, right, wrong):
    """A pair of two solutions, of which the first is right."""
    return TokenPair(problem, Rollout(problem, right, 1.0), Rollout(problem, wrong, 0.0))


def pair(right, wrong, prompt=(9, 9)):
    """A pair of two solutions by their tokens."""
    return pair_of("p", Solution(prompt, right), Solution(prompt, wrong))


class Lookup(nn.Module):
    """A critic that says the token id as a share of ten."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, inputs, attention_mask):
        return inputs.float() * self.scale


def batch_of(attention_mask, loss_mask, rewards, packing=None, output_mask=None):
    """A batch of pairs without inputs, for what reads masks and rewards only."""
    upper = torch.arange(len(rewards)) < len(rewards) // 2
    tokens = int(attention_mask.sum())
    return Batch(attention_mask.long(), attention_mask, loss_mask, rewards, upper, tokens, None, packing, output_mask)


def tiny_config(run_dir, data, backbone):
    """The settings of a run that takes about a second."""
    return {
        "run_dir": str(run_dir),
        "device": "cpu",
        "threads": 1,
        "data": {"path": str(data), "max_length": 64, "validation_problems": 6},
        "model": {"backbone": str(backbone), "head": {"hidden_size": 16}},
        "training": {
            "epochs": 2,
            "batch_size": 6,
            "learning_rate": 0.01,
            "save_every": 4,
            "value_loss": {"use_lambda_return": True, "lambda_return": {"warmup_steps": 3}},
        },
        "evaluation": {"every": 5, "batch_size": 8, "train_pairs": 10, "baselines": False},
    }


@contextmanager
def disk_that_fills():
    """Yield what makes the system refuse to write beyond a size, as a full disk would, until the context ends.

    The limit is the whole process's, so the context must end before pytest reports: its own output may be a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def records_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_of(run_dir):
    return [record for record in records_of(run_dir) if "train/skipped_steps" in record]


def without_timing(run_dir):
    return [{k: v for k, v in record.items() if k != "train/tokens_per_second"} for record in records_of(run_dir)]


def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def assert_alike(run_dir, other):
    """The same run but for rounding."""
    for ours, theirs in zip(records_of(run_dir), records_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"train/tokens_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (ours["step"], name)


def torchrun(*arguments, ranks=2):
    """Start ranks, on one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    """Wait for ranks, and return their exit code and what they said; long before the hour that they wait for others."""
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun passes it on
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"the ranks wait for one another: {output}")
    return process.returncode, output
