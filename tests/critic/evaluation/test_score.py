"""`lambda-critic score`: what it writes, and that it holds no more than a few rows."""

import json

import pyarrow.parquet
import pytest
import torch
from critic_testing import make_records
from safetensors.torch import save_file

from lambda_return_ext import compute_lambda_return
from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.data.rollouts import solutions_of
from lambda_return_ext.critic.evaluation import scoring
from lambda_return_ext.critic.evaluation.scoring import load_critic, score_file
from lambda_return_ext.critic.task import load_run
from lambda_return_ext.critic.training import trainer


@pytest.fixture
def run(config_file, tmp_path, capsys):
    assert main(["train", "--config", str(config_file), "training.max_steps=8"]) == 0
    capsys.readouterr()
    return str(tmp_path / "run")


def records_of(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [
    *make_records(problems=3, pairs=2),
    {"problem_id": 9, "prompt": "w1", "completion": "w2 fine", "label": False},
    {"prompt": "w1", "completion": "w2"},
    {"prompt": "w3", "correct": ["w4 w5", "w4 " * 70], "incorrect": ["w6"]},
]


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.parquet"])
def test_every_answer_is_scored_in_order_as_the_model_values_it(run, write_pairs, tmp_path, capsys, name):
    output = tmp_path / name
    assert main(["score", str(write_pairs(ROWS, "rows.jsonl")), "--run", run, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {output}: 16 answers" in out
    assert "left out: 1 answers that do not fit into data.max_length = 64" in out
    scored = records_of(output)
    assert [(record["row"], record["answer"]) for record in scored] == [
        *((row, answer) for row in range(1, 7) for answer in ("chosen", "rejected")),
        (7, "completion"),
        (8, "completion"),
        (9, "correct[0]"),
        (9, "incorrect[0]"),
    ]
    assert [record["reward"] for record in scored] == [1, 0] * 6 + [0, None, 1, 0]
    assert scored[12]["problem_id"] == "9"
    critic = load_critic(run)
    for record in scored:
        row = ROWS[record["row"] - 1]
        key, _, index = record["answer"].rstrip("]").partition("[")
        text = row[key][int(index)] if index else row[key]
        prompt, answer = (
            critic.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (row["prompt"], text)
        )
        assert record["token_ids"] == [*answer, critic.tokenizer.eos_token_id]
        assert record["prompt_tokens"] == len(prompt)
        ids = torch.tensor([prompt + record["token_ids"]])
        with torch.no_grad():
            values = critic.model(ids, torch.ones_like(ids).bool())[:, len(prompt) :]
        torch.testing.assert_close(torch.tensor([record["values"]]), values, rtol=1e-5, atol=1e-6)
        assert all(record["mask"])
        if record["reward"] is None:
            assert record["targets"] is record["advantages"] is record["td_errors"] is None
            continue
        mask, reward = torch.ones_like(values).bool(), torch.tensor([record["reward"]])
        targets, one_step = (compute_lambda_return(values, reward, mask, 1.0, lam) for lam in (0.95, 0.0))
        for column, expected in {
            "targets": targets,
            "advantages": targets - values,
            "td_errors": one_step - values,
        }.items():
            torch.testing.assert_close(torch.tensor([record[column]]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a machine without a CUDA device")
def test_a_run_on_cuda_can_be_looked_at_without_it(run, write_pairs, tmp_path):
    saved = tmp_path / "run/config.yaml"
    saved.write_text(saved.read_text(encoding="utf-8").replace("device: cpu", "device: cuda"), encoding="utf-8")
    score_file(run, str(write_pairs(ROWS, "rows.jsonl")), str(tmp_path / "scores.jsonl"))
    assert len(records_of(tmp_path / "scores.jsonl")) == 16
    assert main(["export", run, str(tmp_path / "exported")]) == 0
    assert main(["inspect", run]) == 0
    assert main(["evaluate", run]) == 0


@pytest.mark.parametrize("lora", [0, 2])
def test_a_frozen_backbone_from_scratch_scores_as_it_evaluates(train, run_dir, write_pairs, tmp_path, lora):
    settings = ["model.from_scratch=true", "model.cache_features=false", f"model.lora.rank={lora}"]
    assert train(*settings, "training.max_steps=8", "training.value_loss.lambda_return.bias_init=null") == 0
    torch.manual_seed(12345)
    measured = trainer.evaluate(str(run_dir))["checkpoints"]["best"]["metrics"]
    torch.manual_seed(67890)
    score_file(str(run_dir), str(write_pairs(make_records())), str(tmp_path / "scores.jsonl"))
    means = {"chosen": [], "rejected": []}
    validation = {pair.problem for pair in load_run(str(run_dir))[0].data.validation}
    for record in records_of(tmp_path / "scores.jsonl"):
        if record["problem_id"] in validation:
            means[record["answer"]].append(sum(record["values"]) / sum(record["mask"]))
    right, wrong = torch.tensor(means["chosen"]), torch.tensor(means["rejected"])
    assert len(right) == len(wrong) == 18
    assert right.mean() == pytest.approx(measured["validation/mean_right"], abs=1e-5)
    assert wrong.mean() == pytest.approx(measured["validation/mean_wrong"], abs=1e-5)
    assert (right > wrong).float().mean() == pytest.approx(measured["validation/pairwise_accuracy"])


def test_gaps_have_weight_zero(run, write_pairs, tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }} <end>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    config = tmp_path / "run" / "config.yaml"
    template = f"chat_template: {tmp_path / 'chat.jinja'}"
    config.write_text(config.read_text().replace("chat_template: null", template))
    roles = [("user", "w1"), ("assistant", "w2 w3"), ("tool", "w4 w5"), ("assistant", "w6")]
    row = {"messages": [{"role": role, "content": content} for role, content in roles], "label": True}
    score_file(run, str(write_pairs([row], "chat.jsonl")), str(tmp_path / "scores.jsonl"))
    (record,) = records_of(tmp_path / "scores.jsonl")
    # assistant: w2 w3 <end> | tool w4 w5 <end> assistant | w6 <end>
    assert record["mask"] == [True] * 3 + [False] * 5 + [True] * 2
    for column in ("values", "targets", "advantages", "td_errors"):
        assert [x != 0 for x in record[column]] == record["mask"]


def test_rows_are_read_scored_and_written_a_few_at_a_time(run, write_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "ROWS_AT_ONCE", 4)
    parsed, ahead = [], []
    parse, score = scoring.parse_example, scoring.score

    def spy_parse(row, unlabelled):
        parsed.append(row)
        return parse(row, unlabelled)

    def spy_score(critic, items):
        ahead.append((len(parsed), len(items)))
        return score(critic, items)

    monkeypatch.setattr(scoring, "parse_example", spy_parse)
    monkeypatch.setattr(scoring, "score", spy_score)
    score_file(run, str(write_pairs(make_records(problems=5, pairs=2), "rows.jsonl")), str(tmp_path / "scores.parquet"))
    assert ahead == [(4, 8), (8, 8), (10, 4)]


def test_a_parquet_file_is_written_in_large_groups_with_few_rows_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "ROW_GROUP_BYTES", 1 << 20)
    numbers = [0.5] * 100
    columns = dict.fromkeys(("values", "targets", "advantages", "td_errors"), numbers)
    columns |= {"problem_id": "p", "answer": "chosen", "reward": 1.0, "prompt_tokens": 3}
    columns |= {"token_ids": [*range(100)], "mask": [True] * 100}
    before, held = pyarrow.total_allocated_bytes(), []
    with scoring._write_parquet(tmp_path / "scores.parquet", scoring.VALUES) as write:
        for start in range(0, 6400, 64):
            write([{"row": row, **columns} for row in range(start, start + 64)])
            held.append(pyarrow.total_allocated_bytes() - before)
        write([])
    assert max(held) < 4 << 20
    assert max(held[50:]) < 1.1 * max(held[:50])
    with pyarrow.parquet.ParquetFile(tmp_path / "scores.parquet") as file:
        table = file.read()
        # The size of the last group is what is left; of the others, at most 64 rows more than it must be.
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert table["row"].to_pylist() == [*range(6400)]
    assert len(sizes) == -(-table.nbytes // (sizes[0] * table.nbytes // 6400))
    assert all((1 << 20) <= size * table.nbytes / 6400 < (1 << 20) + 70 * 2100 for size in sizes[:-1])


def test_nothing_that_fits_makes_a_file_without_rows(run, write_pairs, tmp_path):
    row = {"prompt": "w1", "completion": "w2 " * 70, "label": True}
    score_file(run, str(write_pairs([row], "rows.jsonl")), str(tmp_path / "scores.parquet"))
    assert records_of(tmp_path / "scores.parquet") == []


def test_a_damaged_run_is_named(run, write_pairs, tmp_path, capsys):
    best, data = tmp_path / "run/best.safetensors", tmp_path / "run/data.json"
    good = best.read_bytes()
    tensors, _ = checkpoint.load_tensors(best)
    command = ["score", str(write_pairs(ROWS, "rows.jsonl")), "--run", run, "--output", str(tmp_path / "s.jsonl")]
    save_file(tensors, best)
    assert main(command) == 2
    assert f"{best} must be a checkpoint of this trainer" in capsys.readouterr().err
    best.write_bytes(good[:-10])
    assert main(command) == 2
    assert f"{best} must be a checkpoint of this trainer" in capsys.readouterr().err
    checkpoint.save_tensors(best, {name: tensor[:1].clone() for name, tensor in tensors.items()}, {"step": 1})
    assert main(command) == 2
    assert "the checkpoint must hold a value_head.0.bias of shape [16], got [1]" in capsys.readouterr().err
    best.write_bytes(good)
    assert main(command) == 0
    data.write_text("{", encoding="utf-8")
    assert main(["evaluate", run]) == 2
    assert f"{data} must be what a run wrote there" in capsys.readouterr().err


def test_what_score_refuses_leaves_nothing_behind(run, write_pairs, tmp_path, capsys):
    good = str(write_pairs(ROWS, "rows.jsonl"))
    bad = str(write_pairs([*ROWS, {"prompt": "w1"}], "bad.jsonl"))
    nothing = tmp_path / "nothing.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["w1"]}), nothing)
    nothing.write_bytes(nothing.read_bytes()[:-16] + b"\xff" * 8 + nothing.read_bytes()[-8:])
    half = str(write_pairs([{**ROWS[0], "problem_id": "\ud800"}], "half.jsonl"))
    output = tmp_path / "scores.jsonl"
    for arguments, message in (
        ([str(nothing), "--run", run, "--output", str(output)], "nothing.parquet must be a Parquet file: "),
        ([half, "--run", run, "--output", str(tmp_path / "s.parquet")], "half.jsonl:1: 'problem_id' must be Unicode"),
        ([good, "--run", run, "--output", "scores.txt"], "--output must end in .jsonl or .parquet, got 'scores.txt'"),
        ([good, "--run", str(tmp_path / "no"), "--output", str(output)], "RUN must be the folder of a run"),
        (["none.jsonl", "--run", run, "--output", str(output)], "FILE must be a readable JSONL file, got 'none.jsonl'"),
        ([bad, "--run", run, "--output", str(output)], "bad.jsonl:10: a row must have the keys"),
        ([good, "--run", run, "--output", str(tmp_path / "no" / "scores.jsonl")], "must be a file that can be written"),
        ([good, "--run", run, "--output", good, "--overwrite"], "--output must be another file than the data"),
    ):
        before = sorted(tmp_path.iterdir())
        assert main(["score", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
    output.write_text("old", encoding="utf-8")
    assert main(["score", good, "--run", run, "--output", str(output)]) == 2
    assert "--output must not exist yet" in capsys.readouterr().err
    assert main(["score", good, "--run", run, "--output", str(output), "--overwrite"]) == 0
    assert len(records_of(output)) == 16


def test_prompts_are_cut_as_in_training(train, run_dir, write_pairs, tmp_path, capsys):
    records = [{**record, "prompt": f"w1 w2 w3 {record['prompt']}"} for record in make_records()]
    pairs = write_pairs(records)
    settings = ["data.overlong=truncate_prompt", "data.max_length=18", "training.max_steps=4"]
    assert train(*settings) == 0
    task, _ = load_run(str(run_dir))
    assert task.data.truncated > 10
    capsys.readouterr()
    score_file(str(run_dir), str(pairs), str(tmp_path / "scores.jsonl"))
    out = capsys.readouterr().out
    assert "left out" not in out
    assert f"cut the beginning of the prompt of {2 * task.data.truncated} answers" in out
    trained = list(solutions_of([*task.data.train, *task.data.validation]))
    lengths = {(side.output_ids, len(side.prompt_ids)) for side in trained}
    scored = records_of(tmp_path / "scores.jsonl")
    assert {(tuple(record["token_ids"]), record["prompt_tokens"]) for record in scored} == lengths
    # The values are those of the cut prompt.
    critic = load_critic(str(run_dir))
    side = next(side for side in trained if side.length == 18)
    ids = torch.tensor([side.prompt_ids + side.output_ids])
    with torch.no_grad():
        values = critic.model(ids, torch.ones_like(ids).bool())[0, len(side.prompt_ids) :]
    found = [record["values"] for record in scored if tuple(record["token_ids"]) == side.output_ids]
    assert any(torch.allclose(torch.tensor(each), values, rtol=1e-5, atol=1e-6) for each in found)
    # Only an answer that does not fit by itself is left out; the others of its row are cut by themselves.
    row = {"prompt": "w1 " * 30, "correct": ["w2 " * 17, "w2 " * 16, "w2"], "incorrect": []}
    score_file(str(run_dir), str(write_pairs([row], "rows.jsonl")), str(tmp_path / "rows_scores.jsonl"))
    assert "left out: 1 answers" in capsys.readouterr().out
    cut = [(record["answer"], record["prompt_tokens"]) for record in records_of(tmp_path / "rows_scores.jsonl")]
    assert cut == [("correct[1]", 1), ("correct[2]", 16)]
