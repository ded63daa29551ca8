"""The whole trainer on a tiny backbone, through the command line."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from critic_testing import WELL_CONDITIONED, assert_alike, content, make_records, records_of, steps_of, without_timing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.config import load_config
from lambda_return_ext.critic.task import total_steps
from lambda_return_ext.critic.training import trainer

LOSS = "training.value_loss"
TO_MONTE_CARLO = [f"{LOSS}.use_lambda_return=false", f"{LOSS}.use_mc_mse=true"]


def checks_of(run_dir):
    return [record for record in records_of(run_dir) if "validation/pairwise_accuracy" in record]


# ---- what a run does ---------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_a_run_learns_and_leaves_everything_behind(train, run_dir, capsys):
    assert train("training.epochs=12", "training.learning_rate=0.03", "evaluation.baselines=true") == 0
    out = capsys.readouterr().out
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    best = results["checkpoints"]["best"]["metrics"]
    assert best["validation/pairwise_accuracy"] >= 0.9
    assert best["validation/margin"] > 0.1
    assert list(results["baselines"])[1] == "likelihood"
    missing = {checkpoint.TRACKING, checkpoint.NONFINITE}
    assert {path.name for path in run_dir.iterdir()} == set(checkpoint.RUN_FILES) - missing
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "pairwise accuracy" in out
    assert "baseline: likelihood" in out
    assert f"run folder: {run_dir}" in out
    assert "\x1b" not in out
    assert "pairs that could be made" in out
    data = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    assert (data["train"]["pairs"], data["validation"]["pairs"], data["dropped"]) == (54, 18, {})


def test_a_run_on_chats_of_a_parquet_file(train, run_dir, tmp_path):
    """Tool outputs between the answers, labelled one by one, through a chat template of one's own."""
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }} <end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    chats = []
    for record in make_records():
        for side in ("chosen", "rejected"):
            roles = {"user": record["prompt"], "assistant": "w1 w2", "tool": "w3 w4 w5"}
            messages = [{"role": role, "content": content} for role, content in roles.items()]
            messages.append({"role": "assistant", "content": record[side]})
            chats.append({"messages": messages, "label": side == "chosen"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "chats.parquet")
    data = [f"data.path={tmp_path / 'chats.parquet'}", f"data.chat_template={tmp_path / 'chat.jinja'}"]
    more = ["data.pairs_per_problem=4", "data.pad_to_multiple_of=8", "training.epochs=8", "training.learning_rate=0.03"]
    assert train(*data, *more) == 0
    summary = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))
    assert (summary["train"]["pairs"], summary["train"]["possible_pairs"]) == (18 * 4, 18 * 9)
    assert max(record["validation/pairwise_accuracy"] for record in checks_of(run_dir)) >= 0.9


def test_every_step_logs_what_the_issue_of_a_run_needs(train, run_dir, capsys):
    assert train() == 0
    steps = steps_of(run_dir)
    assert [record["step"] for record in steps] == list(range(1, 19))
    assert [record["train/warmup_active"] for record in steps] == [1] * 3 + [0] * 15
    for record in steps:
        assert record["config/gamma"] == 1.0
        assert record["config/lambda"] == 0.95
        assert record["train/loss"] == record["value/lambda_loss"] > 0
        assert record["train/grad_norm"] > 0
        assert record["train/tokens_per_second"] > 0
    assert steps[0]["train/loss"] == 0.25  # the first prediction is 0.5 and each side's reward is 1 or 0
    assert steps[0]["train/lr"] == 0.01 > steps[9]["train/lr"] > steps[-1]["train/lr"] > 0
    checks = checks_of(run_dir)
    assert [record["step"] for record in checks] == [3, 5, 10, 15, 18]  # 3 is the end of the warm-up
    for record in checks:
        for part in ("validation", "train_subset"):
            for name in ("pairwise_accuracy", "last_token_accuracy", "mean_right", "mean_wrong", "margin"):
                assert f"{part}/{name}" in record
            for name in ("brier", "calibration_error", "explained_variance", "td_spikiness_wrong", "length_accuracy"):
                assert f"{part}/{name}" in record
            assert record[f"{part}/token_variance_right"] >= 0
            assert record[f"{part}/token_variance_wrong"] >= 0
        gap = record["train_subset/pairwise_accuracy"] - record["validation/pairwise_accuracy"]
        assert record["validation/gap"] == gap
    tensorboard = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert len(tensorboard.Scalars("value/lambda_loss")) == 18
    assert "validation/pairwise_accuracy" in tensorboard.Tags()["scalars"]
    assert "validation/brier" in tensorboard.Tags()["scalars"]


@pytest.mark.draws
def test_roll_back_to_monte_carlo_is_two_keys(train, run_dir):
    assert train(*TO_MONTE_CARLO) == 0
    for record in steps_of(run_dir):
        assert record["value/mc_loss"] == record["train/loss"]
        assert "value/lambda_loss" not in record
        assert (record["config/gamma"], record["config/lambda"]) == (1.0, 1.0)
        assert record["train/warmup_active"] == 0
    equal = "training.value_loss.lambda_return"
    assert train(f"run_dir={run_dir}-lam1", f"{equal}.lam=1.0", f"{equal}.warmup_steps=0") == 0
    losses = [[record["train/loss"] for record in steps_of(d)] for d in (run_dir, Path(f"{run_dir}-lam1"))]
    assert losses[0] == losses[1]


@pytest.mark.draws
def test_pairwise_alone_trains(train, run_dir):
    assert train(f"{LOSS}.use_lambda_return=false", f"{LOSS}.use_pairwise=true", "training.epochs=6") == 0
    steps = steps_of(run_dir)
    assert steps[-1]["value/pairwise_loss"] < 0.5 * steps[0]["value/pairwise_loss"]


def test_cached_features_train_like_the_whole_forward(train, run_dir):
    assert train(WELL_CONDITIONED) == 0
    assert train(WELL_CONDITIONED, f"run_dir={run_dir}-whole", "model.cache_features=false") == 0
    assert_alike(run_dir, Path(f"{run_dir}-whole"))


@pytest.mark.parametrize("cached", [True, False])
def test_packed_batches_train_like_padded_ones(train, run_dir, cached):
    settings = [WELL_CONDITIONED, "model.cache_features=" + str(cached).lower(), "data.pad_to_multiple_of=4"]
    assert train(*settings) == 0
    assert train(*settings, f"run_dir={run_dir}-packed", "data.packing=true") == 0
    assert_alike(run_dir, Path(f"{run_dir}-packed"))


def test_the_same_seed_gives_the_same_run_and_another_another(train, run_dir):
    assert train() == 0
    assert train(f"run_dir={run_dir}-again") == 0
    assert train(f"run_dir={run_dir}-other", "seed=1") == 0
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-again"))
    assert without_timing(run_dir) != without_timing(Path(f"{run_dir}-other"))


def test_a_backbone_that_trains_is_saved_and_evaluated(train, run_dir, capsys):
    assert train("model.backbone_frozen=false", "model.cache_features=false", "training.learning_rate=1e-3") == 0
    saved, _ = checkpoint.load_tensors(run_dir / "best.safetensors")
    assert any(name.startswith("backbone.layers.0.") for name in saved)
    best = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["checkpoints"]["best"]
    assert trainer.evaluate(str(run_dir))["checkpoints"]["best"] == best


@pytest.mark.draws
def test_max_steps_ends_a_run_within_an_epoch(train, run_dir):
    assert train("training.max_steps=5") == 0
    assert steps_of(run_dir)[-1]["step"] == 5
    assert checks_of(run_dir)[-1]["step"] == 5


# ---- evaluate ----------------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_best_checkpoint_and_writes_nothing(train, run_dir, capsys):
    assert train("evaluation.baselines=true") == 0
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    before = content(run_dir)
    capsys.readouterr()
    assert main(["evaluate", str(run_dir)]) == 0
    out = capsys.readouterr().out
    best = results["checkpoints"]["best"]["metrics"]
    assert f"{best['validation/pairwise_accuracy']:.4f}" in out
    assert content(run_dir) == before
    again = trainer.evaluate(str(run_dir))
    assert again["baselines"] == results["baselines"]
    for name, value in best.items():
        if "reliability" in name or "calibration" in name:  # rounding may move a value to the next bin
            continue
        assert again["checkpoints"]["best"]["metrics"][name] == pytest.approx(value, abs=1e-6), name


def test_evaluate_refuses_what_is_no_run_and_a_damaged_checkpoint(train, run_dir, capsys):
    assert main(["evaluate", str(run_dir)]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
    assert train("training.max_steps=4") == 0
    (run_dir / "best.safetensors").write_bytes(b"damaged")
    assert main(["evaluate", str(run_dir)]) == 2
    assert "must be a checkpoint of this trainer" in capsys.readouterr().err


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.batchsize=3"],
            "unknown config key 'training.batchsize'; the nearest valid key is 'training.batch_size'",
        ),
        (["training.epochs=none"], "training.epochs must be a valid integer, got 'none'"),
        ([f"{LOSS}.lambda_return.lam=2"], "lam must be less than or equal to 1, got 2"),
        ([f"{LOSS}.use_mc_mse=true"], f"{LOSS}.use_mc_mse and {LOSS}.use_lambda_return must not both be true"),
        ([f"{LOSS}.use_lambda_return=false"], "there is nothing to train"),
        ([f"{LOSS}.lambda_return.warmup_steps=18"], "warmup_steps must be less than the 18 steps of the run, got 18"),
        (["training.max_steps=3"], "warmup_steps must be less than the 3 steps of the run, got 3"),
        (["data.path=missing.jsonl"], "data.path must be a readable JSONL file, got 'missing.jsonl'"),
        (["data.max_length=3"], "dropped 72 pairs whose prompt alone fills data.max_length"),
        (["data.validation_problems=24"], "must be at most the number of problems"),
        (["model.backbone=missing"], "model.backbone must be a folder"),
        (["model.layers=9"], "model.layers must be at most 2"),
        pytest.param(
            ["device=cuda"],
            "device must be auto or cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_mistake_ends_with_2_before_anything_is_written(train, tmp_path, capsys, overrides, message):
    before = content(tmp_path)
    assert train(*overrides) == 2
    assert message in capsys.readouterr().err
    assert content(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", ":73: a line must be one JSON object"),
        (
            json.dumps({"problem_id": "p", "prompt": "w1", "chosen": "", "rejected": "w2"}),
            ":73: 'chosen' must not be empty",
        ),
    ],
)
def test_a_bad_line_ends_with_2_before_anything_is_written(train, tmp_path, write_pairs, capsys, line, message):
    path = write_pairs([*make_records(), line], "bad.jsonl")
    assert train(f"data.path={path}") == 2
    assert f"{path}{message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_before_and_behind_flags(train, run_dir, capsys):
    assert train("training.max_steps=4", "--resume", "seed=3") == 0
    saved = load_config(run_dir / "config.yaml")
    assert (saved.training.max_steps, saved.seed) == (4, 3)
    for wrong in ("--resumed", "-x"):
        with pytest.raises(SystemExit, match="2"):
            train("seed=3", wrong, "seed=4")
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(run_dir), "seed=4"])
    assert "unrecognized arguments: seed=4" in capsys.readouterr().err


def test_a_run_is_never_overwritten_unasked(train, run_dir, capsys):
    assert train("training.max_steps=4") == 0
    (run_dir / "notes.txt").write_text("mine", encoding="utf-8")
    before = content(run_dir)
    assert train("training.max_steps=4") == 2
    assert "is not empty: give --resume to go on, --overwrite to start again" in capsys.readouterr().err
    assert content(run_dir) == before
    assert train("training.max_steps=5", "--overwrite") == 0
    assert len(steps_of(run_dir)) == 5
    assert (run_dir / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_folder_that_is_no_run_is_left_alone(train, run_dir, capsys, flag):
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("something else", encoding="utf-8")
    before = content(run_dir)
    assert train(flag) == 2
    assert "so it is no run" in capsys.readouterr().err
    assert content(run_dir) == before


def test_a_run_goes_on_where_its_folder_was_moved_to(train, run_dir, capsys):
    assert train("training.max_steps=4") == 0
    moved = run_dir.rename(run_dir.with_name("moved"))
    assert train("training.max_steps=4", f"run_dir={moved.parent}/./moved", "--resume") == 0
    assert "resumed after step 4" in capsys.readouterr().out


def test_a_run_without_a_validation_is_said_to_have_none(train, run_dir, write_pairs, capsys):
    assert train("training.max_steps=4") == 0
    (run_dir / "best.safetensors").unlink()
    capsys.readouterr()
    scored = write_pairs(make_records(2), "some.jsonl")
    score = ["score", str(scored), "--output", str(scored.with_name("scores.jsonl")), "--run"]
    for command in (["evaluate"], ["inspect"], score):
        assert main([*command, str(run_dir)]) == 2
        assert f"RUN must have had a validation, which saves its best.safetensors, got '{run_dir}'" in (
            capsys.readouterr().err
        )


def test_resume_refuses_another_configuration_or_other_data(train, run_dir, config_file, capsys):
    assert train("training.max_steps=4") == 0
    before = content(run_dir)
    assert train("training.max_steps=5", "seed=1", "--resume") == 2
    error = capsys.readouterr().err
    assert "training.max_steps was 4 and is now 5" in error
    assert "seed was 0 and is now 1" in error
    data = Path(load_config(config_file).data.path)
    data.write_text(data.read_text(encoding="utf-8").replace("w1", "w2"), encoding="utf-8")
    assert train("training.max_steps=4", "--resume") == 2
    assert "is not the file that the run" in capsys.readouterr().err
    assert content(run_dir) == before


# ---- compile -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("cached", "packed"), [(True, False), (False, False), (True, True)])
def test_compiled_training_equals_eager_and_never_recompiles(train, run_dir, monkeypatch, cached, packed):
    settings = [WELL_CONDITIONED, f"model.cache_features={cached}".lower(), f"data.packing={packed}".lower()]
    settings += [f"{LOSS}.lambda_return.lam_schedule=cosine", f"{LOSS}.lambda_return.lam_hold_steps=4"]
    assert train(*settings, f"run_dir={run_dir}-eager") == 0
    if not cached:  # the whole transformer is in one graph too; inductor would take a minute over it
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train(*settings, "training.compile=true") == 0
    assert [record["train/warmup_active"] for record in steps_of(run_dir)] == [1] * 3 + [0] * 15
    assert len({record["config/lambda"] for record in steps_of(run_dir)}) == 15  # held, then another at each step
    assert_alike(run_dir, Path(f"{run_dir}-eager"))


# ---- the command -------------------------------------------------------------------------------------------------


def test_help_needs_no_trainer_package():
    code = (
        "import sys\nfrom lambda_return_ext.critic.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'transformers', 'pydantic', 'omegaconf', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_missing_package_is_one_sentence_with_the_cure(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    for module in ("config", "training.trainer"):
        monkeypatch.delitem(sys.modules, f"lambda_return_ext.critic.{module}")
    assert train() == 2
    error = capsys.readouterr().err
    assert "needs the Python package 'omegaconf': pip install 'lambda-return-ext[critic]'" in error
    assert error.count("\n") == 1


def test_the_local_configuration_is_valid_and_warms_up_for_at_most_a_fifth():
    path = Path(__file__).parents[3] / "configs/local/critic_local.yaml"
    config = load_config(path)
    training = config.training
    pairs = config.data.train_problems * config.data.pairs_per_problem
    fewest_steps = total_steps(training, int(0.9 * pairs))  # not every problem has as many pairs as allowed
    assert 0 < training.value_loss.warmup_steps <= 0.2 * fewest_steps
    assert training.value_loss.use_lambda_return
    assert config.data.validation_problems >= 50
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert known["data"]["path"] == "data/codeio.jsonl"
