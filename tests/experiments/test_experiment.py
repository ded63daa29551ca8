"""The experiment's own parts: what `make experiment` adds to the trainer."""

import ast
import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import collect, edits, prepare, report, run, stats
from experiments.block import TrainedBlock
from experiments.contest import Contest, build, groups, run_config
from experiments.contest import train as train_contest
from experiments.sampling import Rows, sample
from experiments.settings import load_settings
from lambda_return_ext.critic.config import Config
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.rollouts import Rollout, solutions_of
from lambda_return_ext.critic.data.split import read_rows, select_data
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt
from lambda_return_ext.critic.training import trainer

PROGRAM = """
def main_solution(numbers, bound):
    total = 0
    seen = []
    for i in range(len(numbers)):
        if numbers[i] < bound:
            total += numbers[i] * 2
        else:
            seen.append(i)
    label = 'low' if total < bound else 'high'
    return {'total': total, 'seen': seen, 'label': label}
"""
WORDS = ["<pad>", "<end>", "<unk>", "fine", "broken", *(f"w{i}" for i in range(30))]


def answers(source):
    namespace = {}
    exec(source, namespace)
    rng = random.Random(0)
    inputs = [([rng.randrange(20) for _ in range(rng.randrange(6))], rng.randrange(30)) for _ in range(40)]
    return [namespace["main_solution"](*each) for each in inputs]


@pytest.mark.parametrize("edit", edits.EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_changes_the_program_and_not_what_it_does(edit):
    before, tree = ast.unparse(ast.parse(PROGRAM)), ast.parse(PROGRAM)
    assert edit(tree, random.Random(3))
    after = ast.unparse(ast.fix_missing_locations(tree))
    assert after != before
    assert answers(after) == answers(before)


def test_several_edits_together_keep_the_behaviour_and_differ_by_seed():
    programs = [edits.edit_program(PROGRAM, random.Random(seed), 3) for seed in range(20)]
    assert len(set(programs)) > 10
    assert all(answers(program) == answers(PROGRAM) for program in programs)


def test_the_interval_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).normal(0.3, 2.0, size=400)
    mean, low, high = stats.interval(values, 4000, 1)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.06 * half)
    assert stats.interval([0.25] * 9, 100, 0) == (0.25, 0.25, 0.25)


def test_differences_are_paired_by_problem_and_averaged_over_seeds():
    ours = [{"a": [1, 1], "b": [1, 0]}, {"a": [1, 0]}]
    theirs = [{"a": [0, 1], "b": [1, 1]}, {"a": [0, 0]}]
    assert stats.differences(ours, theirs) == {"a": 0.5, "b": -0.5}
    with pytest.raises(ValueError, match="same problems"):
        stats.differences(ours, [{"a": [1]}, {"a": [1]}])


def test_pairs_use_every_answer_and_part_ways_early():
    ids = {"r1": [1, 2, 3], "r2": [9, 2, 3], "w1": [1, 2, 4], "w2": [5, 6, 7], "long": [8] * 30}
    assert prepare.choose_pairs(["r1", "r2"], ["long", "w1", "w2"], ids, 2, 8) == [("r1", "w2"), ("r2", "w1")]


@pytest.fixture
def prepared(tmp_path, tiny, monkeypatch):
    """Settings of a tiny experiment on rollouts, with its pairs and features."""
    settings = copy.deepcopy(load_settings(quick=True))
    settings["folder"] = str(tmp_path / "experiment")
    settings["features"] |= {"layers": 2, "max_length": 32}
    settings["run"] |= {"steps": 17, "checks": [15, 17], "batch_size": 4, "hidden_size": 8}
    settings["data_sets"] = {"rollouts": {"validation_problems": 5, "regimes": {"small": 8}}}
    settings["plan"] = [{"data_sets": ["rollouts"], "contestants": ["mc", "lambda", "lambda_block"], "seeds": 1}]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "rollouts.jsonl").write_text((tiny / "pairs.jsonl").read_text())
    monkeypatch.setattr(prepare, "save_backbone", lambda _: tiny)
    prepare.make_features(settings, "rollouts")
    return settings


@pytest.fixture
def tiny(tmp_path):
    """A random two-layer Llama with a tokenizer of words, and pairs."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(WORDS), "max_position_embeddings": 64, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    rng, lines = random.Random(0), []
    for problem in range(20):
        start, end = (" ".join(rng.choices(WORDS[5:], k=4)) for _ in range(2))
        sides = {"chosen": f"{start} fine {end}", "rejected": f"{start} broken {end}"}
        lines.append(json.dumps({"problem_id": f"p{problem}", "prompt": f"w{problem}", **sides}) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("loss", ["use_lambda_return", "use_mc_mse", "use_pairwise"])
def test_a_contest_takes_the_steps_of_the_trainer(tiny, loss):
    config = Config.model_validate(
        {
            "run_dir": str(tiny / "run"),
            "seed": 3,
            "device": "cpu",
            "data": {"path": str(tiny / "pairs.jsonl"), "max_length": 32, "validation_problems": 6},
            "model": {"backbone": str(tiny), "head": {"hidden_size": 8}},
            "training": {
                "epochs": 100,
                "max_steps": 7,
                "batch_size": 6,
                "value_loss": {loss: True, "lambda_return": {"warmup_steps": 2, "bias_init": None}},
            },
            "evaluation": {"every": 7, "train_pairs": 1000, "baselines": False},
            "tracking": {"trackers": []},
        }
    )
    theirs = trainer.train(config)["checkpoints"]["last"]["metrics"]
    data = select_data(read_rows(config.data), Backbone(str(tiny)).tokenizer(), config.data)
    backbone = Backbone(str(tiny)).base_model(None, 32).eval()
    features = compute_features(
        backbone, group_by_prompt(solutions_of([*data.train, *data.validation])), lambda _: None
    )
    trace, elsewhere = train_contest(config, build(config, 32), data, Collator(0, features), [7])
    ours = trace[-1]
    assert elsewhere == ([0.0, 0.0] if loss == "use_lambda_return" else [])
    for name in ("pairwise_accuracy", "margin", "loss", "token_variance_right"):
        assert ours[f"validation_{name}"] == pytest.approx(theirs[f"validation/{name}"], rel=1e-3, abs=1e-6)


def test_the_sampler_computes_the_logits_of_transformers(tiny):
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    rest, samples = [[7, 8], [9, 10, 11, 12]], 3
    with torch.inference_mode():
        rows = Rows(model, [5, 6, 7], rest, samples, 4)
        first, second = torch.arange(10, 16), torch.arange(20, 26)
        rows.append(first)
        rows.keep(torch.tensor([True, False, True, True, True, False]))
        rows.append(second[:4])
        for row, source in enumerate((0, 2, 3, 4)):
            ids = [5, 6, 7, *rest[source // samples], int(first[source]), int(second[row])]
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(rows.logits[row], expected, rtol=1e-4, atol=1e-5)


def test_samples_end_before_the_end_token_and_within_the_room(tiny):
    model, ends = LlamaForCausalLM.from_pretrained(tiny).eval(), torch.zeros(len(WORDS), dtype=torch.bool)
    ends[:12] = True
    written = sample(model, [5, 6], [[7], [8, 9]], 20, 3, ends, torch.Generator().manual_seed(0))
    assert len(written) == 40
    over = [ids for ids in written if ids is not None]
    assert 0 < len(over) < 40
    assert all(len(ids) <= 3 and min(ids, default=12) >= 12 for ids in over)


def made_up_run(contest, gain):
    rng = random.Random(f"{contest}")
    ranked = {f"sorting: p{i}": [int(rng.random() < 0.6 + gain), 1] for i in range(40)}
    names = ("pairwise_accuracy", "last_token_accuracy", "margin", "token_variance_right", "token_variance_wrong")
    row = {f"{part}_{name}": 0.7 for part in ("validation", "train") for name in names}
    keys = {"data_set": contest.data_set, "regime": contest.regime, "contestant": contest.contestant}
    counts = {"train_problems": 9, "train_pairs": 18, "validation_pairs": 80, "length": 0.4, "seconds": 2.0}
    trace = [{**row, "step": step, "validation_mean": 0.5} for step in (0, 15, 100)]
    elsewhere = None if contest.contestant == "mc" else 0.0
    rest = {"seed": contest.seed, "trace": trace, "warmup_gradient_elsewhere": elsewhere, "validation": ranked}
    return {**keys, **counts, **rest, "human_eval": {}}


def test_the_page_says_what_the_runs_say(tmp_path, capsys):
    settings = load_settings(quick=False)
    settings |= {"folder": str(tmp_path), "results": str(tmp_path / "results")}
    settings["report"] |= {"figures": str(tmp_path), "page": str(tmp_path / "page.md"), "resamples": 500}
    (tmp_path / "runs").mkdir()
    for name, gain in (("mc", 0.0), ("lambda", 0.4)):
        for seed in range(3):
            made = made_up_run(Contest("rollouts", "small", name, seed), gain)
            (tmp_path / "runs" / f"{name}{seed}.json").write_text(json.dumps(made))
    facts = {"sets": [{"data_set": "rollouts", "pairs": 80}], "likelihood": {"sorting: p": [0.5]}}
    (tmp_path / "data.json").write_text(json.dumps(facts))
    (tmp_path / "rollouts").mkdir()
    for family, right in (
        ("sorting", [True, False, None, True]),
        ("counting", [False, False, True, None, *[False] * 6]),
    ):
        answered = [{"family": family, "right": right}, {"family": family, "right": [False] * 2}]
        (tmp_path / "rollouts" / f"{family}.json").write_text(json.dumps(answered))
    collect.note_time(tmp_path, "contests", 61.0, 2)
    collect.note_time(tmp_path, "contests", 5.2, 2)
    collect.collect(settings)
    report.write_report(settings)
    said = capsys.readouterr().out
    assert "counting: right 0.091 of judged and 0.083 of all answers, OUTSIDE the band" in said
    assert "sorting: right 0.400 of judged and 0.333 of all answers\n" in said
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "better than Monte-Carlo on rollouts (small), and worse nowhere" in page
    assert "| rollouts | 1 problems | likelihood per token | 0.500 |" in page
    assert "| counting | 2 | 1 | 12 | 1 | 10 | 0.091 | 0.083 | OUTSIDE |" in page
    assert "| contests | 66 | 2 | 2 |" in page
    assert (tmp_path / "results" / "summary.csv").read_text().count("\n") == 3
    kept = {(run["contestant"], run["seed"]): run for run in collect.read_runs(settings)}
    for path in (tmp_path / "runs").glob("*.json"):
        made = json.loads(path.read_text())
        assert kept[made["contestant"], made["seed"]]["validation"] == made["validation"]
    assert (tmp_path / "evidence_differences.png").read_bytes().startswith(b"\x89PNG")


def test_the_trained_block_begins_as_the_backbones_own_and_moves(prepared):
    features = prepare.load_features(prepared, "rollouts")
    inputs = prepare.load_block_inputs(prepared, "rollouts")
    base = prepare.base_model(prepared)
    block = TrainedBlock(base, torch.nn.Identity())
    solutions = list(features)[:6]
    # Prompts and solutions of other lengths: what is padded must not be seen.
    short = solutions[0]._replace(output_ids=solutions[0].output_ids[:-5])
    known = {**{one: inputs[one] for one in solutions}, short: inputs[solutions[0]][:-5]}
    batch = Collator(0, known).pad([Rollout("p", one, 0.0) for one in [*solutions, short]])
    found, valid = block.features(batch.inputs[..., :-1], batch.inputs[..., -1] > 0)
    for row, valid_row, one in zip(found, valid, [*solutions, short], strict=True):
        expected = features[solutions[0] if one is short else one][: len(one.output_ids)]
        torch.testing.assert_close(row[valid_row], expected, rtol=1e-4, atol=1e-5)
    contest = Contest("rollouts", "small", "lambda_block", 0)
    config = run_config(prepared, contest, 8)
    model = build(config, base.config.hidden_size, base)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups(config, model, 1e-4) for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 1e-4} == {n for n in rates if ".block." in n}
    assert {rate for name, rate in rates.items() if ".head." in name} == {1e-3}
    before = copy.deepcopy(model.state_dict())
    data = prepare.load_pairs(prepared, "rollouts", 5, 8, 0)
    train_contest(config, model, data, Collator(0, inputs), [], 1e-4)
    still = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {name for name in still if "rotary" not in name} == set()


def test_finished_runs_are_skipped_and_the_others_made(prepared):
    runs = Path(prepared["folder"]) / "runs"
    runs.mkdir(parents=True)
    (runs / "rollouts-small-mc-0.json").write_text("finished")
    run.run_contests(prepared)
    assert (runs / "rollouts-small-mc-0.json").read_text() == "finished"
    made = [json.loads((runs / f"rollouts-small-{name}-0.json").read_text()) for name in ("lambda", "lambda_block")]
    assert [len(each["validation"]) for each in made] == [5, 5]
    assert [each["warmup_gradient_elsewhere"] for each in made] == [0.0, 0.0]


def test_the_committed_page_follows_from_the_committed_results_alone(tmp_path):
    root = Path(report.__file__).parents[1]
    shutil.copytree(root / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    raw = ("runs", "checks", "problems", "ranked", "data_sets", "likelihood", "pass_rates", "times")
    kept = {path.name for path in (tmp_path / "experiments" / "results").glob("*.csv")}
    for name in kept - {f"{each}.csv" for each in raw}:
        (tmp_path / "experiments" / "results" / name).unlink()
    subprocess.run([sys.executable, "-m", "experiments.report"], cwd=tmp_path, check=True)
    for name in kept:
        made, committed = (folder / "experiments" / "results" / name for folder in (tmp_path, root))
        assert made.read_bytes() == committed.read_bytes(), name
    page = "docs/evidence.md"
    assert (tmp_path / page).read_text(encoding="utf-8") == (root / page).read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "docs" / "figures").iterdir()) == [
        "evidence_curves.png",
        "evidence_differences.png",
    ]
