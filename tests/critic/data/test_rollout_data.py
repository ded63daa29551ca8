"""`data.sampling: rollouts`: every answer counts; what is held out, and what the report says."""

import pytest
from critic_testing import make_records

from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.config import DataConfig, load_config
from lambda_return_ext.critic.data.batches import epoch_batches
from lambda_return_ext.critic.data.split import read_rows, select_data
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.model.backbone import Backbone


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return Backbone(str(tiny_backbone)).tokenizer()


def rollout(problem, words, reward, **more):
    return {"problem_id": problem, "prompt": f"w1 {problem[1:]}", "completion": words, "reward": reward, **more}


ROWS = [
    rollout("pw1", "w2 w3", 1.0),
    rollout("pw1", "w2 w3", 1.0),  # said twice
    rollout("pw2", "w4", 0.0),
    rollout("pw2", "w5 w6", 0.0, finish_reason="length"),
    rollout("pw3", "w7", 2.5),
    rollout("pw3", "w8", -1.0),
    {"problem_id": "pw4", "prompt": "w1 w4", "answers": ["w9", "w10", "w11"], "rewards": [0.5, 1.0, 0.5]},
]


def select(path, tokenizer, **settings):
    config = DataConfig(
        path=str(path), **{"max_length": 64, "sampling": "rollouts", "validation_problems": 1, **settings}
    )
    return select_data(read_rows(config), tokenizer, config)


def test_every_answer_is_kept_repeated_ones_and_those_of_problems_with_one_reward(write_pairs, tokenizer):
    data = select(write_pairs(ROWS), tokenizer)
    kept = sorted((one.problem, one.reward, one.truncated) for one in (*data.train, *data.validation))
    assert kept == [
        ("pw1", 1.0, False),
        ("pw1", 1.0, False),
        ("pw2", 0.0, False),
        ("pw2", 0.0, True),
        ("pw3", -1.0, False),
        ("pw3", 2.5, False),
        ("pw4", 0.5, False),
        ("pw4", 0.5, False),
        ("pw4", 1.0, False),
    ]
    assert data.dropped == {}
    assert not {one.problem for one in data.train} & {one.problem for one in data.validation}
    ends = {one.solution.output_ids[-1] == tokenizer.eos_token_id for one in data.rollouts if one.truncated}
    assert ends == {False}


def test_each_answer_is_seen_once_an_epoch(write_pairs, tokenizer):
    data = select(write_pairs(ROWS), tokenizer)
    batches = epoch_batches([one.length for one in data.train], 2, 0, 0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(data.train)))


def test_the_report_tells_rewards_kinds_cut_offs_and_shapes(write_pairs, tokenizer):
    rows = select(write_pairs(ROWS), tokenizer).report()["rows"]
    assert rows["shapes"] == {"prompt, completion, reward": 6, "prompt, answers, rewards": 1}
    assert (rows["problems"], rows["rollouts"], rows["cut_off"], rows["problems_with_one_reward"]) == (4, 9, 1, 2)
    assert rows["reward_mean"] == pytest.approx(5.5 / 9)
    assert rows["reward_counts"] == [[-1.0, 1], [0.0, 2], [0.5, 2], [1.0, 3], [2.5, 1]]
    assert rows["reward_quartiles"] == [-1.0, 0.0, 0.5, 1.0, 2.5]


def test_a_file_of_its_own_validates_and_its_problems_are_not_trained_on(write_pairs, tokenizer):
    train, other = write_pairs(ROWS), write_pairs([ROWS[2], rollout("pw9", "w3", 1.0)], "other.jsonl")
    data = select(train, tokenizer, validation_path=str(other), validation_problems=None)
    assert sorted(one.problem for one in data.validation) == ["pw2", "pw9"]
    assert {one.problem for one in data.train} == {"pw1", "pw3", "pw4"}
    assert data.dropped == {"problems that are in data.validation_path too": 1}
    one = select(train, tokenizer, validation_path=str(other), validation_problems=1)
    assert len(one.validation) == 1
    assert {item.problem for item in one.train} == {"pw1", "pw3", "pw4"}
    with pytest.raises(UserError, match=r"data\.validation_problems must be at most .*other\.jsonl.*, got 3 for 2"):
        select(train, tokenizer, validation_path=str(other), validation_problems=3)
    with pytest.raises(UserError, match=r"data\.train_problems must be at most .*, got 4 for 3"):
        select(train, tokenizer, validation_path=str(other), train_problems=4)


def test_a_change_of_either_file_is_another_data_set(write_pairs):
    train, other = write_pairs(ROWS), write_pairs(ROWS[:1], "other.jsonl")
    config = DataConfig(path=str(train), validation_path=str(other))
    before = read_rows(config).digests
    write_pairs(ROWS[:2], "other.jsonl")
    after = read_rows(config).digests
    assert before["sha256"] == after["sha256"]
    assert before["validation_sha256"] != after["validation_sha256"]


def test_a_split_keeps_64_problems_unless_told_otherwise(write_pairs, tokenizer):
    rows = [{"prompt": f"w{i} w{j}", "completion": "w2", "reward": float(i % 2)} for i in range(9) for j in range(8)]
    data = select(write_pairs(rows), tokenizer, validation_problems=None)
    assert (len(data.validation), len(data.train)) == (64, 8)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["data.pairs_per_problem=2"], "data.pairs_per_problem"),
        (["data.length_bin=4"], "data.length_bin"),
        (["training.value_loss.use_pairwise=true"], "training.value_loss.use_pairwise"),
    ],
)
def test_what_chooses_or_ranks_pairs_does_not_go_with_rollouts(config_file, settings, key):
    with pytest.raises(UserError, match=rf"{key} must be .* when data\.sampling is rollouts"):
        load_config(config_file, ["data.sampling=rollouts", *settings])


def test_pairs_of_data_without_a_pair_say_what_takes_it(train, write_pairs, capsys, run_dir):
    assert train(f"data.path={write_pairs(ROWS[:4])}", "data.validation_problems=1") == 2
    error = capsys.readouterr().err
    assert "two answers of one problem with different rewards, got no such pair" in error
    assert "data.sampling: rollouts takes it" in error
    assert not run_dir.exists()


def test_pairs_of_real_rewards_put_the_higher_one_right_and_use_every_level(write_pairs, tokenizer):
    data = select(write_pairs(ROWS), tokenizer, sampling="pairs")
    pairs = [*data.train, *data.validation]
    assert sorted((pair.problem, pair.right.reward, pair.wrong.reward) for pair in pairs) == [
        ("pw3", 2.5, -1.0),
        ("pw4", 1.0, 0.5),
        ("pw4", 1.0, 0.5),
    ]
    levels = [rollout("pw5", f"w{i}", float(i)) for i in range(4)]
    every = select(write_pairs([*levels, *ROWS[4:6]]), tokenizer, sampling="pairs")
    made = {
        (pair.right.reward, pair.wrong.reward) for pair in (*every.train, *every.validation) if pair.problem == "pw5"
    }
    assert made == {(float(i), float(j)) for i in range(4) for j in range(i)}


def test_the_order_of_rows_changes_nothing(write_pairs, tokenizer):
    one, other = (select(write_pairs(rows), tokenizer) for rows in (ROWS, ROWS[::-1]))
    assert sorted(one.train) == sorted(other.train)
    assert sorted(one.validation) == sorted(other.validation)


def test_preference_rows_are_two_rollouts_of_their_problem(write_pairs, tokenizer):
    data = select(write_pairs(make_records(problems=4, pairs=2)), tokenizer)
    assert sorted(one.reward for one in data.rollouts) == [0.0] * 8 + [1.0] * 8


def test_a_reward_that_is_no_number_stops_before_anything_is_written(train, write_pairs, capsys, run_dir):
    path = write_pairs([*ROWS[:2], '{"prompt": "w1", "completion": "w2", "reward": NaN}'])
    assert train(f"data.path={path}", "data.sampling=rollouts") == 2
    assert f"{path}:3" in capsys.readouterr().err
    assert not run_dir.exists()
    assert main(["score", str(path), "--run", str(run_dir), "--output", str(run_dir / "s.jsonl")]) == 2


def test_a_measure_that_the_validation_data_cannot_give_is_refused_before_anything_is_written(
    train, write_pairs, capsys, run_dir
):
    rows = [{"prompt": f"w{i} w2", "completion": "w3", "reward": float(i % 2)} for i in range(9)]
    settings = [f"data.path={write_pairs(rows)}", "data.sampling=rollouts"]
    settings.append("training.value_loss.lambda_return.warmup_steps=0")
    assert train(*settings, "evaluation.best=pairwise_accuracy") == 2
    assert "evaluation.best must be explained_variance where no validation problem" in capsys.readouterr().err
    assert not run_dir.exists()
    assert train(*settings) == 0  # and without any pair everything else works
    assert main(["evaluate", str(run_dir)]) == 0
    assert main(["inspect", str(run_dir)]) == 0
