"""A run on rollouts: resumed, compiled, over ranks, with warm-up and windows; what it leaves, and what looks at it."""

import functools
import json
from pathlib import Path

import pytest
import torch
from critic_testing import assert_alike, finish, make_records, records_of, steps_of, torchrun, without_timing

from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.training import trainer


@pytest.fixture
def settings(write_pairs):
    rows = [
        {"problem_id": row["problem_id"], "prompt": row["prompt"], "completion": row[side], "reward": reward}
        for row in make_records()
        for side, reward in (("chosen", 1.0), ("rejected", 0.0))
    ]
    path = write_pairs(rows, "rollouts.jsonl")
    bias = "training.value_loss.lambda_return.bias_init=mean"
    return [f"data.path={path}", "data.sampling=rollouts", "model.value_position=both", "training.max_steps=12", bias]


def test_a_killed_run_goes_on_bit_for_bit(train, run_dir, settings, monkeypatch):
    assert train(*settings, f"run_dir={run_dir}-whole") == 0
    real, calls = trainer.value_loss, []

    def value_loss(*arguments):
        calls.append(1)
        if len(calls) > 7:
            raise MemoryError("killed")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "value_loss", value_loss)
        with pytest.raises(MemoryError):
            train(*settings)
    assert len(steps_of(run_dir)) == 7
    assert train(*settings, "--resume") == 0
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-whole"))


def test_two_ranks_train_like_one(train, run_dir, config_file, settings):
    settings = [*settings, "training.value_loss.balance=true", "training.value_loss.output_window=3"]
    assert train(*settings) == 0
    command = ["-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file), *settings]
    code, said = finish(torchrun(*command, f"run_dir={run_dir}-two", "training.micro_batch_size=2"))
    assert code == 0, said
    assert_alike(run_dir, Path(f"{run_dir}-two"))


def test_a_compiled_run_is_the_eager_one(train, run_dir, settings, monkeypatch):
    assert train(*settings, f"run_dir={run_dir}-eager") == 0
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert train(*settings, "training.compile=true") == 0
    assert_alike(run_dir, Path(f"{run_dir}-eager"))


@pytest.mark.parametrize("position", ["after", "before", "both"])
def test_warm_up_and_windows_see_as_many_values_as_they_say(train, run_dir, settings, monkeypatch, position):
    real, seen = trainer.value_loss, []

    def value_loss(config, values, batch, *rest):
        seen.append((batch.loss_mask.sum(1).tolist(), batch.loss_mask, batch.output_mask))
        return real(config, values, batch, *rest)

    monkeypatch.setattr(trainer, "value_loss", value_loss)
    assert train(*settings, f"model.value_position={position}", "training.value_loss.output_window=2") == 0
    assert all(count == 1 for counts, _, _ in seen[:3] for count in counts)  # three steps of warm-up: the last value
    assert all(count == 2 for counts, _, _ in seen[3:] for count in counts)
    for _, mask, everything in seen[3:]:
        assert (everything.sum(1) > 2).all()
        assert (mask & everything).equal(mask)


def test_the_best_checkpoint_and_early_stopping_follow_the_explained_variance(train, run_dir, settings, monkeypatch):
    real, told = trainer.measure, iter([-0.4, 0.1, 0.3, 0.3, 0.2])

    def measure(*arguments):
        return {**real(*arguments), "validation/explained_variance": next(told)}

    monkeypatch.setattr(trainer, "measure", measure)
    more = ["evaluation.every=2", "training.max_steps=100", "training.epochs=10", "training.early_stopping.patience=2"]
    assert train(*settings, *more) == 0
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    checked = [record["step"] for record in records_of(run_dir) if "validation/loss" in record]
    assert len(checked) == 5
    best = results["checkpoints"]["best"]
    assert best["metrics"]["validation/explained_variance"] == 0.3
    assert best["step"] in checked[2:4]


def test_a_batch_that_is_not_finite_is_kept_with_its_rewards(train, run_dir, settings, monkeypatch, capsys):
    real, calls = trainer.value_loss, []

    def value_loss(config, values, batch, *rest):
        calls.append(1)
        loss, terms = real(config, values, batch, *rest)
        return (loss * float("nan"), terms) if len(calls) == 2 else (loss, terms)

    monkeypatch.setattr(trainer, "value_loss", value_loss)
    assert train(*settings, "training.nonfinite=skip") == 0
    (record,) = [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text(encoding="utf-8").splitlines()]
    assert record["step"] == 2
    assert len(record["rollouts"]) == 6
    assert {item["rollout"]["reward"] for item in record["rollouts"]} <= {0.0, 1.0}
    assert "its rollouts are in" in capsys.readouterr().out


def test_what_looks_at_a_run_takes_one_of_rollouts(train, run_dir, settings, tmp_path, capsys, write_pairs):
    assert train(*settings, "--dry-run") == 0
    assert not run_dir.exists()
    assert train(*settings) == 0
    assert train(*settings, f"run_dir={run_dir}-mc", "training.value_loss.lambda_return.lam=1.0") == 0
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert main(["evaluate", str(run_dir)]) == 0
    out = capsys.readouterr().out
    best = results["checkpoints"]["best"]["metrics"]
    assert f"{best['validation/explained_variance']:.4g}" in out
    assert "rollouts of 6 problems never trained on" in out
    assert main(["compare", str(run_dir), f"{run_dir}-mc", "--output", str(tmp_path / "compare.png")]) == 0
    out = capsys.readouterr().out
    assert "explained variance, last checkpoint" in out
    assert "training.value_loss.lambda_return.lam" in out
    turns = {"prompt_ids": [5, 6], "completion_ids": [7, 1, 8, 1], "completion_mask": [1, 1, 0, 1], "reward": 2}
    path = write_pairs([{**turns, "turn_rewards": [0.5, 0.25]}], "turns.jsonl")
    assert main(["score", str(path), "--run", str(run_dir), "--output", str(tmp_path / "scores.jsonl")]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    v, after = record["values"], record["values_after"]
    assert record["mask"] == [True, True, False, True]
    assert v[1] == pytest.approx(after[0], abs=1e-6)  # what is said before a token is what was said after the last one
    assert v[2] == after[2] == 0
    # One-step errors: each turn's reward comes with the value after its last token, the terminal one at the very end.
    assert record["td_errors"][0] == pytest.approx(after[0] - v[0], abs=1e-5)
    assert record["td_errors"][1] == pytest.approx(after[1] - v[1], abs=1e-5)
    assert record["td_errors"][3] == pytest.approx(after[3] - v[3], abs=1e-5)
