"""Kills, signals, full disks and infinite losses: what a run keeps, and that it goes on as if nothing had happened."""

import ctypes
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from critic_testing import content, disk_that_fills, records_of, save_backbone, steps_of, without_timing
from torch.optim.optimizer import register_optimizer_step_post_hook

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.evaluation import metrics, validation
from lambda_return_ext.critic.training import trainer


@pytest.fixture
def at_step(monkeypatch):
    """Call a function with the loss of one step, eager and without accumulation, and go on with what it returns."""

    def install(step, act):
        real, calls = trainer.value_loss, []

        def value_loss(*arguments):
            loss, terms = real(*arguments)
            calls.append(loss)
            return (act(loss) if len(calls) == step else loss), terms

        monkeypatch.setattr(trainer, "value_loss", value_loss)

    return install


def assert_same_tensors(ours, theirs):
    ours, theirs = checkpoint.load_tensors(ours)[0], checkpoint.load_tensors(theirs)[0]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# ---- kill and resume ---------------------------------------------------------------------------------------------


# The command, in a process that kills itself out of another thread as soon as so many records are written: however busy
# the machine is, the run gets no further than a few steps meanwhile.
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path

def kill(metrics, records):
    while not metrics.exists() or metrics.read_bytes().count(b"\\n") < records:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, args=(Path(sys.argv[1]), int(sys.argv[2])), daemon=True).start()
from lambda_return_ext.critic.cli import main
main(sys.argv[3:])
"""


def test_a_run_killed_at_random_steps_resumes_and_loses_nothing(train, run_dir, config_file, tmp_path):
    backbone = save_backbone(tmp_path / "with_dropout", attention_dropout=0.2)  # so that random state matters
    settings = ["training.epochs=30", "evaluation.every=50", "training.learning_rate=1e-3"]
    settings += ["model.backbone_frozen=false", "model.cache_features=false", f"model.backbone={backbone}"]
    assert train(*settings, f"run_dir={run_dir}-whole") == 0
    done = 0
    for _ in range(2):
        done += random.randint(10, 120)
        command = [sys.executable, "-c", KILLED, str(run_dir / "metrics.jsonl"), str(done)]
        command += ["train", "--config", str(config_file), *settings, "--resume"]
        process = subprocess.run(command, stdout=subprocess.DEVNULL)
        assert process.returncode == -signal.SIGKILL
        assert steps_of(run_dir)[-1]["step"] < 270
        done = steps_of(run_dir)[-1]["step"]
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 271, "train/lo')
    assert train(*settings, "--resume") == 0
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-whole"))
    for name in ("best.safetensors", "checkpoints/step-00000270.safetensors"):
        assert_same_tensors(run_dir / name, Path(f"{run_dir}-whole") / name)


def test_resume_starts_anew_where_nothing_is_and_repeats_the_report_of_a_whole_run(train, run_dir, capsys):
    assert train("--resume", "training.max_steps=4") == 0
    before = without_timing(run_dir)
    capsys.readouterr()
    assert train("--resume", "training.max_steps=4") == 0
    assert "resumed after step 4" in capsys.readouterr().out
    assert without_timing(run_dir) == before


@pytest.mark.parametrize(
    ("limit", "steps"), [("1", [18]), ("3", [15, 16, 18]), ("null", [3, 4, 5, 8, 10, 12, 15, 16, 18])]
)
def test_the_newest_checkpoints_are_kept(train, run_dir, limit, steps):
    assert train(f"training.save_total_limit={limit}") == 0
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}.safetensors" for step in steps]


def test_what_changes_no_number_may_change_when_a_run_goes_on(train, run_dir):
    assert train("training.max_steps=5") == 0
    assert train("training.max_steps=5", "training.save_every=2", "training.save_total_limit=2", "--resume") == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(train, run_dir, capsys):
    assert train("training.save_total_limit=2") == 0
    before = without_timing(run_dir)
    newest = run_dir / "checkpoints/step-00000018.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train("training.save_total_limit=2", "--resume") == 2
    assert f"{newest} must be a checkpoint of this trainer" in capsys.readouterr().err
    newest.unlink()
    assert train("training.save_total_limit=2", "--resume") == 0
    assert "resumed after step 16" in capsys.readouterr().out
    assert without_timing(run_dir) == before


def test_a_baseline_that_fails_loses_no_result(train, run_dir, monkeypatch):
    def fail(*_):
        raise MemoryError("the language model is too large")

    whole = [f"run_dir={run_dir}-whole", "evaluation.baselines=false"]
    assert train(*whole) == 0
    monkeypatch.setattr(validation, "likelihood_baseline", fail)
    with pytest.raises(MemoryError):
        train("evaluation.baselines=true")
    results, expected = (
        json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        for folder in (run_dir, f"{run_dir}-whole")
    )
    assert results["baselines"] == {}
    assert results["checkpoints"] == expected["checkpoints"]
    assert train("--resume", "evaluation.baselines=false") == 0
    assert (run_dir / "curves.png").exists()


# ---- signals -----------------------------------------------------------------------------------------------------


def test_a_signal_in_a_validation_does_not_wait_for_its_end(train, run_dir, monkeypatch):
    assert train(f"run_dir={run_dir}-whole") == 0
    real, calls = metrics.measure_batch, []

    def measure_batch(*arguments):
        calls.append(steps_of(run_dir)[-1]["step"])
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(metrics, "measure_batch", measure_batch)
    assert train("evaluation.batch_size=2") == 143
    assert len(calls) == 7
    monkeypatch.undo()
    kept = run_dir / f"checkpoints/step-{calls[-1]:08d}.safetensors"
    assert [*(run_dir / "checkpoints").iterdir()] == [kept]
    assert train("evaluation.batch_size=2", "--resume") == 0
    found, expected = without_timing(run_dir), without_timing(Path(f"{run_dir}-whole"))
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    assert found[: calls[-1]] == expected[: calls[-1]]
    assert_same_tensors(
        run_dir / "checkpoints/step-00000018.safetensors",
        Path(f"{run_dir}-whole") / "checkpoints/step-00000018.safetensors",
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_the_run_goes_on_from_there(
    train, run_dir, at_step, monkeypatch, capsys, number, code
):
    assert train(f"run_dir={run_dir}-whole") == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(loss):
        signal.raise_signal(number)
        return loss

    at_step(7, interrupt)
    assert train() == code
    assert f"stopped by {number.name} after step 7, which is saved: --resume" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000007.safetensors"]
    monkeypatch.undo()
    assert train("--resume") == 0
    assert "resumed after step 7" in capsys.readouterr().out
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-whole"))


def test_a_second_signal_does_not_wait(train, run_dir, at_step, capsys):
    def insist(loss):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss

    at_step(7, insist)
    assert train() == 130
    assert "interrupted; --resume goes on from the last checkpoint" in capsys.readouterr().err
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000005.safetensors"]


# ---- writes that fail --------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail():
        with files.atomic_path(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert content(tmp_path) == {path: b"old"}


@pytest.mark.parametrize("room", [50_000, 2_500], ids=["for the logs but no checkpoint", "not even for the logs"])
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_intact(
    train, run_dir, at_step, monkeypatch, capsys, room
):
    settings = ["model.head.hidden_size=512"]
    assert train(*settings, f"run_dir={run_dir}-whole") == 0

    with disk_that_fills() as leave_room:

        def fill_disk(loss):
            leave_room(room)
            return loss

        at_step(6, fill_disk)
        assert train(*settings) == 2
    monkeypatch.undo()
    kept = run_dir / "checkpoints/step-00000005.safetensors"
    error = capsys.readouterr().err
    assert f"run_dir = {run_dir} must be writable and have room, got: " in error
    assert f"; {kept} is intact, and --resume goes on from it" in error
    assert error.count("\n") == 1
    assert [*(run_dir / "checkpoints").iterdir()] == [kept]
    assert train(*settings, "--resume") == 0
    assert "resumed after step 5" in capsys.readouterr().out
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-whole"))


def test_a_disk_that_is_full_at_the_end_costs_the_report_alone(train, run_dir, monkeypatch, capsys):
    real = trainer.results_of
    with disk_that_fills() as leave_room:

        def fill_disk(*arguments):
            results = real(*arguments)
            leave_room(500)
            return results

        monkeypatch.setattr(trainer, "results_of", fill_disk)
        assert train() == 2
    error = capsys.readouterr().err
    assert f"run_dir = {run_dir} must be writable and have room, got: " in error
    assert f"{run_dir / 'checkpoints/step-00000018.safetensors'} is intact" in error
    assert error.count("\n") == 1
    assert not (run_dir / "results.json").exists()
    monkeypatch.undo()
    assert train("--resume") == 0
    assert (run_dir / "results.json").exists()


@pytest.fixture
def like_any_user():
    """Without the privilege, where this process has it, of writing into folders that are read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, before) == libc.capget(header, fewer) == 0
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of the effective ones alone
    assert libc.capset(header, fewer) == 0
    yield
    assert libc.capset(header, before) == 0


def test_a_folder_that_becomes_read_only_is_one_sentence_and_the_last_checkpoint_is_intact(
    train, run_dir, at_step, like_any_user, monkeypatch, capsys
):
    assert train(f"run_dir={run_dir}-whole") == 0
    checkpoints = run_dir / "checkpoints"

    def close_folder(loss):
        checkpoints.chmod(0o555)
        return loss

    at_step(6, close_folder)
    assert train() == 2
    checkpoints.chmod(0o755)
    monkeypatch.undo()
    error = capsys.readouterr().err
    kept = checkpoints / "step-00000005.safetensors"
    assert f"run_dir = {run_dir} must be writable and have room, got: " in error
    assert "ermission denied" in error
    assert f"; {kept} is intact, and --resume goes on from it" in error
    assert error.count("\n") == 1
    assert [*checkpoints.iterdir()] == [kept]
    assert train("--resume") == 0
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-whole"))


def test_a_read_only_folder_gets_no_run(train, tmp_path, like_any_user, capsys):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    assert train(f"run_dir={closed}/run") == 2
    assert f"run_dir = {closed}/run must be writable: [Errno 13] Permission denied" in capsys.readouterr().err
    assert not [*closed.iterdir()]


def test_a_run_folder_that_cannot_be_made(train, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert train(f"run_dir={tmp_path}/file/run") == 2
    assert "must be writable" in capsys.readouterr().err


# ---- losses that are not finite ----------------------------------------------------------------------------------


def pairs_of_step(run_dir, step):
    (record,) = map(json.loads, (run_dir / "nonfinite.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["step"] == step
    return record


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_pairs(
    train, run_dir, at_step, monkeypatch, capsys, factor
):
    assert train(f"run_dir={run_dir}-whole") == 0
    at_step(6, lambda loss: loss * factor)
    assert train() == 1
    error = capsys.readouterr().err
    assert f"not finite at step 6: loss {factor}" in error
    assert f"its pairs are in {run_dir / 'nonfinite.jsonl'}; all before it is saved, and --resume" in error
    record = pairs_of_step(run_dir, 6)
    assert len(record["pairs"]) == 6
    for pair in record["pairs"]:
        assert pair["problem"].startswith("p")
        assert pair["right"]["output_ids"] != pair["wrong"]["output_ids"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000005.safetensors"]
    monkeypatch.undo()
    assert train("--resume") == 0
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-whole"))


def test_all_before_a_step_that_is_not_finite_is_saved(train, run_dir, at_step, monkeypatch):
    at_step(4, lambda loss: loss * float("nan"))
    assert train("training.save_every=100", "evaluation.every=100") == 1
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    monkeypatch.undo()
    assert train("training.save_every=100", "evaluation.every=100", "training.nonfinite=skip", "--resume") == 0
    assert [record["step"] for record in steps_of(run_dir)] == list(range(1, 19))


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_weights_that_are_not_finite_stop_the_run_and_are_never_saved(train, run_dir, monkeypatch, capsys, how):
    def spoil(optimizer, *_):
        if len(steps_of(run_dir)) == 6:  # the seventh step breaks them
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    handle = register_optimizer_step_post_hook(spoil)
    assert train(f"training.nonfinite={how}") == 1
    handle.remove()
    error = capsys.readouterr().err
    assert "weights are not finite after step " in error
    assert "so they were not saved: --resume goes on from the last checkpoint" in error
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000005.safetensors"]
    assert train("--resume") == 0
    assert [record["step"] for record in steps_of(run_dir)] == list(range(1, 19))


def test_a_value_that_is_not_finite_ends_a_validation_in_a_sentence(train, monkeypatch, capsys):
    real = metrics.measure_batch

    def measure_batch(values, *arguments):
        return real(values.masked_fill(torch.ones_like(values, dtype=torch.bool), torch.inf), *arguments)

    monkeypatch.setattr(metrics, "measure_batch", measure_batch)
    assert train() == 1
    assert "values must be finite, got others for 18 of 18 pairs that were measured" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_stops_the_run(train, run_dir, at_step, capsys):
    def spoil_gradient(loss):
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    at_step(2, spoil_gradient)
    assert train() == 1
    assert "gradient norm nan" in capsys.readouterr().err


def test_a_batch_that_is_not_finite_is_left_out_where_that_is_asked_for(train, run_dir, at_step, capsys):
    weights = []

    def watch(optimizer, *_):
        weights.append([parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]])

    handle = register_optimizer_step_post_hook(watch)
    at_step(6, lambda loss: loss * float("nan"))
    assert train("training.nonfinite=skip") == 0
    handle.remove()
    assert "not finite at step 6" in capsys.readouterr().out
    steps = steps_of(run_dir)
    assert [record["train/skipped_steps"] for record in steps] == [0] * 5 + [1] * 13
    assert "train/loss" not in steps[5]
    assert steps[5].keys() > {"train/lr", "train/epoch"}
    assert len(weights) == 17
    assert all(torch.isfinite(tensor).all() for step in weights for tensor in step)
    assert pairs_of_step(run_dir, 6)["pairs"]
    assert all(json.dumps(record, allow_nan=False) for record in records_of(run_dir))
