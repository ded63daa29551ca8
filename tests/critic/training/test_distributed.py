"""Two processes over gloo: the very path of many GPUs, held against one process."""

import json
import math
import signal
from pathlib import Path

import pytest
import rank_testing
import torch
import yaml
from critic_testing import (
    MIXTURE,
    WELL_CONDITIONED,
    assert_alike,
    finish,
    make_backbone,
    make_records,
    records_of,
    save_backbone,
    steps_of,
    tiny_config,
    torchrun,
    without_timing,
)
from safetensors.torch import load_file

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import load_config
from lambda_return_ext.critic.ranks import Ranks
from lambda_return_ext.critic.task import prepare
from lambda_return_ext.critic.training import trainer

WHOLE = ["model.cache_features=false", "model.backbone_frozen=false", "training.learning_rate=1e-3", WELL_CONDITIONED]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 5])
@pytest.mark.parametrize("pairs", [1, 2, 7, 16])
def test_the_ranks_share_a_batch_in_equally_many_parts(size, micro_batch_size, pairs):
    device = torch.device("cpu")
    shares = [Ranks(rank, size, device).micro_batches(range(pairs), micro_batch_size) for rank in range(size)]
    assert sorted(item for parts in shares for part in parts for item in part) == [*range(pairs)]
    assert len({len(parts) for parts in shares}) == 1
    assert all(len(part) <= (micro_batch_size or pairs) for parts in shares for part in parts)
    largest = math.ceil(pairs / size)
    assert len(shares[0]) == (1 if micro_batch_size is None else math.ceil(largest / micro_batch_size))


# ---- the same loss and gradients ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recurrent_backbone(tmp_path_factory):
    """A backbone that does not keep packed sequences apart."""
    folder = save_backbone(tmp_path_factory.mktemp("recurrent"))  # for its tokenizer
    make_backbone("Qwen3Next", **MIXTURE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_step(tmp_path_factory, tiny_backbone, recurrent_backbone):
    """The loss and gradients of the same batches in one process, and in two."""
    folder = tmp_path_factory.mktemp("one_step")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in make_records()), encoding="utf-8")
    config = folder / "config.yaml"
    settings = tiny_config(folder / "run", data, tiny_backbone)
    settings["training"]["value_loss"]["lambda_return"] = {"bias_init": None}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    results = []
    for ranks in (2, 1):
        output = folder / f"{ranks}.safetensors"
        arguments = [str(config), str(recurrent_backbone), str(output)]
        if ranks == 1:
            rank_testing.main(*arguments)
        else:
            process = torchrun(rank_testing.__file__, *arguments, ranks=ranks)
            code, said = finish(process)
            assert code == 0, said
        measured = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
        results.append((load_file(output), measured))
    return results[::-1]


@pytest.mark.parametrize("size", rank_testing.SIZES)
@pytest.mark.parametrize("loss", rank_testing.LOSSES)
@pytest.mark.parametrize("strategy", rank_testing.STRATEGIES)
def test_any_number_of_ranks_and_micro_batches_gives_the_same_loss_and_gradients(one_step, strategy, loss, size):
    (alone, _), (together, _) = one_step
    whole = {"8": "8", "8 by 2": "8"}.get(size, size)
    names = [name.split("/")[-1] for name in together if name.startswith(f"{strategy}/{loss}/{size}/")]
    pairs = {
        name: (together[f"{strategy}/{loss}/{size}/{name}"], alone[f"ddp/{loss}/{whole}/{name}"]) for name in names
    }
    assert len(pairs) > 20
    # The last bias has no gradient under the pairwise loss, but for rounding of what cancels.
    largest = max(expected.abs().max().item() for name, (_, expected) in pairs.items() if name != "tokens")
    assert largest > 0.01
    for name, (got, expected) in pairs.items():
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("size", rank_testing.SIZES)
@pytest.mark.parametrize("strategy", rank_testing.STRATEGIES)
def test_bfloat16_and_gradient_checkpointing_change_the_gradients_by_rounding_alone(one_step, strategy, size):
    (alone, _), (together, _) = one_step
    exact = {name: tensor for name, tensor in alone.items() if name.startswith(f"ddp/both/{size}/")}
    distance, scale = 0.0, 0.0
    for name, expected in exact.items():
        got = together[name.replace("ddp", f"{strategy} reduced", 1)]
        if name.endswith("tokens"):
            assert got == expected
        elif name.endswith("loss"):
            assert got.item() == pytest.approx(expected.item(), rel=0.02)
            assert got != expected
        else:
            distance += (got - expected).square().sum().item()
            scale += expected.square().sum().item()
    assert distance**0.5 < 0.05 * scale**0.5


def test_validation_counts_every_pair_once_on_any_number_of_ranks(one_step):
    (_, alone), (_, together) = one_step
    assert together["ddp"] == alone["ddp"]
    for name, value in alone["ddp"].items():
        assert together["fsdp"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_all_ranks_find_a_backbone_fit_for_packing_or_all_refuse_it(one_step):
    for ranks, (_, found) in enumerate(one_step, 1):
        for strategy in rank_testing.STRATEGIES:
            fit, unfit = found["packing"][strategy]
            assert fit == [None] * ranks
            assert len(unfit) == ranks
            assert all("data.packing must be false for this backbone" in said for said in unfit)


def test_the_first_rank_alone_holds_the_whole_model_that_it_writes(one_step):
    _, (_, measured) = one_step
    assert measured["gathered"] == [[1, True], [0, True]]


def test_where_one_rank_fails_all_do_and_the_first_of_them_says_why(one_step):
    failures = ["UserError('rank 0 fails')", "OtherRankError()"], ["OtherRankError()", "UserError('rank 1 fails')"]
    (_, alone), (_, together) = one_step
    assert alone["together"] == [["rank 0 did it"], *([failures[0][0]], ["rank 0 did it"], [failures[0][0]])]
    assert together["together"] == [["rank 0 did it", "rank 1 did it"], failures[0], failures[1], failures[0]]


# ---- whole runs --------------------------------------------------------------------------------------------------


def test_two_ranks_train_like_one_and_share_the_features(train, run_dir, config_file):
    assert train(WELL_CONDITIONED) == 0
    command = ["-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file), WELL_CONDITIONED]
    code, said = finish(torchrun(*command, f"run_dir={run_dir}-two", "training.micro_batch_size=2"))
    assert code == 0, said
    assert said.count("pairwise accuracy") >= 2
    assert said.count("run folder:") == 1  # the first rank alone talks
    assert_alike(run_dir, Path(f"{run_dir}-two"))
    assert records_of(run_dir)[0]["train/loss"] != 0


@pytest.mark.exhaustive
def test_sharded_ranks_train_on_packed_batches_or_all_refuse_to(train, run_dir, config_file, recurrent_backbone):
    packed = [*WHOLE, "data.packing=true", "training.max_steps=5"]
    command = ["-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file), *packed]
    command += ["training.strategy=fsdp", f"run_dir={run_dir}-two"]
    code, said = finish(torchrun(*command, f"model.backbone={recurrent_backbone}"))
    assert code != 0
    assert said.count("lambda-critic: error: data.packing must be false for this backbone") == 1
    assert f'File "{trainer.__file__}"' not in said  # no traceback on either
    assert not Path(f"{run_dir}-two").exists()
    code, said = finish(torchrun(*command))
    assert code == 0, said
    assert train(*packed) == 0
    assert_alike(run_dir, Path(f"{run_dir}-two"))


@pytest.fixture
def as_rank(train, monkeypatch, capsys):
    """Run the command as torchrun's processes do that do not yet speak to one another; exit code, output and errors."""

    def run(rank, *arguments):
        with monkeypatch.context() as patch:
            for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
                patch.setenv(name, str(value))
            code = train(*arguments)
        return code, *capsys.readouterr()

    return run


def test_what_is_checked_before_the_ranks_meet_is_said_by_the_first(as_rank, run_dir):
    for rank in (0, 1):
        code, out, _ = as_rank(rank, "--dry-run")
        assert code == 0
        assert out.count("device memory of each of 2 ranks") == out.count("run_dir: ") == 1 - rank
        code, _, error = as_rank(rank, "--dry-run", "model.backbone=missing")
        assert code == (0 if rank else 2)
        assert error.count("lambda-critic: error: model.backbone must be a folder") == 1 - rank
        code, _, error = as_rank(rank, "training.epoch=1")
        assert code == 2
        assert error.count("lambda-critic: error: unknown config key 'training.epoch'") == 1 - rank
    assert not run_dir.exists()


@pytest.mark.exhaustive
def test_a_dry_run_under_torchrun_is_said_once_and_counts_its_ranks(config_file, run_dir):
    command = ["-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file), "--dry-run"]
    code, said = finish(torchrun(*command))
    assert code == 0, said
    assert said.count("device memory of each of 2 ranks") == 1
    assert said.count("run_dir: ") == 1
    code, said = finish(torchrun(*command, "model.backbone=missing"))
    assert code != 0
    assert said.count("lambda-critic: error: model.backbone must be a folder") == 1
    assert not run_dir.exists()


@pytest.mark.exhaustive
def test_a_configuration_that_no_rank_can_read_is_said_once(config_file):
    command = ["-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file), "training.epoch=1"]
    code, said = finish(torchrun(*command))
    assert code != 0
    assert said.count("lambda-critic: error: unknown config key 'training.epoch'") == 1


# The command, whose first rank has torchrun end all in its fifth step of two micro-batches. The ranks wait there for
# the signal: however busy the machine is, they stop after that step.
STOPPED = """
import os, signal, sys, time
from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.training import trainer

real, calls, received = trainer.value_loss, [], []

def value_loss(*arguments):
    calls.append(arguments)
    if len(calls) == 1:  # long before: a rank that is not yet at the ninth call must notice the signal too
        ask = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (received.append(1), ask(*given)))
    if len(calls) == 9:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        while not received:
            time.sleep(0.01)
    return real(*arguments)

trainer.value_loss = value_loss
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_moves_from_one_process_to_sharded_ranks_and_back(
    train, run_dir, config_file, tmp_path, monkeypatch, capsys
):
    settings = [*WHOLE, "training.epochs=6", "training.save_every=1000"]
    assert train(*settings, f"run_dir={run_dir}-whole") == 0

    real, calls = trainer.value_loss, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(trainer, "value_loss", interrupt)
    assert train(*settings) == 143
    monkeypatch.undo()

    script = tmp_path / "stopped.py"
    script.write_text(STOPPED, encoding="utf-8")
    command = [str(script), "train", "--config", str(config_file), *settings, "training.strategy=fsdp", "--resume"]
    process = torchrun(*command, "training.micro_batch_size=2")
    code, said = finish(process)
    assert code != 0
    assert "resumed after step 7" in said
    assert "stopped by SIGTERM after step" in said
    saved = checkpoint.latest_checkpoint(run_dir)
    step = int(saved.stem.split("-")[1])
    assert step == 12
    assert steps_of(run_dir)[-1]["step"] == step

    assert train(*settings, "--resume") == 0
    assert f"resumed after step {step}" in capsys.readouterr().out
    assert_alike(run_dir, Path(f"{run_dir}-whole"))


def test_one_process_can_run_the_sharded_path_and_repeats_itself(train, run_dir):
    for name in ("", "-again"):
        assert train(*WHOLE, "training.strategy=fsdp", "training.max_steps=6", f"run_dir={run_dir}{name}") == 0
    assert without_timing(run_dir) == without_timing(Path(f"{run_dir}-again"))
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    again = trainer.evaluate(str(run_dir))["checkpoints"]["best"]["metrics"]
    for name, value in results["checkpoints"]["best"]["metrics"].items():
        assert again[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_layers_within_layers_are_sharded_and_counted_once(tmp_path, train, run_dir, config_file):
    folder = save_backbone(tmp_path / "mamba")  # for its tokenizer
    mamba = make_backbone("Mamba", state_size=4)
    assert len(mamba._no_split_modules) > 1
    mamba.save_pretrained(folder)
    settings = [*WHOLE, f"model.backbone={folder}", "training.max_steps=4"]
    assert train(*settings, "training.strategy=fsdp") == 0
    assert train(*settings, f"run_dir={run_dir}-whole") == 0
    assert_alike(run_dir, Path(f"{run_dir}-whole"))
    model = prepare(load_config(config_file, settings)).model
    assert [type(layer).__name__ for layer in model.backbone_layers()] == ["MambaBlock"] * 2


def test_a_failure_of_the_first_rank_is_said_once_and_ends_all(config_file, run_dir):
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine", encoding="utf-8")
    code, said = finish(torchrun("-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file)))
    assert code != 0
    assert said.count("holds no config.yaml") + said.count("is not empty: give --resume") == 1
    assert f'File "{trainer.__file__}"' not in said  # no traceback on either


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.strategy=fsdp"], "model.cache_features must be false when training.strategy is fsdp"),
        (
            ["model.gradient_checkpointing=true"],
            "model.gradient_checkpointing must be false when model.backbone_frozen",
        ),
        (["training.micro_batch_size=0"], "training.micro_batch_size must be greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_named(train, capsys, overrides, message):
    assert train(*overrides) == 2
    assert message in capsys.readouterr().err
