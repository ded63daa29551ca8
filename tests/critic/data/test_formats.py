"""Data in the formats and shapes it comes in: files, datasets, chats, labels, lists; sampling and the report."""

import csv
import json
import random
import sys
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from critic_testing import WORDS, make_records
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lambda_return_ext import compute_lambda_return
from lambda_return_ext.critic.config import DataConfig, HeadConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.chat import Renderer
from lambda_return_ext.critic.data.rollouts import solutions_of, tokenize
from lambda_return_ext.critic.data.rows import parse_example
from lambda_return_ext.critic.data.sources import Row, Source
from lambda_return_ext.critic.data.split import read_rows, select_data
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.evaluation.baselines import likelihood_baseline
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt
from lambda_return_ext.critic.model.value_model import ValueModel

RECORDS = make_records(problems=8, pairs=2)


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return Backbone(str(tiny_backbone)).tokenizer()


def select(path, tokenizer, **settings):
    config = DataConfig(path=str(path), **{"max_length": 64, "validation_problems": 2, **settings})
    return select_data(read_rows(config), tokenizer, config)


def parse(unlabelled=False, **values):
    return parse_example(Row("file.jsonl:7", values), unlabelled)


# ---- formats -----------------------------------------------------------------------------------------------------


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, RECORDS[0])
        writer.writeheader()
        writer.writerows(RECORDS)


WRITERS = {
    "data.jsonl": lambda path: path.write_text("".join(json.dumps(record) + "\n\n" for record in RECORDS)),
    "list.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "lines.json": lambda path: path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS)),
    "data.csv": write_csv,
    "data.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
    "saved_splits": lambda path: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:2])}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_pairs(tmp_path, write_pairs, tokenizer, name):
    WRITERS[name](tmp_path / name)
    expected = select(write_pairs(RECORDS), tokenizer)
    got = select(tmp_path / name, tokenizer)
    assert (got.train, got.validation) == (expected.train, expected.validation)
    digest = Source(tmp_path / name).sha256()
    assert digest == Source(tmp_path / name).sha256() != Source(write_pairs(RECORDS[1:])).sha256()


def test_a_folder_of_files_and_a_split_are_for_datasets_to_find(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({**RECORDS[0], "problem_id": split}) + "\n")
    assert [row.values["problem_id"] for row in Source(folder, split="test")] == ["test"]
    with pytest.raises(UserError, match=r"could not be loaded by `datasets`: .*validation"):
        Source(folder, split="validation")
    WRITERS["saved_splits"](tmp_path / "saved")
    assert len(list(Source(tmp_path / "saved", split="test"))) == 2
    with pytest.raises(UserError, match=r"data.split must be one of \['test', 'train'\] for .*, got 'valid'"):
        Source(tmp_path / "saved", split="valid")


def test_a_name_that_is_no_path_is_asked_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if path == "owner/gone":
            raise datasets.exceptions.DatasetNotFoundError("it is not on the hub")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(Source("owner/name", "small", "test"))
    assert asked == [("owner/name", "small", "test")]
    assert [row.values for row in rows] == RECORDS
    assert rows[2].where == "owner/name [test], row 3"
    with pytest.raises(
        UserError, match=r"owner/gone is no file or folder here, and on the hub could not be loaded .*: it is not"
    ):
        Source("owner/gone")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", r"data.path must be a file that ends in .jsonl, .json, .parquet, .csv, .* got .*a.txt"),
        ("a.json", "[{}, 3]", r"a.json, row 2: a line must be one JSON object, got int"),
        ("a.json", "[{", r"a.json: the file must be a JSON list of objects"),
        ("a.parquet", "no", r"a.parquet must be a Parquet file"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl:1: a line must be one JSON object, .*recursion"),
        ("a.json", "[" * 100_000, r"a.json: the file must be a JSON list of objects, .*recursion"),
        ("a.csv", f"messages,label\n{'[' * 100_000},1\n", r"a.csv:2: 'messages' must be a JSON list, .*recursion"),
        ("a.jsonl", r'{"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}', r"a.jsonl:1: 'chosen' must be Unicode"),
        ("a.csv", "prompt,chosen\na\n", r"a.csv:2: a row must have one cell for each of the columns .*, got 1$"),
        ("a.csv", "prompt,chosen\na,b\na,b,c\n", r"a.csv:3: a row must have one cell .*, got 2 and more"),
        ("a.csv", 'prompt,chosen\na,"b\n', r"a.csv:2: the file must be CSV in UTF-8"),
        ("a.csv", "prompt,chosen,chosen\na,b,c\n", r"a.csv:1: every column must have a name of its own"),
        ("a.csv", "prompt,chosen\n\"[{'role': 'user'}]\",b\n", r"a.csv:2: 'prompt' must be text, or messages as"),
        ("a.csv", "prompt,correct,incorrect\na,b,c\n", r"a.csv:2: 'correct' must be a JSON list"),
        ("a.csv", "prompt,completion,label\na,b,perhaps\n", r"a.csv:2: 'label' must be true or false, .*got 'perhaps'"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        [parse_example(row) for row in list(Source(tmp_path / name))]


def test_a_json_list_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1), encoding="utf-8-sig")
    assert [row.values for row in Source(tmp_path / "a.json")] == RECORDS


def damaged_parquet(path, where):
    """A Parquet file of which a part is overwritten: its description at the end, its data, or the bytes of a text."""
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, **plain)
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = {"footer": footer + 4, "page": 4, "text": content.index(b"fine")}[where]
    content[at : at + 4] = b"\xff" * 4
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["footer", "page", "text"])
def test_a_damaged_parquet_file_is_named(tmp_path, where):
    damaged_parquet(tmp_path / "a.parquet", where)
    with pytest.raises(UserError, match=r"a\.parquet must be a Parquet file: .+"):
        list(Source(tmp_path / "a.parquet"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    source = Source(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl could not be read: .*No such file"):
        list(source)


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs the Python package 'pyarrow': pip install 'lambda-return-ext\[data\]'"):
        list(Source(path))


def test_jsonl_is_read_line_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nnot json\n')
    rows = iter(Source(path))
    assert next(rows).values == {"a": 1}  # the bad line was not looked at yet
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        next(rows)


# ---- shapes ------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "w1 w2"}
RIGHT = {"role": "assistant", "content": "fine"}
WRONG = {"role": "assistant", "content": "broken"}


def test_completions_and_lists_are_pooled_by_problem(write_pairs, tokenizer):
    labelled, lists = [], []
    for problem in range(8):
        prompt, right, wrong = f"w{problem}", ["fine", "fine fine", "w9"], ["broken", "broken broken"]
        for text, label in [*((text, True) for text in right), *((text, 0) for text in wrong)]:
            labelled.append({"prompt": prompt, "completion": text, "label": label})
        lists.append({"prompt": prompt, "correct": right, "incorrect": wrong})
    data, other = (
        select(write_pairs(records, name), tokenizer) for records, name in ((labelled, "a.jsonl"), (lists, "b.jsonl"))
    )
    assert len(data.train) == 6 * 3 * 2
    assert (data.train, data.validation) == (other.train, other.validation)
    fine, broken = (tokenizer.convert_tokens_to_ids(word) for word in ("fine", "broken"))
    for pair in data.train:
        assert broken not in pair.right.solution.output_ids
        assert fine not in pair.wrong.solution.output_ids


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": [USER], "chosen": "fine", "rejected": "broken"},
        {"prompt": "w1 w2", "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": "w1 w2", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
        {"prompt": [USER], "correct": [[RIGHT]], "incorrect": ["broken"]},
    ],
)
def test_ways_to_write_the_same_chat(values):
    example = parse(**values)
    assert example.prompt == [USER]
    assert [answer.content for answer in example.answers] == [[RIGHT], [WRONG]]
    assert [answer.reward for answer in example.answers] == [1, 0]
    assert example.task == parse(chosen=[USER, RIGHT], rejected=[USER, WRONG]).task


def test_whole_conversations_share_their_beginning_as_the_prompt():
    history = [USER, RIGHT, USER]
    assert parse(chosen=[*history, RIGHT], rejected=[*history, WRONG]).prompt == history
    assert parse(chosen=[*history, RIGHT], rejected=[*history, RIGHT, USER, WRONG]).prompt == history
    assert parse(messages=[*history, RIGHT], label=True).prompt == [USER]
    # The task is what stands before the first answer, wherever the answers part.
    tasks = {parse(chosen=[*start, RIGHT], rejected=[*start, WRONG]).task for start in ([USER], history)}
    assert len(tasks) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "w1"}, r"a row must have the keys prompt, chosen and rejected; .* got the keys \['prompt'\]"),
        ({"prompt": "w1", "chosen": "w2"}, r"the key 'rejected' must be there"),
        ({"prompt": "w1", "correct": ["w2"]}, r"the key 'incorrect' must be there"),
        ({"prompt": "w1", "completion": "w2"}, r"the key 'label' must be there"),
        ({"completion": "w2", "label": True}, r"the key 'prompt' must be there"),
        (
            {"prompt": "w1", "completion": "w2", "label": 1.5},
            r"'label' must be true or false, 1 or 0, or a number between, got 1.5",
        ),
        ({"prompt": "w1", "correct": "w2", "incorrect": []}, r"'correct' must be a list of answers, got str"),
        ({"prompt": "w1", "correct": [], "incorrect": []}, r"must hold at least one answer, got none"),
        ({"prompt": "w1", "correct": ["w2", " "], "incorrect": []}, r"'correct\[1\]' must not be empty, got ' '"),
        ({"prompt": 3, "chosen": "w2", "rejected": "w2"}, r"'prompt' must be a string or a list of chat .*, got int"),
        ({"prompt": [], "chosen": "w2", "rejected": "w2"}, r"'prompt' must not be empty, got \[\]"),
        ({"messages": [{"role": "user"}], "label": 1}, r"'messages', message 0, must have a string as 'content'"),
        ({"messages": ["hello"], "label": 1}, r"'messages', message 0, must be an object with a 'role', got 'hello'"),
        ({"messages": [USER], "label": 1}, r"'messages' must have a message of the assistant, got none"),
        ({"chosen": [USER, RIGHT], "rejected": "broken"}, r"all answers must be whole conversations or none, got both"),
        ({"chosen": [RIGHT], "rejected": [WRONG]}, r"must begin with the same messages, got others"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": "x"}, r"'tools' must be a list, got str"),
        ({"problem_id": "\udfff", "prompt": "a", "chosen": "b", "rejected": "c"}, r"'problem_id' must be Unicode text"),
        ({"messages": [USER, {**RIGHT, "content": "\ud800"}], "label": 1}, r"'messages' .* got .*surrogates not"),
        ({"problem_id": " ", "prompt": "a", "chosen": "b", "rejected": "c"}, r"'problem_id' must not be empty"),
    ],
)
def test_a_bad_row_is_named_with_its_key(values, message):
    with pytest.raises(UserError, match=rf"file\.jsonl:7: .*{message}"):
        parse(**values)


def test_what_is_ignored_is_not_looked_at():
    values = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert parse(**values, note="\ud800") == parse(**values)


def test_rows_without_a_label_are_for_those_who_ask():
    assert parse(unlabelled=True, prompt="w1", completion="w2").answers[0].reward is None


# ---- chats -------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<s>system tools {{ tools | length }}</s>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'nobody' %}{{ raise_exception('who is nobody') }}{% endif %}<s>{{ m.role }} {{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %} call {{ call.function.name }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %} call {{ call.function.name }}{% endfor %}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)
FORGETFUL = (  # as some templates do with a model's reasoning: earlier answers are written without it
    "{% for m in messages %}<s>{{ m.role }} {% if m.role == 'assistant' and loop.last %}think {% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer():
    words = ["<pad>", "</s>", "<unk>", "<s>", "user", "assistant", "tool", "system", "tools", "1", "call", "search"]
    words += ["fine", "broken", "think", *WORDS[:30]]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, **tokens, additional_special_tokens=["<s>"], chat_template=TEMPLATE
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer("<s>user w1</s>\n")["input_ids"]) == ["<s>", "user", "w1", "</s>"]
    return tokenizer


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"q": "w3"}}}],
}
TOOL = {"role": "tool", "content": "w4 w5 w6"}
CONVERSATION = [USER, CALL, TOOL, RIGHT, {"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8 w9"}]


def outputs_of(example, tokenizer, template=None):
    """For each answer the prompt's tokens and, of what follows, each with whether it counts."""
    named = []
    for solution, *_ in (rollout[1:] for rollout in tokenize([example], Renderer(tokenizer, template))[0]):
        mask = solution.output_mask or (True,) * len(solution.output_ids)
        prompt, output = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in solution[:2])
        named.append((" ".join(prompt), " ".join(f"[{t}]" if m else t for t, m in zip(output, mask, strict=True))))
    return named


@pytest.mark.parametrize("template", [None, MARKED], ids=["told apart by rendering", "marked by the template"])
def test_in_a_tool_use_conversation_only_the_tokens_of_the_assistant_count(chat_tokenizer, template):
    ((prompt, output),) = outputs_of(parse(messages=CONVERSATION, label=True), chat_tokenizer, template)
    assert prompt == "<s> user w1 w2 </s> <s> assistant"
    assert output == (
        "[call] [search] [</s>] <s> tool w4 w5 w6 </s> <s> assistant [fine] [</s>] "
        "<s> user w7 </s> <s> assistant [w8] [w9] [</s>]"
    )


@pytest.mark.parametrize("template", [None, MARKED])
def test_answers_within_the_prompt_do_not_count(chat_tokenizer, template):
    example = parse(prompt=CONVERSATION[:3], chosen=[RIGHT], rejected=[WRONG])
    prompt = "<s> user w1 w2 </s> <s> assistant call search </s> <s> tool w4 w5 w6 </s> <s> assistant"
    assert outputs_of(example, chat_tokenizer, template) == [(prompt, "[fine] [</s>]"), (prompt, "[broken] [</s>]")]


def test_tools_reach_the_template(chat_tokenizer):
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    ((prompt, _),) = outputs_of(parse(messages=[USER, RIGHT], label=1, tools=[tool]), chat_tokenizer)
    assert prompt == "<s> system tools 1 </s> <s> user w1 w2 </s> <s> assistant"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (
            [USER, RIGHT, USER, RIGHT],
            FORGETFUL,
            r"file\.jsonl:7: 'messages' .* writes message 1 in another way .*generation",
        ),
        ([{"role": "nobody", "content": "w1"}, RIGHT], None, r"file\.jsonl:7: .*chat template takes: who is nobody"),
    ],
)
def test_a_template_that_does_not_fit_says_so(chat_tokenizer, messages, template, message):
    with pytest.raises(UserError, match=message):
        outputs_of(parse(messages=messages, label=True), chat_tokenizer, template)


def test_a_chat_without_a_template(tokenizer, write_pairs, tmp_path):
    path = write_pairs([{"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}] * 2)
    with pytest.raises(UserError, match=r"data.chat_template must be a Jinja file .* as .*pairs\.jsonl:1 is one"):
        select(path, tokenizer)
    with pytest.raises(UserError, match=r"data.chat_template must be a readable Jinja file, got 'none.jinja'"):
        select(path, tokenizer, chat_template="none.jinja")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    records = [
        {"chosen": [{**USER, "content": f"w{i}"}, RIGHT], "rejected": [{**USER, "content": f"w{i}"}, WRONG]}
        for i in range(5)
    ]
    data = select(write_pairs(records), tokenizer, chat_template=str(tmp_path / "chat.jinja"))
    assert len(data.train) == 3


def conversations(problems=12, seed=0):
    rng = random.Random(seed)
    records = []
    for problem in range(problems):
        ask = {"role": "user", "content": f"w{problem} w1"}

        def chat(word, ask=ask):
            tool = {"role": "tool", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))}
            return [ask, CALL, tool, {"role": "assistant", "content": f"{word} w2"}]

        records.append({"prompt": [ask], "chosen": chat("fine")[1:], "rejected": chat("broken")[1:]})
    return records


def test_gaps_reach_the_batch_and_change_nothing_but_the_mask(tiny_backbone, chat_tokenizer, write_pairs):
    data = select(write_pairs(conversations()), chat_tokenizer)
    batch = Collator(0)(data.train)
    for row, pair in enumerate([*(p.right for p in data.train), *(p.wrong for p in data.train)]):
        start, end = len(pair.solution.prompt_ids), pair.length
        assert batch.loss_mask[row, start:end].tolist() == list(pair.solution.output_mask)
        assert batch.loss_mask[row].sum() == pair.outputs == 6
        assert not batch.loss_mask[row, :start].any()
        assert not batch.loss_mask[row, end:].any()
    # The return skips the gap: nothing that stands in it reaches a target.
    values = torch.rand(batch.inputs.shape)
    poisoned = values.masked_fill(~batch.loss_mask, float("nan"))
    targets = [compute_lambda_return(v, batch.terminal_rewards, batch.loss_mask) for v in (values, poisoned)]
    assert torch.equal(*targets)
    # Cached features are those of the whole forward, gaps included.
    model = ValueModel(Backbone(str(tiny_backbone)).base_model(None, 64), HeadConfig(type="linear"), None, True).eval()
    features = compute_features(model.backbone, group_by_prompt(solutions_of(data.train)), lambda tokens: None)
    cached = Collator(0, features)(data.train)
    with torch.no_grad():
        whole, short = (model(b.inputs, b.attention_mask)[b.loss_mask] for b in (batch, cached))
    torch.testing.assert_close(whole, short, rtol=1e-4, atol=1e-5)


def test_the_likelihood_of_an_answer_leaves_its_gaps_out(tiny_backbone, chat_tokenizer, write_pairs):
    pairs = select(write_pairs(conversations()), chat_tokenizer).train
    model = Backbone(str(tiny_backbone)).language_model().eval()

    def mean_log_probability(rollout):
        solution = rollout.solution
        ids = torch.tensor([solution.prompt_ids + solution.output_ids])
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits.log_softmax(-1)
        start = len(solution.prompt_ids)
        counted = [start + i for i, one in enumerate(solution.output_mask) if one]
        return sum(log_probabilities[0, i - 1, ids[0, i]].item() for i in counted) / len(counted)

    expected = sum(mean_log_probability(pair.right) > mean_log_probability(pair.wrong) for pair in pairs) / len(pairs)
    assert likelihood_baseline(model, pairs, group_by_prompt(solutions_of(pairs)), lambda tokens: None) == expected


CHATS = [
    *conversations(4),
    *({"chosen": [{**USER, "content": text}, RIGHT], "rejected": [{**USER, "content": text}, WRONG]} for text in "ab"),
    {"prompt": [USER, RIGHT, USER], "completion": [RIGHT], "label": True},
    {"prompt": "[w1] [2]", "completion": '[{"name": "w2"}]', "label": False},
    {"messages": CONVERSATION, "label": True, "tools": [{"type": "function"}]},
    {"prompt": [{"content": "w9", "role": "user"}], "correct": [[RIGHT], "w2"], "incorrect": []},
    {"prompt": [{"name": "anna", **USER}], "chosen": "fine", "rejected": [WRONG]},
]


def write_chats_as_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for record in CHATS for key in record))
        writer.writeheader()
        for record in CHATS:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})


@pytest.mark.parametrize("name", ["chats.csv", "folder"])
def test_chats_in_a_csv_file_are_chats(chat_tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write_chats_as_csv(tmp_path / "chats.csv" if name == "chats.csv" else tmp_path / "folder" / "train.csv")
    expected = [parse(**record) for record in CHATS]
    got = [parse_example(row) for row in Source(tmp_path / name)]
    assert [e._replace(where="") for e in got] == [e._replace(where="") for e in expected]
    assert [outputs_of(e, chat_tokenizer) for e in got] == [outputs_of(e, chat_tokenizer) for e in expected]
    assert outputs_of(got[4], chat_tokenizer)[0] == ("<s> user <unk> </s> <s> assistant", "[fine] [</s>]")


# ---- sampling ----------------------------------------------------------------------------------------------------


def pooled(right, wrong, problems=4):
    """Problems with answers of so many words."""

    def texts(word, lengths):
        return [" ".join([word, *[f"w{i}"] * (n - 1)]) for i, n in enumerate(lengths)]

    return [
        {"prompt": f"w{problem}", "correct": texts("fine", right), "incorrect": texts("broken", wrong)}
        for problem in range(problems)
    ]


@pytest.mark.parametrize(("right", "wrong", "wanted"), [(3, 5, 5), (5, 3, 7), (4, 4, 8), (1, 6, 4), (2, 3, None)])
def test_free_solutions_are_paired_evenly(write_pairs, tokenizer, right, wrong, wanted):
    path = write_pairs(pooled(range(2, right + 2), range(2, wrong + 2)))
    data = select(path, tokenizer, pairs_per_problem=wanted)
    assert data.possible == {"train": 2 * right * wrong, "validation": 2 * right * wrong}
    by_problem = {}
    for pair in data.train:
        by_problem.setdefault(pair.problem, []).append(pair)
    for pairs in by_problem.values():
        assert len(set(pairs)) == len(pairs) == (wanted or right * wrong)
        for side in ("right", "wrong"):
            used = Counter(getattr(pair, side) for pair in pairs)
            everything = [used[s] for s in used] + [0] * ({"right": right, "wrong": wrong}[side] - len(used))
            assert max(everything) - min(everything) <= 1
    other = select(path, tokenizer, pairs_per_problem=wanted, split_seed=1)
    if wanted and wanted < right * wrong:
        assert set(other.train) != set(data.train)


def test_pairs_of_one_length_bin_leave_no_signal_in_the_length(write_pairs, tokenizer):
    rng = random.Random(0)
    # Right answers are shorter by far, as those of a model that rambles when it is lost.
    records = [
        pooled([rng.randint(2, 30) for _ in range(8)], [rng.randint(15, 50) for _ in range(8)], 20)[i]
        for i in range(20)
    ]
    free = select(write_pairs(records), tokenizer).report()["train"]
    assert free["right_shorter"] > 0.8
    data = select(write_pairs(records), tokenizer, length_bin=2)
    binned = data.report()["train"]
    assert all(pair.right.outputs // 2 == pair.wrong.outputs // 2 for pair in data.train + data.validation)
    assert abs(binned["mean_length_right"] - binned["mean_length_wrong"]) < 1
    assert abs(binned["right_shorter"] - binned["right_longer"]) < 0.2
    assert data.dropped["solutions without a partner of another reward in their bin of data.length_bin"] > 0
    # Given pairs are kept or dropped as they are.
    given = [{"prompt": f"w{i}", "chosen": "w1 w2 w3", "rejected": "w1 " * (2 + i)} for i in range(6)]
    kept = select(write_pairs(given), tokenizer, length_bin=4, validation_problems=1)
    assert kept.dropped["pairs whose two sides are in different bins of data.length_bin"] == 2  # 3 | 4 5 6 7 | 8 tokens


def test_everything_left_out_is_counted(write_pairs, tokenizer):
    good = pooled([2, 3], [2])
    odd = [
        {"prompt": "w30", "chosen": "w1", "rejected": "w1"},
        *[{"prompt": "w31", "chosen": "w1", "rejected": "w2"}] * 2,
        {"prompt": "w32", "correct": ["w1", "w2", "w2"], "incorrect": ["w1", "w3", "w4 " * 70]},
        {"prompt": "w33", "completion": "w1", "label": True},
    ]
    data = select(write_pairs([*good, *odd]), tokenizer)
    assert data.dropped == {
        "pairs whose two sides are the same": 1,
        "repeated pairs": 1,
        "repeated solutions": 1,
        "solutions that have more than one reward": 1,
        "solutions that do not fit into data.max_length": 1,
        "problems without a pair": 2,
    }
    assert len(data.train) + len(data.validation) == 4 * 2 + 1 + 1


def test_solutions_without_an_output_token_are_dropped(write_pairs, tiny_backbone):
    tokenizer = Backbone(str(tiny_backbone)).tokenizer()
    tokenizer.eos_token = None
    real = type(tokenizer).__call__

    class Dropping(type(tokenizer)):
        """A tokenizer that has nothing for one word."""

        def __call__(self, texts, **kwargs):
            return real(self, [text.replace("void", "") for text in texts], **kwargs)

    tokenizer.__class__ = Dropping
    odd = [
        {"prompt": "w30", "chosen": "void", "rejected": "w1"},
        {"prompt": "w31", "correct": ["void", "w1"], "incorrect": ["w2"]},
    ]
    data = select(write_pairs([*pooled([2], [2]), *odd]), tokenizer)
    assert data.dropped == {
        "pairs with a solution that has no output token": 1,
        "solutions that have no output token": 1,
        "problems without a pair": 1,
    }


def test_a_prompt_may_lose_its_beginning_and_both_sides_the_same(write_pairs, tokenizer):
    records = [{"prompt": " ".join(WORDS[:i]), "chosen": "w1 w2 w3", "rejected": "w1"} for i in (4, 8, 12, 16)]
    data = select(write_pairs(records), tokenizer, max_length=12, overlong="truncate_prompt", validation_problems=1)
    assert data.truncated == data.report()["truncated_prompts"] == 2
    for pair in data.train + data.validation:
        assert pair.right.solution.prompt_ids == pair.wrong.solution.prompt_ids
        assert pair.length <= 12
        assert tokenizer.convert_ids_to_tokens(pair.right.solution.output_ids) == ["w1", "w2", "w3", "<end>"]
    cut = max(data.train + data.validation, key=lambda pair: pair.right.solution.prompt_ids)
    assert tokenizer.decode(list(cut.right.solution.prompt_ids)).split() == WORDS[8:16]


def test_the_report_counts_tokens(write_pairs, tokenizer):
    records = [{"prompt": f"w{i} w{i}", "chosen": "w1 w2 w3", "rejected": "w1"} for i in range(3)]
    report = select(write_pairs(records), tokenizer, validation_problems=1).report()
    assert report["train"] == {
        "problems": 2,
        "pairs": 2,
        "possible_pairs": 2,
        "tokens": 2 * (6 + 4),
        "output_tokens": 2 * (4 + 2),
        "mean_length_right": 4,
        "mean_length_wrong": 2,
        "right_longer": 1,
        "right_shorter": 0,
    }


# ---- batches -----------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_multiples(write_pairs, tokenizer):
    pairs = select(write_pairs(RECORDS), tokenizer).train
    plain, padded = (Collator(0, multiple=multiple)(pairs) for multiple in (1, 16))
    longest = plain.inputs.shape[1]
    assert padded.inputs.shape[1] == -(-longest // 16) * 16 > longest
    for name in ("inputs", "attention_mask", "loss_mask"):
        assert torch.equal(getattr(padded, name)[:, :longest], getattr(plain, name))
        assert not getattr(padded, name)[:, longest:].any()
    assert padded.tokens == plain.tokens
    features = {side: torch.randn(len(side.output_ids), 3) for side in solutions_of(pairs)}
    assert Collator(0, features, 8)(pairs).inputs.shape[1] % 8 == 0
