"""Schedules, other losses, windows, early stopping, dry runs and the production configuration."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from critic_testing import (
    VOCABULARY,
    batch_of,
    content,
    make_backbone,
    make_records,
    save_backbone,
    steps_of,
    without_timing,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.checkpoint import flatten
from lambda_return_ext.critic.config import LambdaReturnConfig, TrainingConfig, ValueLossConfig, load_config
from lambda_return_ext.critic.data.batches import Packing
from lambda_return_ext.critic.losses import count_terms, value_loss, window_mask
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.training import dry_run as dry_run_module
from lambda_return_ext.critic.training import trainer
from lambda_return_ext.critic.training.dry_run import BASELINE, dry_run
from lambda_return_ext.critic.training.optimization import lam_schedule, lr_schedule
from lambda_return_ext.reference import compute_lambda_return as reference_return

LOSS = "training.value_loss"
PRODUCTION = Path(__file__).parents[3] / "configs/production/critic_mlp.yaml"


# ---- schedules ---------------------------------------------------------------------------------------------------


def test_lambda_is_held_and_then_falls():
    def schedule(kind, **settings):
        config = LambdaReturnConfig(lam=0.8, lam_schedule=kind, lam_hold_steps=4, **settings)
        return [
            lam_schedule(ValueLossConfig(use_lambda_return=True, lambda_return=config), 14)(s) for s in range(1, 15)
        ]

    linear = schedule("linear", lam_decay_steps=5)
    assert linear == pytest.approx([1.0] * 4 + [0.96, 0.92, 0.88, 0.84] + [0.8] * 6)
    assert linear[8:] == [0.8] * 6
    cosine = schedule("cosine")  # to the end of the run
    assert cosine[:4] == [1.0] * 4
    assert cosine[8] == pytest.approx(0.9)
    assert cosine[13] == 0.8
    assert all(a > b for a, b in itertools.pairwise(cosine[3:]))
    assert schedule("constant") == [0.8] * 14
    assert lam_schedule(ValueLossConfig(use_mc_mse=True), 14)(9) == 1.0


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    factor = lr_schedule(TrainingConfig(lr_warmup_steps=4), 12)
    assert [factor(step) for step in range(1, 6)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factor(9) == pytest.approx(0.5)
    assert 0 < factor(12) < factor(11) < factor(10)
    constant = lr_schedule(TrainingConfig(lr_warmup_steps=2, lr_schedule="constant"), 12)
    assert [constant(step) for step in (1, 2, 3, 12)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_follows_its_schedules(train, run_dir, capsys):
    schedule = f"{LOSS}.lambda_return.lam_schedule=linear"
    assert train(schedule, f"{LOSS}.lambda_return.lam_hold_steps=8", "training.lr_warmup_steps=5") == 0
    steps = steps_of(run_dir)
    assert [record["config/lambda"] for record in steps[:9]] == pytest.approx([1.0] * 8 + [0.995])
    assert steps[-1]["config/lambda"] == 0.95
    assert [record["train/lr"] for record in steps[:6]] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    assert train("training.lr_warmup_steps=18", f"run_dir={run_dir}-other") == 2
    assert "training.lr_warmup_steps must be less than the 18 steps of the run, got 18" in capsys.readouterr().err


# ---- losses ------------------------------------------------------------------------------------------------------


def inputs(pairs=3, tokens=9):
    torch.manual_seed(0)
    values = torch.randn(2 * pairs, tokens, requires_grad=True)
    attention_mask = torch.arange(tokens) < torch.randint(4, tokens + 1, (2 * pairs, 1))
    loss_mask = attention_mask & (torch.arange(tokens) > 0) & (torch.arange(tokens) != 2)  # a prompt and a gap
    return values, attention_mask, loss_mask, torch.tensor([1.0, 0.0]).repeat_interleave(pairs)


@pytest.mark.parametrize("error", ["mse", "huber"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_each_recipe_is_its_formula(error, reduction, window, packed):
    values, attention_mask, loss_mask, rewards = inputs()
    config = ValueLossConfig(use_lambda_return=True, error=error, huber_delta=0.4, reduction=reduction)
    targets = reference_return(values.detach(), rewards, loss_mask, 1.0, 0.7)
    where = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    seen = loss_mask if window is None else window_mask(loss_mask, None, where, window)
    errors = (values - targets).abs()
    losses = errors**2 if error == "mse" else torch.where(errors <= 0.4, errors**2 / 2, 0.4 * (errors - 0.2))
    sides = []
    for side in (slice(3), slice(3, None)):
        if reduction == "token":
            sides.append(losses[side][seen[side]].mean())
        else:
            rows = zip(losses[side], seen[side], strict=True)
            sides.append(torch.stack([row[mask].mean() for row, mask in rows]).mean())
    expected = (sides[0] + sides[1]) / 2
    (expected_gradient,) = torch.autograd.grad(expected, values)

    lam = torch.tensor(0.7, dtype=torch.float64)
    if packed:
        lengths = attention_mask.sum(1)
        packing = Packing(nn.functional.pad(lengths.cumsum(0), (1, 0)).int())
        flat = values[attention_mask], torch.ones(int(lengths.sum()), dtype=torch.bool), loss_mask[attention_mask]
        flat_seen = flat[2] if window is None else window_mask(flat[2], packing, where, window)
        assert torch.equal(flat_seen, seen[attention_mask])
        everything = None if window is None else flat[2]
        batch = batch_of(flat[1], flat_seen, rewards, packing, everything)
        loss, _ = value_loss(config, flat[0], batch, None, lam)
        padded = batch_of(attention_mask, seen, rewards)
        assert torch.equal(count_terms(config, batch), count_terms(config, padded))
    else:
        everything = None if window is None else loss_mask
        loss, _ = value_loss(config, values, batch_of(attention_mask, seen, rewards, None, everything), None, lam)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, expected_gradient)


def test_windows_lie_anywhere_within_the_output():
    _, _, mask, _ = inputs(pairs=30)
    torch.manual_seed(1)
    windows = torch.stack([window_mask(mask, None, torch.rand(60, dtype=torch.float64), 3) for _ in range(200)])
    assert torch.equal(windows.any(0), mask)
    assert torch.equal(windows.sum(2), mask.sum(1).clamp(max=3).expand(200, -1))
    for window, row in zip(windows[:, 0], mask[0].expand(200, -1), strict=True):
        assert "".join(str(int(seen)) for seen in window[row]).strip("0") == "111"  # neighbours among output tokens
    assert window_mask(mask, None, torch.rand(60, dtype=torch.float64), 100).equal(mask)


def test_a_run_with_every_recipe_learns_and_repeats_itself(train, run_dir):
    recipe = ["error=huber", "huber_delta=0.5", "reduction=sequence", "output_window=3"]
    settings = [f"{LOSS}.{key}" for key in recipe] + ["training.epochs=12", "training.learning_rate=0.03"]
    assert train(*settings) == 0
    best = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["checkpoints"]["best"]["metrics"]
    assert best["validation/pairwise_accuracy"] >= 0.9
    assert train(*settings, f"run_dir={run_dir}-accumulated", "training.micro_batch_size=2") == 0
    ours, theirs = (steps_of(folder) for folder in (run_dir, Path(f"{run_dir}-accumulated")))
    for one, other in zip(ours[:20], theirs[:20], strict=True):  # the same windows
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)
    assert train(*settings[:-1], "training.learning_rate=0.029", f"run_dir={run_dir}-other") == 0
    assert without_timing(run_dir) != without_timing(Path(f"{run_dir}-other"))


# ---- early stopping ----------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_a_run_that_gets_no_better_stops_early_and_stays_stopped(train, run_dir, monkeypatch, capsys):
    accuracies, real = iter([0.4, 0.6, 0.6, 0.61, 0.5, 0.9]), trainer.measure
    monkeypatch.setattr(
        trainer, "measure", lambda *task: {**real(*task), "validation/pairwise_accuracy": next(accuracies)}
    )
    settings = ["evaluation.every=2", f"{LOSS}.lambda_return.warmup_steps=0", "training.epochs=5"]
    settings += ["training.early_stopping.patience=3", "training.early_stopping.min_delta=0.05"]
    assert train(*settings) == 0
    assert "stopped early: no better validation in 3 turns" in capsys.readouterr().out
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    assert steps_of(run_dir)[-1]["step"] == results["checkpoints"]["last"]["step"] == 10
    assert results["checkpoints"]["best"]["step"] == 8
    before = without_timing(run_dir)
    assert train(*settings, "--resume") == 0
    assert without_timing(run_dir) == before


# ---- dry runs and production -------------------------------------------------------------------------------------


def test_a_dry_run_shows_all_and_writes_nothing(train, tmp_path, capsys):
    before = content(tmp_path)
    assert train("--dry-run", "--ranks", "4", "seed=3") == 0
    out = capsys.readouterr().out
    assert content(tmp_path) == before
    assert not (tmp_path / "run").exists()
    assert "seed: 3" in out
    assert "pairs that could be made" in out
    assert "device memory of each of 4 ranks" in out
    assert "cached features: " in out
    assert train("--dry-run", "data.path=missing.jsonl") == 2
    assert train("--dry-run", "model.backbone=missing") == 2
    assert train("--dry-run", "--ranks", "0") == 2
    assert "--ranks must be at least 1, got 0" in capsys.readouterr().err
    assert train("--dry-run", "--ranks", "2", "training.compile=true") == 2
    assert "training.compile must be false under torchrun, got true with 2 processes" in capsys.readouterr().err


def gpt2(folder):
    """A backbone with a learned embedding of 128 positions, and a tokenizer."""
    save_backbone(folder)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=len(VOCABULARY))
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_dry_run_refuses_what_the_run_refuses(train, write_pairs, tmp_path, monkeypatch, capsys):
    whole = "model.cache_features=false"
    mamba, file = save_backbone(tmp_path / "mamba"), tmp_path / "file"
    make_backbone("Mamba", state_size=4).save_pretrained(mamba)
    file.write_text("", encoding="utf-8")
    wide = ["data.max_length=120", "data.pad_to_multiple_of=200"]
    no_folder = f"run_dir = {file}/a/run must be writable: [Errno 20] Not a directory: '{file}'"
    for arguments, message in (
        ([whole, f"model.backbone={mamba}", "data.packing=true"], "data.packing must be false for this backbone"),
        (
            [f"model.backbone={gpt2(tmp_path / 'gpt2')}", *wide],
            "data.pad_to_multiple_of must keep data.max_length = 120 within the 128 positions of",
        ),
        ([f"run_dir={file}/a/run"], no_folder),
        (
            ["model.from_scratch=true", whole, "model.config_overrides={vocab_size: 20}"],
            "model.backbone must know each token of its tokenizer, got vocab_size = 20 and id 44",
        ),
    ):
        for more in ([], ["--dry-run"]):
            before = content(tmp_path)
            assert train(*arguments, *more) == 2
            assert message in capsys.readouterr().err
            assert content(tmp_path) == before
    assert train("training.max_steps=4") == 0
    assert train("training.max_steps=4", "--resume", "--dry-run") == 0
    write_pairs(make_records(seed=1))
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert train("training.max_steps=4", "--resume", *more) == 2
        assert "its content changed" in capsys.readouterr().err
    (tmp_path / "run" / "data.json").write_text('{"path": "of another version"}', encoding="utf-8")
    assert train("training.max_steps=4", "--resume") == 2
    assert "was made by another one" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    assert train(f"run_dir={tmp_path}/new/run", "--dry-run") == 2
    assert f"must be writable: [Errno 13] Permission denied: '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine without a CUDA device")
def test_a_dry_run_for_a_gpu_needs_none(train, capsys):
    assert train("device=cuda") == 2
    assert train("device=cuda", "--dry-run") == 0
    assert "device: cuda" in capsys.readouterr().out


def test_the_counted_memory_is_what_a_run_holds(train, run_dir, config_file):
    whole = ["model.cache_features=false", "model.backbone_frozen=false", "training.max_steps=4"]
    memory = dry_run(load_config(config_file, whole), 1)
    assert train(*whole) == 0
    tensors, _ = checkpoint.load_tensors(checkpoint.latest_checkpoint(run_dir))
    sizes = {
        part: sum(t.nbytes for name, t in tensors.items() if name.startswith(part) and not name.endswith(".step"))
        for part in ("model.", "optimizer.")
    }
    assert memory["parameters"] == memory["gradients"] == sizes["model."]
    assert memory["AdamW moments"] == sizes["optimizer."]
    sharded = dry_run(load_config(config_file, [*whole, "training.strategy=fsdp", f"run_dir={run_dir}-2"]), 2)
    for name in ("parameters", "gradients", "AdamW moments"):
        assert sharded[name] == pytest.approx(memory[name] / 2, abs=1)
    assert sharded["activations, about"] == pytest.approx(memory["activations, about"] / 2)
    checkpointed = dry_run(
        load_config(config_file, [*whole, "model.gradient_checkpointing=true", f"run_dir={run_dir}-2"]), 1
    )
    assert checkpointed["activations, about"] < memory["activations, about"]


def test_a_dry_run_counts_the_likelihood_baseline_where_it_is_measured(config_file, tiny_backbone, capsys):
    off, on = ["model.layers=1"], ["model.layers=1", "evaluation.baselines=true"]
    scratch = ["model.from_scratch=true", "model.cache_features=false"]
    without, memory = dry_run(load_config(config_file, off), 2), dry_run(load_config(config_file, on), 2)
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in cells if len(row) == 4].count(BASELINE) == 1
    assert memory == {**without, BASELINE: memory[BASELINE]}
    assert BASELINE not in dry_run(load_config(config_file, [*on, *scratch]), 2)
    # Of the whole language model, whatever `model.layers` says, whose logits no length makes more than so many.
    model = Backbone(str(tiny_backbone)).language_model()
    assert memory[BASELINE] > sum(parameter.nbytes for parameter in model.parameters()) > memory["parameters"]


def test_the_logits_of_the_likelihood_baseline_are_bounded_in_the_dry_run_as_in_the_run(config_file, monkeypatch):
    config = load_config(config_file, ["evaluation.baselines=true"])
    sizes = []
    for logits in (1000, 2000, 2**40):
        monkeypatch.setattr(dry_run_module, "LOGITS_AT_ONCE", logits)
        sizes.append(dry_run(config, 1)[BASELINE])
    assert sizes[1] - sizes[0] == 1000 * (4 + 4 + 4)
    assert sizes[2] - sizes[0] == (32 * 64 * len(VOCABULARY) - 1000) * (4 + 4 + 4)  # no more than its tokens have


def test_the_production_configuration_names_and_explains_every_key():
    text = PRODUCTION.read_text(encoding="utf-8")
    config = load_config(PRODUCTION)
    given = flatten(yaml.safe_load(text))
    assert given.keys() | {"model.config_overrides"} == flatten(config.model_dump()).keys() | {"model.config_overrides"}
    bare = [line for line in text.splitlines() if re.fullmatch(r" *\w+: +[^# ][^#]*", line)]
    assert bare == []  # each value has its reason behind it
    assert (config.model.lora.rank, config.training.strategy, config.training.precision) == (32, "fsdp", "bfloat16")
    assert config.training.batch_size % (8 * config.training.micro_batch_size) == 0


def test_the_production_configuration_runs_on_something_small(config_file, tmp_path, capsys):
    tiny = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    small = [f"run_dir={tmp_path}/run", "device=cpu", "threads=1", f"data.path={tiny['data']['path']}"]
    small += [f"model.backbone={tiny['model']['backbone']}", "data.max_length=64", "data.validation_problems=6"]
    small += ["training.lr_warmup_steps=1", f"{LOSS}.lambda_return.warmup_steps=1", "training.batch_size=8"]
    config = load_config(PRODUCTION, [*small, "training.max_steps=4"])
    assert dry_run(config, 8)["parameters"] > 0
    results = trainer.train(config)
    assert results["checkpoints"]["last"]["step"] == 4
