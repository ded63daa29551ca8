"""Data: reading and its errors, the split by problem, batches."""

import hashlib
import json
import random

import pytest
import torch
from critic_testing import make_records, pair_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.batches import Collator, epoch_batches
from lambda_return_ext.critic.data.chat import Renderer
from lambda_return_ext.critic.data.pairs import group_by_problem
from lambda_return_ext.critic.data.rollouts import Solution, solutions_of, tokenize
from lambda_return_ext.critic.data.split import read_rows, select_data
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.model.backbone import Backbone


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return Backbone(str(tiny_backbone)).tokenizer()


def select(path, tokenizer, **settings):
    config = DataConfig(path=str(path), **{"max_length": 64, "validation_problems": 6, **settings})
    return select_data(read_rows(config), tokenizer, config)


def read(path):
    return read_rows(DataConfig(path=str(path))).train


def problems(pairs):
    return {pair.problem for pair in pairs}


# ---- reading -----------------------------------------------------------------------------------------------------

GOOD = {"problem_id": "p", "prompt": "w1", "chosen": "fine", "rejected": "broken"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"problem_id": "p"', "a line must be one JSON object"),
        ("[1, 2]", "a line must be one JSON object, got list"),
        ({**GOOD, "chosen": "  \n"}, "'chosen' must not be empty"),
        ({**GOOD, "rejected": ""}, "'rejected' must not be empty"),
        ({**GOOD, "prompt": ""}, "'prompt' must not be empty"),
        ({**GOOD, "problem_id": 3.5}, "'problem_id' must be a string or an integer, got float"),
        ({"problem_id": "p", "prompt": "w1", "chosen": "fine"}, "the key 'rejected' must be there"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(write_pairs, second, message):
    path = write_pairs([GOOD, second])
    with pytest.raises(UserError, match=rf"pairs\.jsonl:2: .*{message}"):
        read(path)


def test_a_line_that_is_no_utf8(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"problem_id": "\xff"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: "):
        read(path)


def test_missing_and_empty_file(tmp_path, write_pairs):
    with pytest.raises(UserError, match=r"data.path must be a readable JSONL file, got .*No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="must hold at least one row"):
        read(write_pairs([""]))


def test_prompts_that_leave_no_room_are_dropped_and_counted(write_pairs, tokenizer):
    records = [{**GOOD, "problem_id": f"p{i}", "prompt": f"w{i} w1"} for i in range(8)]
    full, lists = "w1 " * 10, {"correct": ["w1", "w2"], "incorrect": ["w3"]}
    odd = [{**GOOD, "problem_id": "full", "prompt": full}, {**lists, "problem_id": "free", "prompt": f"{full}w2"}]
    data = select(write_pairs([*records, *odd]), tokenizer, max_length=10)
    assert data.report()["dropped"] == {
        "pairs whose prompt alone fills data.max_length": 1,
        "solutions whose prompt alone fills data.max_length": 3,
        "problems without a pair": 2,
    }
    assert problems(data.train + data.validation) == {f"p{i}" for i in range(8)}
    almost = {**odd[0], "prompt": "w1 " * 9}  # room for a token, and its answer has two
    assert select(write_pairs([*records, almost]), tokenizer, max_length=10).dropped == {
        "pairs with a solution that does not fit into data.max_length": 1,
        "problems without a pair": 1,
    }
    with pytest.raises(UserError, match=r"got 2 for 0 problems \(dropped 1 pairs whose prompt alone fills data"):
        select(write_pairs(odd[:1]), tokenizer, max_length=10, validation_problems=1)


def test_pairs_with_a_long_solution_are_dropped_and_counted(write_pairs, tokenizer):
    records = make_records(problems=8)
    long = {**GOOD, "problem_id": "long", "rejected": "w1 " * 63}  # 1 + 63 + the end token = 65
    data = select(write_pairs([*records, long]), tokenizer)
    assert data.dropped == {
        "pairs with a solution that does not fit into data.max_length": 1,
        "problems without a pair": 1,
    }
    assert "long" not in problems(data.train + data.validation)
    fits = {**long, "rejected": "w1 " * 62}
    assert select(write_pairs([*records, fits]), tokenizer).dropped == {}


def test_solutions_end_with_the_end_token_and_prompts_do_not(write_pairs, tokenizer):
    data = select(write_pairs(make_records()), tokenizer)
    for pair in data.train:
        assert pair.right.solution.prompt_ids == pair.wrong.solution.prompt_ids
        assert pair.right.solution.output_ids[-1] == pair.wrong.solution.output_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in pair.right.solution.prompt_ids


# ---- the split ---------------------------------------------------------------------------------------------------


def test_no_problem_is_on_both_sides(write_pairs, tokenizer):
    for seed in range(20):
        data = select(write_pairs(make_records()), tokenizer, split_seed=seed)
        assert len(problems(data.validation)) == 6
        assert len(problems(data.train)) == 18
        assert not problems(data.train) & problems(data.validation)


def test_one_text_under_two_ids_is_one_problem(write_pairs, tokenizer):
    records = make_records()
    twins = [{**record, "problem_id": f"twin of {record['problem_id']}"} for record in records]
    for seed in range(20):
        data = select(write_pairs(records + twins), tokenizer, split_seed=seed)
        prompts = [{pair.right.solution.prompt_ids for pair in part} for part in (data.train, data.validation)]
        assert not prompts[0] & prompts[1]
        assert len(prompts[1]) == 6


def test_problems_joined_through_a_third_are_one(write_pairs, tokenizer):
    texts = [("a", 1), ("b", 2), ("c", 3), ("b", 1), ("c", 2), ("d", 4)]
    examples = read(write_pairs([{**GOOD, "problem_id": name, "prompt": f"w{number}"} for name, number in texts]))
    groups = group_by_problem(examples, tokenize(examples, Renderer(tokenizer)))
    assert {name: len(problem.pairs) for name, problem in groups.items()} == {"a": 5, "d": 1}


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_lines(write_pairs, tokenizer):
    records = make_records()
    first = select(write_pairs(records), tokenizer)
    shuffled = random.Random(1).sample(records, len(records))
    again = select(write_pairs(shuffled), tokenizer)
    other = select(write_pairs(records), tokenizer, split_seed=1)
    assert problems(first.validation) == problems(again.validation)
    assert set(first.train) == set(again.train)
    assert problems(first.validation) != problems(other.validation)


def test_a_file_gives_the_same_pairs_with_every_version_of_this_package(write_pairs, tokenizer):
    """Else numbers of two versions compare two selections of the data: one such change moved a baseline by 0.08."""
    records = make_records(problems=12)
    lists = [{"prompt": f"w{i} w2", "correct": ["w1", "w2", "w3"], "incorrect": ["w4", "w5"]} for i in range(12)]
    taken = {
        name: select(write_pairs(rows), tokenizer, validation_problems=3, pairs_per_problem=2)
        for name, rows in (("pairs", records), ("lists", lists))
    }
    assert [sorted(problems(data.validation)) for data in taken.values()] == [
        ["p0", "p1", "p7"],
        ["task-7c410dccb0f3", "task-a68311611c78", "task-ff21199eebd9"],
    ]
    outputs = {
        name: [
            [pair.right.solution.output_ids, pair.wrong.solution.output_ids] for pair in data.validation + data.train
        ]
        for name, data in taken.items()
    }
    digests = {name: hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for name, ids in outputs.items()}
    assert digests == {"pairs": "006534b69b82e6a7", "lists": "07d51dced28a8cfc"}


def test_numbers_of_problems_and_pairs(write_pairs, tokenizer):
    data = select(write_pairs(make_records()), tokenizer, train_problems=5, pairs_per_problem=2)
    assert len(problems(data.train)) == 5
    assert len(data.train) == 10
    assert len(data.validation) == 12


def test_too_few_problems(write_pairs, tokenizer):
    with pytest.raises(UserError, match=r"data.validation_problems \+ data.train_problems must be .*got 25 for 24"):
        select(write_pairs(make_records()), tokenizer, train_problems=19)
    with pytest.raises(UserError, match="got 25 for 24 problems"):
        select(write_pairs(make_records()), tokenizer, validation_problems=24)


# ---- batches -----------------------------------------------------------------------------------------------------

PAIRS = [
    pair_of("a", Solution((5, 6), (7, 1)), Solution((5, 6), (8, 9, 1))),
    pair_of("b", Solution((5,), (7, 7, 7, 1)), Solution((5,), (1,))),
]


def test_a_batch_masks_prompt_and_padding():
    batch = Collator(pad_id=0)(PAIRS)
    assert batch.inputs.tolist() == [[5, 6, 7, 1, 0], [5, 7, 7, 7, 1], [5, 6, 8, 9, 1], [5, 1, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.terminal_rewards.tolist() == [1, 1, 0, 0]
    assert batch.loss_mask.dtype == batch.attention_mask.dtype == torch.bool
    assert batch.tokens == 16


def test_a_batch_of_features_holds_the_output_tokens_only():
    features = {side: torch.randn(len(side.output_ids), 3) for side in solutions_of(PAIRS)}
    batch = Collator(0, features)(PAIRS)
    assert batch.inputs.shape == (4, 4, 3)
    assert torch.equal(batch.loss_mask, batch.attention_mask)
    assert batch.loss_mask.sum(1).tolist() == [2, 4, 3, 1]
    assert torch.equal(batch.inputs[2, :3], features[PAIRS[0].wrong.solution])
    assert not batch.inputs[3, 1:].any()


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=400),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_an_epoch_has_every_index_once(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert max(map(len, batches)) <= batch_size


def test_epochs_differ_and_repeat_by_seed_and_keep_lengths_together():
    rng = random.Random(0)
    lengths = [rng.randint(1, 1000) for _ in range(320)]
    orders = [epoch_batches(lengths, 10, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(orders[0] != other for other in orders[1:])
    assert orders[0] == epoch_batches(lengths, 10, 0, 0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in orders[0])
    assert padded < 1.2 * sum(lengths)
