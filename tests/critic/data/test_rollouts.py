"""Rollouts in: globs and folders, renamed columns, every shape of a row, and what each becomes as tokens."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from test_formats import CALL, CONVERSATION, MARKED, RIGHT, TEMPLATE, TOOL, USER, chat_tokenizer, parse  # noqa: F401

from lambda_return_ext.critic.data.chat import Renderer, lost_special_tokens
from lambda_return_ext.critic.data.content import Ids
from lambda_return_ext.critic.data.rollouts import tokenize
from lambda_return_ext.critic.data.rows import check_together, parse_example
from lambda_return_ext.critic.data.shapes import SHAPES
from lambda_return_ext.critic.data.sources import Row, Source
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.model.backbone import Backbone

ONE = {"prompt": "w1", "completion": "fine", "reward": 0.5}


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return Backbone(str(tiny_backbone)).tokenizer()


def write_lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_csv(path, *records):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for record in records for key in record))
        writer.writeheader()
        for record in records:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})


def tokens_of(example, tokenizer, template=None):
    """The rollouts of an example, and the output tokens of each, those that count in brackets."""
    named = []
    for rollout in tokenize([example], Renderer(tokenizer, template))[0]:
        ids, mask = rollout.solution[1:]
        mask = mask or (True,) * len(ids)
        words = tokenizer.convert_ids_to_tokens(list(ids))
        named.append((rollout, " ".join(f"[{w}]" if m else w for w, m in zip(words, mask, strict=True))))
    return named


# ---- files -------------------------------------------------------------------------------------------------------


def dump(folder, steps=(1, 2, 10)):
    for step in steps:
        write_lines(folder / f"{step}.jsonl", {**ONE, "prompt": f"w{step}"}, {**ONE, "prompt": f"w{step} w0"})
    return folder


ORDER = ["w1", "w1 w0", "w2", "w2 w0", "w10", "w10 w0"]


@pytest.mark.parametrize("pattern", ["dumps", "dumps/*.jsonl", "**/*.jsonl", "dumps/[0-9]*.jsonl"])
def test_a_folder_or_a_glob_is_read_in_natural_order(tmp_path, pattern):
    folder = dump(tmp_path / "dumps")
    rows = list(Source(tmp_path / pattern))
    assert [row.values["prompt"] for row in rows] == ORDER
    assert rows[3].where == f"{folder / '2.jsonl'}:2"


def test_an_error_names_the_file_of_a_glob_and_the_line(tmp_path):
    folder = dump(tmp_path / "dumps")
    with (folder / "2.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"dumps/2\.jsonl:3: a line must be one JSON object"):
        list(Source(tmp_path / "dumps" / "*.jsonl"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/*.jsonl", r"data.path must be a glob or a folder of files that end in .*, which matches no file$"),
        ("empty", r"data.path must be a glob or a folder of files that end in .*, an empty folder$"),
        ("dumps/*", r"data.path must be a file that ends in .*, got .*dumps/notes\.txt'$"),
    ],
)
def test_a_glob_or_a_folder_without_such_files_is_refused(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (dump(tmp_path / "dumps") / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=message) as error:
        Source(tmp_path / path)
    assert "\n" not in str(error.value)


def test_a_folder_may_hold_other_things_beside_the_dumps(tmp_path):
    (dump(tmp_path / "dumps") / "run.log").write_text("x")
    assert len(list(Source(tmp_path / "dumps"))) == 6


@pytest.mark.parametrize("name", ["train.jsonl", "my-test-2.jsonl", "README.md", "more/a.jsonl", "a.csv"])
def test_a_folder_that_datasets_reads_in_its_own_way_is_left_to_it(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr("lambda_return_ext.critic.data.sources._load_dataset", lambda *args: asked.append(args))
    write_lines(dump(tmp_path / "dumps") / name, ONE)
    Source(tmp_path / "dumps")
    Source(dump(tmp_path / "plain"), split="other")
    assert asked == [(str(tmp_path / "dumps"), None, "train"), (str(tmp_path / "plain"), None, "other")]


def test_the_digest_covers_names_and_content_of_all_files_in_order(tmp_path):
    first = Source(dump(tmp_path / "a")).sha256()
    assert Source(dump(tmp_path / "b")).sha256() == Source(tmp_path / "a" / "*.jsonl").sha256() == first
    others = [Source(dump(tmp_path / "c", (1, 2, 11))).sha256(), Source(dump(tmp_path / "d", (1, 2))).sha256()]
    content = (tmp_path / "b" / "2.jsonl").read_bytes()
    (tmp_path / "b" / "2.jsonl").write_bytes(content[:-1])
    (tmp_path / "b" / "10.jsonl").write_bytes(b"\n" + (tmp_path / "b" / "10.jsonl").read_bytes())
    assert len({first, *others, Source(tmp_path / "b").sha256()}) == 4


# ---- columns -----------------------------------------------------------------------------------------------------


def test_columns_are_renamed_and_their_old_names_forgotten(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"prompt": "w1", "answers": "fine", "score": 2, "label": 1})
    (row,) = Source(tmp_path / "a.jsonl", columns={"completion": "answers", "reward": "score"})
    assert row.values == {"prompt": "w1", "completion": "fine", "reward": 2, "label": 1}
    assert parse_example(row).answers[0].reward == 2  # and not the label: a column that is named goes first
    assert parse_example(row).shape == "prompt, completion, reward"


def test_a_dotted_column_reaches_into_objects_and_lists(tmp_path):
    record = {"a": {"b": [{"c": "fine"}, {"c": "broken"}]}, "x.y": 1.5, "x": {"y": 3}, "prompt": "w1"}
    write_lines(tmp_path / "a.jsonl", record)
    (row,) = Source(tmp_path / "a.jsonl", columns={"completion": "a.b.-1.c", "reward": "x.y"})
    assert row.values["completion"] == "broken"
    assert row.values["reward"] == 1.5


@pytest.mark.parametrize("write", [write_lines, write_csv])
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path, write):
    path = tmp_path / ("a.jsonl" if write is write_lines else "a.csv")
    write(path, {"prompt": "w1", "completion": "fine", "score": 1})
    message = rf"{path.name}:{1 + (write is write_csv)}: data.columns.reward must name a column that is there, "
    with pytest.raises(UserError, match=message + r"got 'scor'; the nearest is 'score'$"):
        list(Source(path, columns={"reward": "scor"}))
    with pytest.raises(UserError, match=message + r"got 'zzz'; there are completion, prompt, score$"):
        list(Source(path, columns={"reward": "zzz"}))


def test_a_part_of_a_dotted_column_that_is_not_there_is_named_with_the_nearest(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"response": {"output": "fine"}})
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*got 'response.outptu'; the nearest is 'output'$"):
        list(Source(tmp_path / "a.jsonl", columns={"completion": "response.outptu"}))


def test_a_name_of_ours_that_is_none_is_refused_with_the_nearest(tmp_path):
    write_lines(tmp_path / "a.jsonl", ONE)
    with pytest.raises(UserError, match=r"data.columns must have .* on the left, got 'rewrd'; the nearest is 'reward'"):
        Source(tmp_path / "a.jsonl", columns={"rewrd": "score"})


def test_an_optional_column_may_be_missing_in_some_rows_but_not_in_all(tmp_path):
    write_lines(tmp_path / "a.jsonl", {**ONE, "uid": "p"}, ONE)
    assert ["problem_id" in row.values for row in Source(tmp_path / "a.jsonl", columns={"problem_id": "uid"})] == [1, 0]
    rows = iter(Source(tmp_path / "a.jsonl", columns={"problem_id": "udi"}))
    assert len([next(rows), next(rows)]) == 2
    with pytest.raises(UserError, match=r"a\.jsonl: data.columns.problem_id must name a column that some row has, "):
        next(rows)


def test_rows_that_are_only_scored_may_lack_the_column_of_the_reward(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"input": "w1", "output": "fine"})
    columns = {"prompt": "input", "completion": "output", "reward": "score"}
    (row,) = Source(tmp_path / "a.jsonl", columns=columns, unlabelled=True)
    assert parse_example(row, unlabelled=True).answers[0].reward is None


# ---- shapes ------------------------------------------------------------------------------------------------------

IDS = {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9], "reward": 1}


@pytest.mark.parametrize(
    ("values", "shape", "contents", "rewards"),
    [
        (ONE, "prompt, completion, reward", ["fine"], [0.5]),
        ({**ONE, "reward": -3}, "prompt, completion, reward", ["fine"], [-3]),
        ({**ONE, "reward": True}, "prompt, completion, reward", ["fine"], [1]),
        ({**ONE, "reward": "2.5"}, "prompt, completion, reward", ["fine"], [2.5]),
        ({"messages": [USER, RIGHT], "reward": 7}, "messages, reward", [[RIGHT]], [7]),
        ({"prompt": "w1", "completion": "fine", "label": 0.25}, "prompt, completion, label", ["fine"], [0.25]),
        (
            {"prompt": "w1", "answers": ["w2", "w3"], "rewards": [2, -1]},
            "prompt, answers, rewards",
            ["w2", "w3"],
            [2, -1],
        ),
        (
            {"prompt": [USER], "answers": [[RIGHT], "w3"], "rewards": [0.5, 1]},
            "prompt, answers, rewards",
            [[RIGHT], [{"role": "assistant", "content": "w3"}]],
            [0.5, 1],
        ),
        (IDS, "prompt_ids, completion_ids, reward", [Ids((7, 8, 9))], [1]),
        (
            {"prompt": "w1", "completions": ["w2", "w3"], "labels": [True, True]},
            "prompt, completions, labels",
            ["w2\nw3"],
            [1],
        ),
        (
            {"prompt": "w1", "completions": ["w2", "w3"], "labels": [True, False]},
            "prompt, completions, labels",
            ["w2\nw3"],
            [0],
        ),
        ({"problem": "w1", "steps": ["w2", "w3"], "label": -1}, "problem, steps, label", ["w2\n\nw3"], [1]),
        ({"problem": "w1", "steps": ["w2", "w3"], "label": 0}, "problem, steps, label", ["w2\n\nw3"], [0]),
        (
            {"problem": "w1", "steps": ["w2", "w3"], "label": 1, "final_answer_correct": True},
            "problem, steps, label",
            ["w2\n\nw3"],
            [1],
        ),
    ],
)
def test_the_shapes_of_rollouts(values, shape, contents, rewards):
    example = parse(**values)
    assert example.shape == shape
    assert [answer.content for answer in example.answers] == contents
    assert [answer.reward for answer in example.answers] == rewards
    assert not example.paired


def test_the_prompt_of_processbench_is_its_problem_and_equal_prompts_of_ids_are_one_task():
    assert parse(problem="w1", steps=["w2"], label=-1).prompt == "w1"
    assert parse(**IDS).prompt == (5, 6)
    assert parse(**IDS).task == parse(**{**IDS, "completion_ids": [1]}).task != parse(**{**IDS, "prompt_ids": [5]}).task


ONE_OF_EACH = [
    {"chosen": "a", "rejected": "b"},
    {"correct": ["c"], "incorrect": ["d"]},
    {"completion": "e", "label": 1},
    {"messages": [USER, RIGHT], "label": 1},
    IDS,
    {"completion": "e", "reward": 1},
    {"messages": [USER, RIGHT], "reward": 1},
    {"answers": ["f"], "rewards": [1]},
    {"completions": ["g"], "labels": [True]},
    {"problem": "w9", "steps": ["h"], "label": -1},
]


@pytest.mark.parametrize("first", range(10))
def test_a_row_with_the_keys_of_several_shapes_has_the_first_of_the_table(first):
    """And the table has those first that were there first, so that no row changes its meaning."""
    row = {"prompt": "w1"}
    for values in reversed(
        ONE_OF_EACH[first : 10 if first > 6 else 9]
    ):  # the label of steps would make others labelled
        row |= values
    later = {"messages, label": "prompt, completion, label"}  # what the rows after it make of its label
    expected = SHAPES[first].name
    assert parse(**row).shape == later.get(expected, expected)
    assert parse(prompt="w1", **ONE_OF_EACH[first]).shape == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**ONE, "reward": float("nan")}, r"'reward' must be a finite number, got 'nan'"),
        ({**ONE, "reward": float("inf")}, r"'reward' must be a finite number, got 'inf'"),
        ({**ONE, "reward": 10**400}, r"'reward' must be a finite number, got '1000"),
        ({**ONE, "reward": "good"}, r"'reward' must be a finite number, got 'good'"),
        ({**ONE, "reward": [1]}, r"'reward' must be a finite number, got '\[1\]'"),
        ({"prompt": "w1", "completion": "w2", "label": -0.1}, r"'label' must be true or false, 1 or 0, or a number"),
        ({"prompt": "w1", "answers": ["a", "b"], "rewards": [1]}, r"'rewards' must .* of 'answers', got 1 for 2"),
        ({"prompt": "w1", "answers": ["a"]}, r"the key 'rewards' must be there"),
        ({"prompt": "w1", "answers": [], "rewards": []}, r"'answers' must hold at least one answer, got none"),
        ({"prompt": "w1", "answers": ["a"], "rewards": [None]}, r"'rewards\[0\]' must be a finite number, got 'None'"),
        ({**IDS, "logprobs": [-1.0]}, r"'logprobs' must have one for each of 'completion_ids', got 1 for 3"),
        ({**IDS, "entropies": [1.0] * 4}, r"'entropies' must have one for each of 'completion_ids', got 4 for 3"),
        ({**IDS, "logprobs": [-1, float("-inf"), 0]}, r"logprobs\[1\] must be a finite number, got '-inf'"),
        ({**IDS, "entropies": [0, 0, "x"]}, r"entropies\[2\] must be a finite number, got 'x'"),
        ({**IDS, "completion_mask": [1, 1]}, r"'completion_mask' must have one for each of .*, got 2 for 3"),
        ({**IDS, "completion_mask": [1, 2, 0]}, r"completion_mask\[1\] must be true or false, got 2"),
        ({**IDS, "completion_mask": [0, 0, 0]}, r"'completion_mask' must have a one, got zeros only"),
        ({**IDS, "completion_ids": [1, -1]}, r"'completion_ids' must hold whole numbers .*, got '-1' at 1"),
        ({**IDS, "completion_ids": [1.0]}, r"'completion_ids' must hold whole numbers .*, got '1.0' at 0"),
        ({**IDS, "completion_ids": [True]}, r"'completion_ids' must hold whole numbers .*, got 'True' at 0"),
        ({**IDS, "prompt_ids": [2**31]}, r"'prompt_ids' must hold whole numbers .*, got '2147483648' at 0"),
        ({**IDS, "completion_ids": []}, r"'completion_ids' must not be empty, got \[\]"),
        ({**IDS, "prompt_ids": []}, r"'prompt_ids' must not be empty, got \[\]"),
        ({**IDS, "prompt_ids": "w1"}, r"'prompt_ids' must be a list, got str"),
        ({"completion_ids": [1], "reward": 1}, r"the key 'prompt_ids' must be there"),
        ({"prompt": "w1", "completions": ["a"]}, r"the key 'labels' must be there"),
        ({"prompt": "w1", "completions": ["a"], "labels": [1, 0]}, r"'labels' must .* of 'completions', got 2 for 1"),
        ({"prompt": "w1", "completions": ["a"], "labels": [3]}, r"'labels\[0\]' must be true or false, got 3"),
        ({"prompt": "w1", "completions": [3], "labels": [1]}, r"'completions\[0\]' must be a string, got int"),
        ({"prompt": "w1", "completions": [], "labels": []}, r"'completions' must not be empty, got \[\]"),
        ({"problem": "w1", "steps": ["a"]}, r"the key 'label' must be there"),
        ({"problem": "w1", "steps": ["a"], "label": 1}, r"'label' must be .* from 0 to 0, or -1 for none, got 1"),
        ({"problem": "w1", "steps": ["a"], "label": -2}, r"'label' must be the number of the first wrong .*, got -2"),
        ({**ONE, "turn_rewards": [1, 2]}, r"'turn_rewards' must have one number .* in 'completion', got 2 for 1"),
        ({**ONE, "turn_rewards": 1}, r"'turn_rewards' must be a list with one number for each message .*, got int"),
        ({**ONE, "turn_rewards": [None]}, r"'turn_rewards\[0\]' must be a finite number"),
        ({"messages": CONVERSATION, "reward": 1, "turn_rewards": [1, 2]}, r"'turn_rewards' .*, got 2 for 3"),
        ({**IDS, "completion_mask": [1, 0, 1], "turn_rewards": [1]}, r"'turn_rewards' .*, got 1 for 2"),
        ({**ONE, "truncated": "perhaps"}, r"'truncated' must be true or false, got 'perhaps'"),
        ({**ONE, "finish_reason": 3}, r"'finish_reason' must be a string, got int"),
        ({"prompt": "w1", "answers": ["a"], "rewards": [1], "truncated": True}, r"'truncated' must be a list"),
        ({**ONE, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, r"message 0, .* one of type 'image'"),
        ({**ONE, "completion": [{"type": "web_search_call"}, {"type": "message"}]}, r"item 0, .*got 'web_search_call'"),
    ],
)
def test_a_bad_rollout_is_named_in_one_sentence_with_its_key(values, message):
    with pytest.raises(UserError, match=rf"^file\.jsonl:7: .*{message}") as error:
        parse(**values)
    assert "\n" not in str(error.value)


def test_rewards_on_two_scales_in_one_file_are_refused_with_both_lines():
    def at(line, **values):
        return parse_example(Row(f"f.jsonl:{line}", values))

    pair = at(1, prompt="w1", chosen="a", rejected="b")
    inside, outside = (at(line, prompt="w1", completion="a", reward=reward) for line, reward in ((2, 1), (3, -0.5)))
    check_together([pair, inside])
    check_together([inside, outside])
    message = r"f\.jsonl:3: a reward must be between 0 and 1 .* as f\.jsonl:1 has by its keys .*rejected, got -0.5$"
    for order in ([pair, inside, outside], [outside, inside, pair]):
        with pytest.raises(UserError, match=message):
            check_together(order)
    steps = at(4, problem="w1", steps=["a"], label=-1)
    with pytest.raises(UserError, match=r"f\.jsonl:3: .* as f\.jsonl:4 has"):
        check_together([outside, steps])


def test_answers_that_are_only_scored_need_no_reward():
    for values in (
        {"prompt": "w1", "answers": ["w2", "w3"]},
        {"prompt_ids": [1], "completion_ids": [2]},
        {"prompt": "w1", "completions": ["w2"]},
        {"messages": [USER, RIGHT]},
    ):
        assert {answer.reward for answer in parse(unlabelled=True, **values).answers} == {None}


CELLS = [
    {**IDS, "completion_mask": [1, 0, 1], "logprobs": [-0.5, 0, -1.5], "turn_rewards": [0.5, 1]},
    {"prompt": "w1", "answers": ["w2", "w3"], "rewards": [1.5, 0], "finish_reason": ["stop", "length"]},
    {"prompt": "w1", "completions": ["w2", "w3"], "labels": [True, False]},
    {"problem": "w1", "steps": ["w2", "w3"], "label": -1},
    {**ONE, "finish_reason": "length"},
    {**ONE, "truncated": True},
]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rollouts_in_a_csv_or_a_parquet_file_are_those_of_jsonl(tmp_path, kind):
    if kind == "csv":
        write_csv(tmp_path / "a.csv", *CELLS)
    else:
        columns = {key: None for record in CELLS for key in record if key != "finish_reason"}
        records = [{key: record.get(key) for key in columns} for record in CELLS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for row, record in zip(Source(tmp_path / f"a.{kind}"), CELLS, strict=True):
        if kind == "parquet":
            record = {key: value for key, value in record.items() if key != "finish_reason"}
        assert parse_example(row)._replace(where="") == parse(**record)._replace(where="")


# ---- tokens ------------------------------------------------------------------------------------------------------


def test_token_ids_are_taken_as_they_are(tokenizer):
    example = parse(**IDS, completion_mask=[1, 0, 1], logprobs=[-0.5, 0, -2], entropies=[1, 0, 1], problem_id="p")

    class Untouchable:
        eos_token_id = 1

        def __getattr__(self, name):
            raise AssertionError(name)

    ((rollout,),) = tokenize([example], Renderer(Untouchable()))
    assert rollout.problem == "p"
    assert rollout.solution == ((5, 6), (7, 8, 9), (True, False, True))
    assert rollout.logprobs == (-0.5, 0, -2)
    assert (rollout.reward, rollout.step_rewards, rollout.truncated) == (1, None, False)
    assert tokenize([parse(**IDS)], Renderer(tokenizer))[0][0].solution == ((5, 6), (7, 8, 9), None)


@pytest.mark.parametrize("ending", [{"finish_reason": "length"}, {"truncated": True}, {"truncated": 1}])
def test_text_that_was_cut_off_has_no_end_token(tokenizer, ending):
    ((rollout, output),) = tokens_of(parse(**ONE, **ending), tokenizer)
    assert (rollout.truncated, output) == (True, "[fine]")
    ((whole, output),) = tokens_of(parse(**ONE, finish_reason="stop", truncated=False), tokenizer)
    assert (whole.truncated, output) == (False, "[fine] [<end>]")


def test_each_of_several_answers_says_whether_it_was_cut_off(tokenizer):
    values = {"prompt": "w1", "answers": ["w2", "w3", "w4"], "rewards": [1, 0, 2]}
    example = parse(**values, finish_reason=["stop", "length", None], turn_rewards=[[5], [6], [7]])
    named = tokens_of(example, tokenizer)
    assert [output for _, output in named] == ["[w2] [<end>]", "[w3]", "[w4] [<end>]"]
    assert [rollout.truncated for rollout, _ in named] == [False, True, False]
    assert [rollout.step_rewards for rollout, _ in named] == [(0, 5), (6,), (0, 7)]
    assert [rollout.reward for rollout, _ in named] == [1, 0, 2]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["told apart by rendering", "marked by the template"])
def test_the_end_token_of_a_message_that_was_cut_off_does_not_count(chat_tokenizer, template):  # noqa: F811
    for messages, expected in (
        ([USER, RIGHT], "[fine]"),
        ([USER, CALL], "[call] [search]"),
        ([USER, CALL, TOOL, RIGHT], "[call] [search] [</s>] <s> tool w4 w5 w6 </s> <s> assistant [fine]"),
        ([USER, CALL, TOOL], "[call] [search] [</s>]"),  # the tool's output was the last: each answer is whole
    ):
        ((rollout, output),) = tokens_of(parse(messages=messages, reward=1, truncated=True), chat_tokenizer, template)
        assert (rollout.truncated, output) == (True, expected)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["told apart by rendering", "marked by the template"])
def test_a_reward_of_a_turn_is_given_at_its_last_counted_token(chat_tokenizer, template):  # noqa: F811
    example = parse(messages=CONVERSATION, reward=9, turn_rewards=[1, 2, 4])
    ((rollout, output),) = tokens_of(example, chat_tokenizer, template)
    words = output.split()
    given = {i: reward for i, reward in enumerate(rollout.step_rewards) if reward}
    assert given == {2: 1, 12: 2, len(words) - 1: 4}
    assert [words[i] for i in given] == ["[</s>]"] * 3
    assert len(rollout.step_rewards) == len(rollout.solution.output_ids)
    assert rollout.reward == 9


def test_a_reward_of_a_turn_of_ids_is_given_at_the_end_of_its_run(tokenizer):
    values = {"prompt_ids": [5], "completion_ids": [6, 7, 8, 9, 6, 7], "reward": 0, "turn_rewards": [1, -2]}
    ((rollout, _),) = tokens_of(parse(**values, completion_mask=[0, 1, 1, 0, 1, 0]), tokenizer)
    assert rollout.step_rewards == (0, 0, 1, 0, -2, 0)


def test_a_template_that_marks_other_parts_than_turns_is_refused(chat_tokenizer):  # noqa: F811
    twice = MARKED.replace("{% for call", "{% endgeneration %} tool {% generation %}{% for call")
    example = parse(messages=[USER, {**CALL, "content": "w3"}], reward=1, turn_rewards=[1])
    with pytest.raises(UserError, match=r"file\.jsonl:7: 'turn_rewards' .* template marks, got 1 for 2"):
        tokens_of(example, chat_tokenizer, twice)


# ---- what trainers write -----------------------------------------------------------------------------------------

# verl's `trainer.rollout_data_dir`: a file a step, prompts decoded without their special tokens.
VERL = {"input": "system\nw1\nuser\nw2 w3\nassistant\n", "output": "w4 fine", "gts": "4", "score": 1.0, "step": 1}


def test_verls_dumps_are_read_without_being_rewritten(tmp_path, tokenizer, chat_tokenizer):  # noqa: F811
    write_lines(tmp_path / "dump" / "10.jsonl", {**VERL, "score": -1.0, "step": 10, "acc": False})
    write_lines(tmp_path / "dump" / "9.jsonl", {**VERL, "step": 9, "correct": True})
    rows = list(Source(tmp_path / "dump", columns={"prompt": "input", "completion": "output", "reward": "score"}))
    examples = [parse_example(row) for row in rows]
    assert [example.answers[0].reward for example in examples] == [1, -1]
    ((rollout, output),) = tokens_of(examples[0], tokenizer)
    assert output == "[w4] [fine] [<end>]"
    assert tokenizer.decode(list(rollout.solution.prompt_ids)).split()[-3:] == ["w2", "w3", "<unk>"]
    assert [lost_special_tokens(example, chat_tokenizer) for example in examples] == [True, True]


def test_trls_completion_files_are_read_without_being_rewritten(tmp_path, tokenizer):
    folder = tmp_path / "completions"
    folder.mkdir()
    for step in (5, 10):
        table = {"step": [step] * 2, "prompt": ["w1", "w2"], "completion": ["fine", "broken"]}
        table |= {"accuracy_reward": [1.0, 0.0], "length_reward": [-3.0, float(step)], "advantage": [0.7, -0.7]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"completions_{step:05d}.parquet")
    examples = [parse_example(row) for row in Source(folder, columns={"reward": "length_reward"})]
    assert [example.answers[0].reward for example in examples] == [-3, 5, -3, 10]
    assert tokens_of(examples[1], tokenizer)[0][1] == "[broken] [<end>]"


NEMO_GYM = {
    "responses_create_params": {
        "input": [
            {"type": "message", "role": "system", "content": "w1"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "w2"}], "phase": None},
        ],
        "tools": [{"type": "function", "name": "search", "parameters": {"type": "object"}, "strict": True}],
    },
    "response": {
        "incomplete_details": None,
        "output": [
            {"type": "reasoning", "id": "r0", "summary": [], "encrypted_content": None},
            {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "w9"}]},
            {"type": "function_call", "call_id": "c1", "name": "search", "arguments": '{"q": "w3"}', "id": "f1"},
            {"type": "function_call_output", "call_id": "c1", "output": "w4 w5"},
            {
                "type": "message",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "fi", "annotations": []},
                    {"type": "output_text", "text": "ne", "annotations": []},
                ],
            },
        ],
    },
    "reward": 0.25,
    "messages": [{"role": "user", "content": "w2"}],  # of the data set, beside the rollout
    "tools": [],
    "_ng_task_index": 3,
    "_ng_rollout_index": 0,
}
GYM_COLUMNS = {
    "prompt": "responses_create_params.input",
    "completion": "response.output",
    "reward": "reward",
    "tools": "responses_create_params.tools",
    "problem_id": "_ng_task_index",
    "finish_reason": "response.incomplete_details.reason",
}


def test_nemo_gyms_rollouts_are_read_without_being_rewritten(tmp_path, chat_tokenizer):  # noqa: F811
    response = {**NEMO_GYM["response"], "incomplete_details": {"reason": "max_output_tokens"}}
    write_lines(tmp_path / "rollouts.jsonl", NEMO_GYM, {**NEMO_GYM, "response": response})
    examples = [parse_example(row) for row in Source(tmp_path / "rollouts.jsonl", columns=GYM_COLUMNS)]
    assert examples[0].prompt == [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"q": "w3"}'}}
    assert examples[0].answers[0].content == [
        {"role": "assistant", "content": None, "reasoning_content": "w9", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "w4 w5"},
        {"role": "assistant", "content": "fine"},
    ]
    assert examples[0].tools[0]["function"]["name"] == "search"
    assert (examples[0].problem, examples[0].answers[0].reward) == ("3", 0.25)
    gap = "<s> tool w4 w5 </s> <s> assistant"
    outputs = [tokens_of(example, chat_tokenizer)[0][1] for example in examples]
    assert outputs == [f"[call] [search] [</s>] {gap} [fine] [</s>]", f"[call] [search] [</s>] {gap} [fine]"]


def test_the_token_ids_that_nemo_gym_records_are_reached_by_their_place(tmp_path, tokenizer):
    item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "fine"}]}
    item |= {"prompt_token_ids": [5, 6], "generation_token_ids": [3, 1], "generation_log_probs": [-0.5, -0.25]}
    write_lines(tmp_path / "rollouts.jsonl", {"response": {"output": [item]}, "reward": 1.0})
    last = "response.output.-1"
    names = {
        "prompt_ids": "prompt_token_ids",
        "completion_ids": "generation_token_ids",
        "logprobs": "generation_log_probs",
    }
    columns = {ours: f"{last}.{theirs}" for ours, theirs in names.items()}
    (example,) = (parse_example(row) for row in Source(tmp_path / "rollouts.jsonl", columns=columns))
    ((rollout, _),) = tokens_of(example, tokenizer)
    assert rollout.solution == ((5, 6), (3, 1), None)
    assert rollout.logprobs == (-0.5, -0.25)


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        ("system\nw1\nuser\nw2\nassistant\n", True),
        ("user\nw2\nmodel\n", True),
        ("system\n\nw1user\n\nw2assistant\n\n", True),
        ("user\nw2\nassistant\n<think>\n", True),
        ("<s> user\nw2</s>\nassistant\n", False),
        ("user\nw2</s>\nassistant\n", False),
        ("users\nw2\nassistant\n", False),
        ("w1 w2\nassistant\n", False),
        ("user\nw2 w3\n", False),
    ],
)
def test_a_prompt_that_lost_its_special_tokens_is_known(chat_tokenizer, tokenizer, prompt, lost):  # noqa: F811
    example = parse(prompt=prompt, completion="fine", reward=1)
    assert lost_special_tokens(example, chat_tokenizer) == lost
    assert not lost_special_tokens(example, tokenizer)  # it has no chat template, so nothing says that it was a chat
    assert not lost_special_tokens(parse(**IDS), chat_tokenizer)
