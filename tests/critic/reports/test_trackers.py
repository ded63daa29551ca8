"""Trackers: each imported only when asked for, told every number, and gone on with after --resume."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.training import trainer


@pytest.fixture
def train(config_file):
    return lambda *arguments: main(["train", "--config", str(config_file), "training.max_steps=6", *arguments])


@pytest.fixture
def services(monkeypatch):
    """Stand-ins for the three packages that keep what they are told."""
    calls = []

    def note(name, result=None):
        def called(*arguments, **keywords):
            calls.append((name, arguments, keywords))
            return result

        return called

    wandb, mlflow, trackio = (ModuleType(name) for name in ("wandb", "mlflow", "trackio"))
    wandb.init = note("wandb.init", SimpleNamespace(id="w-1", log=note("wandb.log"), finish=note("wandb.finish")))
    mlflow.start_run = note("mlflow.start_run", SimpleNamespace(info=SimpleNamespace(run_id="m-1")))
    for name in ("set_experiment", "log_params", "log_metrics", "end_run"):
        setattr(mlflow, name, note(f"mlflow.{name}"))
    trackio.init = note("trackio.init", SimpleNamespace(name="t-1"))
    for name in ("log", "finish"):
        setattr(trackio, name, note(f"trackio.{name}"))
    for module in (wandb, mlflow, trackio):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def raise_error(error):
    """A function that fails, whatever it is called with."""

    def fail(*arguments, **keywords):
        raise error

    return fail


ALL = "tracking.trackers=[wandb,mlflow,trackio]"


def test_every_service_gets_every_number_once(train, services, tmp_path):
    assert train(ALL, "tracking.project=p", "tracking.name=n") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not (tmp_path / "run" / "tensorboard").exists()
    for name in ("wandb.log", "mlflow.log_metrics", "trackio.log"):
        logged = [(keywords["step"], arguments[0]) for call, arguments, keywords in services if call == name]
        assert logged == [
            (record["step"], {k: v for k, v in record.items() if k != "step" and not isinstance(v, list)})
            for record in records
        ]
    by_name = {call: (arguments, keywords) for call, arguments, keywords in services}
    assert by_name["wandb.init"][1]["project"] == by_name["trackio.init"][1]["project"] == "p"
    assert by_name["wandb.init"][1]["name"] == by_name["mlflow.start_run"][1]["run_name"] == "n"
    assert by_name["wandb.init"][1]["config"]["training"]["max_steps"] == 6
    assert by_name["mlflow.log_params"][0][0]["training.max_steps"] == 6
    assert by_name["wandb.finish"][1] == {"exit_code": 0}
    assert by_name["mlflow.end_run"][0] == ("FINISHED",)
    assert "trackio.finish" in by_name


def test_a_failed_run_is_ended_as_failed_and_a_resumed_one_goes_on_under_its_id(train, services, monkeypatch, tmp_path):
    real, calls = trainer.value_loss, []

    def poisoned(*arguments):
        loss, terms = real(*arguments)
        calls.append(loss)
        return (loss * float("nan") if len(calls) == 6 else loss), terms

    monkeypatch.setattr(trainer, "value_loss", poisoned)
    assert train(ALL) == 1
    by_name = {call: (arguments, keywords) for call, arguments, keywords in services}
    assert by_name["wandb.init"][1]["id"] is None
    assert by_name["wandb.init"][1]["name"] == "run"
    assert by_name["wandb.finish"][1] == {"exit_code": 1}
    assert by_name["mlflow.end_run"][0] == ("FAILED",)
    monkeypatch.setattr(trainer, "value_loss", real)
    services.clear()
    assert train(ALL, "--resume") == 0
    by_name = {call: (arguments, keywords) for call, arguments, keywords in services}
    assert (by_name["wandb.init"][1]["id"], by_name["wandb.init"][1]["resume"]) == ("w-1", "allow")
    assert by_name["mlflow.start_run"][1]["run_id"] == "m-1"
    assert "mlflow.log_params" not in by_name
    assert (by_name["trackio.init"][1]["name"], by_name["trackio.init"][1]["resume"]) == ("t-1", "allow")
    services.clear()
    assert train(ALL, "--overwrite") == 0
    by_name = {call: (arguments, keywords) for call, arguments, keywords in services}
    assert by_name["wandb.init"][1]["id"] is by_name["mlflow.start_run"][1]["run_id"] is None


def test_a_service_that_cannot_start_is_one_sentence_and_nothing_was_trained(train, services, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["wandb"], "init", raise_error(RuntimeError("No API key configured.")))
    assert train(ALL) == 2
    error = capsys.readouterr().err
    assert error == "lambda-critic: error: tracking.trackers: wandb could not start its run: No API key configured.\n"


def test_a_service_that_fails_later_is_left_alone_and_the_run_goes_on(train, services, monkeypatch, tmp_path, capsys):
    for name in ("log_metrics", "end_run"):
        monkeypatch.setattr(sys.modules["mlflow"], name, raise_error(ConnectionError("server gone")))
    monkeypatch.setattr(sys.modules["trackio"], "finish", raise_error(RuntimeError("no space there")))
    assert train(ALL) == 0
    out = capsys.readouterr().out
    assert out.count("mlflow is left alone from step 1 on, metrics.jsonl has everything: server gone") == 1
    assert out.count("trackio is left alone at the end of the run, metrics.jsonl has everything: no space there") == 1
    assert out.count("left alone") == 2
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("wandb.log", "trackio.log"):
        assert len([call for call, *_ in services if call == name]) == len(records)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[wandb]", "tracking.trackers: wandb needs the Python package 'wandb': pip install wandb"),
        ("[tensorboard,mlflow]", "tracking.trackers: mlflow needs the Python package 'mlflow': pip install mlflow"),
        (
            "[tensorboard,tensorboard]",
            "tracking.trackers must name each tracker once, got ['tensorboard', 'tensorboard']",
        ),
        ("[comet]", "must be 'tensorboard', 'wandb', 'mlflow' or 'trackio', got 'comet'"),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_written(
    train, monkeypatch, tmp_path, capsys, value, message
):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(f"tracking.trackers={value}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_tracker_leaves_the_json_lines_alone(train, tmp_path):
    assert train("tracking.trackers=[]") == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"metrics.jsonl", "results.json"}
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_nobody_imports_what_was_not_asked_for(config_file):
    command = ["train", "--config", str(config_file), "training.max_steps=4", "tracking.trackers=[]"]
    code = (
        f"import sys\nfrom lambda_return_ext.critic.cli import main\nassert main({command}) == 0\n"
        "asked = {'wandb', 'mlflow', 'trackio', 'tensorboard', 'datasets', 'pyarrow', 'selenium'} & set(sys.modules)\n"
        "assert not asked, asked\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
