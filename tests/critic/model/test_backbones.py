"""Backbones of several families, adapters, heads, and critics that are saved for other programs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from critic_testing import (
    MIXTURE,
    SIZES,
    VOCABULARY,
    WELL_CONDITIONED,
    finish,
    make_backbone,
    pair_of,
    save_backbone,
    steps_of,
    torchrun,
)
from transformers import AutoModelForTokenClassification

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.config import HeadConfig, LoraConfig, ModelConfig, TrainingConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.rollouts import Solution, solutions_of
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.evaluation import baselines
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt
from lambda_return_ext.critic.model.value_model import ValueModel, build_model, check_packing
from lambda_return_ext.critic.training import trainer
from lambda_return_ext.critic.training.optimization import parameter_groups

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Mistral"]
WITH_LORA = ["model.cache_features=false", "model.lora.rank=4", "model.lora.alpha=8", "training.max_steps=6"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A tiny language model of one family, in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, pad_token_id=0)
    getattr(transformers, f"{request.param}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    lengths = torch.tensor([[9], [5], [7]])
    return torch.randint(3, len(VOCABULARY), (3, 9)), torch.arange(9) < lengths


def build(folder, **settings):
    torch.manual_seed(0)
    return build_model(Backbone(ModelConfig(backbone=str(folder), **settings)), 64, None).eval()


def randomise_adapters(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


# ---- saved for others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 4])
def test_a_linear_critic_of_any_family_is_a_token_classifier_of_transformers(family, inputs, tmp_path, lora):
    settings = {"lora": LoraConfig(rank=lora, alpha=8), "cache_features": False}
    model = build(family, head=HeadConfig(type="linear"), **settings)
    randomise_adapters(model)
    ids, mask = inputs
    with torch.no_grad():
        expected = model(ids, mask)[mask]
        assert expected.std() > 0.01
        model.save_pretrained(tmp_path / "saved")
        again = ValueModel.from_pretrained(tmp_path / "saved")
        theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "saved")
        assert theirs.config.num_labels == 1
        assert theirs.config.problem_type == "regression"
        torch.testing.assert_close(again(ids, mask)[mask], expected, rtol=1e-4, atol=1e-5)
        logits = theirs.eval()(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(logits[mask], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["mlp", "sigmoid"])
def test_other_heads_come_back_too(tiny_backbone, inputs, tmp_path, head):
    model = build(tiny_backbone, head=HeadConfig(type=head, hidden_size=16))
    model.save_pretrained(tmp_path / "saved")
    again = ValueModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


def test_what_is_no_critic_is_refused(tiny_backbone, tmp_path):
    with pytest.raises(UserError, match=r"must be a folder that ValueModel.save_pretrained wrote"):
        ValueModel.from_pretrained(tmp_path)
    # A model without a value head: transformers would make one up.
    with pytest.raises(UserError, match=r"must hold every weight of a value model, got none for score\."):
        ValueModel.from_pretrained(tiny_backbone)
    config = transformers.AutoConfig.from_pretrained(tiny_backbone, num_labels=3)
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="must hold a model with one label, got 3"):
        ValueModel.from_pretrained(tmp_path / "three")


def test_export_writes_the_best_checkpoint_with_its_tokenizer(train, run_dir, inputs, tmp_path, capsys):
    assert train("training.max_steps=5", "model.head.type=linear") == 0
    folder = tmp_path / "exported"
    assert main(["export", str(run_dir), str(folder)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<end>"
    model = ValueModel.from_pretrained(folder)
    saved, _ = checkpoint.load_tensors(run_dir / "best.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert main(["export", str(run_dir), str(folder)]) == 2
    assert "FOLDER must not exist yet" in capsys.readouterr().err


# Of rank patterns that peft makes itself.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_adapters_of_a_mixture_of_experts_become_part_of_its_weights(inputs, tmp_path):
    backbone = make_backbone("Qwen3Moe", **MIXTURE)
    model = ValueModel(backbone, HeadConfig(type="linear"), None, True, LoraConfig(rank=2)).eval()
    randomise_adapters(model)
    ids, mask = inputs
    with torch.no_grad():
        expected = model(ids, mask)[mask]
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(
            ValueModel.from_pretrained(tmp_path)(ids, mask)[mask], expected, rtol=1e-4, atol=1e-5
        )


def test_a_linear_head_on_a_bfloat16_backbone_keeps_its_precision(tiny_backbone, tmp_path):
    model = build(tiny_backbone, head=HeadConfig(type="linear"), dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert torch.equal(ValueModel.from_pretrained(tmp_path).value_head.weight, model.value_head.weight)


def test_recurrent_layers_have_features_and_refuse_packing(tiny_backbone):
    model = ValueModel(make_backbone("Qwen3Next", **MIXTURE), HeadConfig(type="linear"), None, True).eval()
    prompt = (5, 6, 7)
    pair = pair_of("p", Solution(prompt, (8, 9)), Solution(prompt, (10, 11, 12, 13)))
    features = compute_features(model.backbone, group_by_prompt(solutions_of([pair])), lambda tokens: None)
    whole, cached = Collator(0)([pair]), Collator(0, features)([pair])
    with torch.no_grad():
        expected = model(whole.inputs, whole.attention_mask)[whole.loss_mask]
        got = model(cached.inputs, cached.attention_mask)[cached.loss_mask]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"data\.packing must be false for this backbone"):
        check_packing(model)
    check_packing(build(tiny_backbone))


LANGUAGE_MODELS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 0.7},
    "Granite": {"logits_scaling": 0.1},
    "OPT": {"word_embed_proj_dim": 16},
    "Qwen3Next": MIXTURE,
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_log_likelihoods_are_those_of_the_whole_forward_and_few_logits_are_there_at_once(monkeypatch, name):
    torch.manual_seed(0)
    settings = {**SIZES, "pad_token_id": 0, "initializer_range": 0.3, **LANGUAGE_MODELS[name]}
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prompt = (5, 6, 7)
    gaps = (True, False, True, True, False, True)
    solutions = [Solution(prompt, (8, 9)), Solution(prompt, (10, 11, 12, 13, 14, 15), gaps), Solution(prompt, (16,))]
    (group,) = group_by_prompt(solutions)

    def from_whole(solution):
        ids = torch.tensor([solution.prompt_ids + solution.output_ids])
        with torch.no_grad():
            rows = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        of_tokens = rows.gather(1, ids[0, len(prompt) :, None])[:, 0]
        return of_tokens[torch.tensor(solution.output_mask or [True] * len(of_tokens))]

    expected = [from_whole(solution) for solution in group.solutions]
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda *given: shapes.append(given[-1].shape))
    for rows_at_once, parts in ((100, [7]), (3, [3, 3, 1])):
        monkeypatch.setattr(baselines, "LOGITS_AT_ONCE", rows_at_once * len(VOCABULARY) + 1)
        shapes.clear()
        got = baselines.log_likelihoods(model, group)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert all(shape.numel() <= baselines.LOGITS_AT_ONCE for shape in shapes)
        assert [shape[1] for shape in shapes][-len(parts) :] == parts
    assert model(input_ids=torch.tensor([prompt]), use_cache=False).logits.shape[1] == len(prompt)  # whole again


# ---- what is loaded, and how -------------------------------------------------------------------------------------


def test_the_sigmoid_head_says_probabilities_and_starts_where_it_is_told(tiny_backbone, inputs):
    backbone = Backbone(ModelConfig(backbone=str(tiny_backbone), head=HeadConfig(type="sigmoid")))
    values = build_model(backbone, 64, 0.7)(*inputs)
    torch.testing.assert_close(values, torch.full_like(values, 0.7))
    values = build(tiny_backbone, head=HeadConfig(type="sigmoid"))(*inputs)
    assert 0 < values.min() < values.max() < 1


def test_dtype_and_attention_are_those_that_were_asked_for(tiny_backbone, inputs):
    exact = build(tiny_backbone)
    model = build(tiny_backbone, dtype="bfloat16", attn_implementation="eager")
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.value_head.parameters()} == {torch.float32}
    assert model.backbone.config._attn_implementation == "eager"
    got, expected = (m(*inputs)[inputs[1]] for m in (model, exact))
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.1


def test_from_scratch_has_other_weights_and_sizes(tiny_backbone):
    overrides = {"num_hidden_layers": 3, "hidden_size": 64}
    model = build(tiny_backbone, from_scratch=True, config_overrides=overrides)
    assert len(model.backbone.layers) == 3
    assert model.backbone.embed_tokens.weight.shape == (len(VOCABULARY), 64)
    torch.manual_seed(5)
    new = build_model(Backbone(ModelConfig(backbone=str(tiny_backbone), from_scratch=True)), 64, None)
    assert not torch.equal(new.backbone.embed_tokens.weight, build(tiny_backbone).backbone.embed_tokens.weight)


def test_a_backbone_from_scratch_trains_and_has_no_likelihood(train, run_dir):
    settings = ["model.from_scratch=true", "model.backbone_frozen=false", "model.cache_features=false"]
    assert train(*settings, "model.config_overrides={num_hidden_layers: 1}", "evaluation.baselines=true") == 0
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    assert len(results["baselines"]) == 1
    saved, _ = checkpoint.load_tensors(run_dir / "best.safetensors")
    assert {name.split(".")[2] for name in saved if name.startswith("backbone.layers")} == {"0"}


def save_multimodal(folder, name):
    """A tiny model of text and images, beside a tokenizer."""
    save_backbone(folder)
    (folder / "model.safetensors").unlink()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    if name == "Mistral3":
        text = {"model_type": "mistral", **SIZES}
        config = transformers.Mistral3Config(
            text_config=text, vision_config={"model_type": "pixtral", "head_dim": 16, **vision}
        )
    else:
        config = transformers.Gemma3Config(text_config=SIZES, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["Gemma3", "Mistral3"])
def test_of_a_model_of_text_and_images_the_text_part_is_the_backbone(train, run_dir, inputs, tmp_path, name):
    theirs = save_multimodal(tmp_path / name, name).eval()
    ids, mask = inputs
    model = build(tmp_path / name)
    assert not any("vision" in key for key in model.state_dict())
    with torch.no_grad():
        expected = theirs.model(input_ids=ids, attention_mask=mask).last_hidden_state[mask]
        got = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state[mask]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(build(tmp_path / name, layers=1).backbone.layers) == 1
    scratch = build(tmp_path / name, from_scratch=True, config_overrides={"num_hidden_layers": 1})
    assert len(scratch.backbone.layers) == 1
    assert train(f"model.backbone={tmp_path / name}", "training.max_steps=4", "evaluation.baselines=true") == 0
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    assert "likelihood" in results["baselines"]
    assert main(["export", str(run_dir), str(tmp_path / "exported")]) == 0
    again = ValueModel.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(
            again.backbone(input_ids=ids, attention_mask=mask).last_hidden_state[mask], got, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Bert", {}, "sees tokens that come later"),
        ("OPT", {"word_embed_proj_dim": 16}, r"has features \[2, 4, 16\] of tokens \[2, 4\] and hidden_size = 32"),
        ("T5", {"d_model": 32, "d_kv": 16, "num_layers": 2}, "could not read four tokens: ValueError"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(tmp_path, name, settings, message):
    config = getattr(transformers, f"{name}Config")(**SIZES, pad_token_id=0, **settings)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.backbone must be a causal language model.*{message}"):
        build(tmp_path)


def test_a_hub_name_is_what_transformers_loads(tiny_backbone, tmp_path):
    folder = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(tiny_backbone, folder / "snapshots/0123abc")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123abc", encoding="utf-8")
    code = (
        "from lambda_return_ext.critic.model.backbone import Backbone\n"
        "backbone = Backbone('someone/tiny')\n"
        "assert backbone.tokenizer().eos_token == '<end>'\n"
        "assert len(backbone.base_model(1, 64).layers) == 1\n"
        "from lambda_return_ext.critic.errors import UserError\n"
        "try:\n    Backbone('someone/other').base_model(None, 64)\n"
        "except UserError as error:\n    assert 'model.backbone = someone/other could not be loaded' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.config_overrides={hiden_size: 3}"], "model.config_overrides.hiden_size must be a key of the config"),
        (["model.attn_implementation=nonsense"], "could not be loaded"),
        (["model.lora.rank=2"], "model.cache_features must be false when model.lora.rank is above 0"),
        (
            ["model.lora.rank=2", "model.cache_features=false", "model.backbone_frozen=false"],
            "model.backbone_frozen must be true when model.lora.rank is above 0",
        ),
        (
            ["model.lora.rank=2", "model.cache_features=false", "model.lora.target_modules=[nothing]"],
            "model.lora.target_modules = ['nothing'] does not fit",
        ),
        (
            ["model.lora.rank=2", "model.cache_features=false", "model.lora.target_modules='*_proj'"],
            "model.lora.target_modules = '*_proj' does not fit: nothing to repeat",
        ),
        (["model.config_overrides={hidden_size: 64}"], "with model.config_overrides = {'hidden_size': 64}"),
        (["model.config_overrides={hidden_act: foo}"], "with model.config_overrides = {'hidden_act': 'foo'}"),
        (["model.config_overrides={num_hidden_layers: 3}"], "its files have no weights for layers.2."),
        (["model.config_overrides={num_hidden_layers: -1}"], "num_hidden_layers must be at least 1, got -1"),
        (["model.config_overrides={num_hidden_layers: x}"], "model.config_overrides.num_hidden_layers must fit"),
        (
            ["model.config_overrides={hidden_act: foo}", "model.from_scratch=true"],
            "could not be loaded with model.config_overrides = {'hidden_act': 'foo'}",
        ),
        (["model.lora.rnk=2"], "unknown config key 'model.lora.rnk'; the nearest valid key is 'model.lora.rank'"),
        (
            ["model.head.type=sigmoid", "training.value_loss.lambda_return.bias_init=1.5"],
            "bias_init must be between 0 and 1 when model.head.type is sigmoid, got 1.5",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(train, run_dir, capsys, overrides, message):
    assert train(*overrides) == 2
    assert message in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_damaged_backbone_is_named(tiny_backbone, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_backbone, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match=r"model.backbone = .*cut could not be loaded: SafetensorError"):
        build(folder)
    for content in (b"GGUF", b"no model at all"):
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(UserError, match=r"model.backbone = .*cut.gguf could not be loaded"):
            build(tmp_path / "cut.gguf")


@pytest.mark.parametrize("name", ["Qwen2", "Gemma3Text"])
def test_a_backbone_with_fewer_layers_can_be_saved(tmp_path, inputs, name):
    config = getattr(transformers, f"{name}Config")(**SIZES, pad_token_id=0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "whole")
    model = build(tmp_path / "whole", layers=1)
    model.save_pretrained(tmp_path / "saved")
    again = ValueModel.from_pretrained(tmp_path / "saved")
    assert len(again.backbone.layers) == 1
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


# ---- adapters ----------------------------------------------------------------------------------------------------


def test_adapters_alone_train_with_their_own_rate_and_decay(tiny_backbone):
    lora = LoraConfig(rank=4, learning_rate=3e-4, weight_decay=0.0, target_modules=["q_proj", "v_proj"])
    model = build(tiny_backbone, lora=lora, cache_features=False, dtype="bfloat16")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "value_head"}
    adapters = {name for name in trained if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2  # layers, modules, matrices
    assert all(trained[name].dtype == torch.float32 for name in trained)
    assert set(model.saved_tensors()) == set(trained)
    groups = parameter_groups(model, TrainingConfig(learning_rate=1e-2, weight_decay=0.1), lora)
    assert [(group["base_lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.1), (1e-2, 0.0), (3e-4, 0.0)]
    assert {id(parameter) for parameter in groups[2]["params"]} == {id(trained[name]) for name in adapters}
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_critic_with_adapters_trains_is_saved_small_and_evaluated(train, run_dir, inputs, tmp_path):
    assert train(*WITH_LORA, "model.lora.dropout=0.1", "model.gradient_checkpointing=true") == 0
    saved, _ = checkpoint.load_tensors(run_dir / "best.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)
    assert not any("base_layer" in name or "embed" in name for name in saved)
    best = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["checkpoints"]["best"]["metrics"]
    again = trainer.evaluate(str(run_dir))["checkpoints"]["best"]["metrics"]
    assert again["validation/margin"] == pytest.approx(best["validation/margin"], abs=1e-6)
    assert main(["export", str(run_dir), str(tmp_path / "exported")]) == 0
    assert not any("lora" in name for name in ValueModel.from_pretrained(tmp_path / "exported").state_dict())


@pytest.mark.exhaustive
def test_adapters_in_a_bfloat16_backbone_train_on_sharded_ranks_as_on_one(train, run_dir, config_file):
    settings = [*WITH_LORA, "model.dtype=bfloat16", "training.precision=bfloat16", WELL_CONDITIONED]
    assert train(*settings) == 0
    command = ["-m", "lambda_return_ext.critic.cli", "train", "--config", str(config_file), *settings]
    more = ["training.strategy=fsdp", "training.micro_batch_size=2", "model.gradient_checkpointing=true"]
    code, said = finish(torchrun(*command, *more, f"run_dir={run_dir}-two"))
    assert code == 0, said
    for ours, theirs in zip(steps_of(run_dir), steps_of(Path(f"{run_dir}-two")), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=0.05)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.1)
    folders = run_dir, Path(f"{run_dir}-two")
    saved = [checkpoint.load_tensors(folder / "best.safetensors")[0] for folder in folders]
    assert saved[0].keys() == saved[1].keys()


def test_dropout_of_the_backbone_is_on_in_training_alone(tmp_path, inputs):
    folder = save_backbone(tmp_path / "with_dropout", attention_dropout=0.5)
    model = build(folder, lora=LoraConfig(rank=2), cache_features=False, attn_implementation="eager")
    assert not torch.equal(model.train()(*inputs), model(*inputs))
    assert torch.equal(model.eval()(*inputs), model(*inputs))
