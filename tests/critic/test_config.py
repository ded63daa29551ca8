"""Configuration: defaults, overrides, and what each mistake is answered."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from lambda_return_ext.critic.config import load_config
from lambda_return_ext.critic.errors import UserError

LOSS = "training.value_loss"


def test_absent_loss_keys_mean_the_documented_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\ndata: {path: d}\nmodel: {backbone: b}\n", encoding="utf-8")
    loss = load_config(path).training.value_loss
    assert loss.model_dump() == {
        "use_pairwise": False,
        "pairwise_coef": 1.0,
        "use_mc_mse": False,
        "mc_mse_coef": 1.0,
        "use_lambda_return": False,
        "lambda_return": {
            "gamma": 1.0,
            "lam": 0.95,
            "lam_schedule": "constant",
            "lam_start": 1.0,
            "lam_hold_steps": 0,
            "lam_decay_steps": None,
            "coef": 1.0,
            "warmup_steps": 0,
            "bias_init": 0.5,
        },
        "error": "mse",
        "huber_delta": 1.0,
        "balance": None,
        "reduction": "token",
        "output_window": None,
    }
    assert loss.is_off


def test_overrides_win_and_the_last_one_wins(config_file):
    config = load_config(config_file, ["seed=7", "training.learning_rate=1e-4", "seed=8"])
    assert (config.seed, config.training.learning_rate) == (8, 1e-4)


def test_bias_init_null_is_kept(config_file):
    config = load_config(config_file, [f"{LOSS}.lambda_return.bias_init=null"])
    assert config.training.value_loss.lambda_return.bias_init is None


def test_config_is_frozen(config_file):
    config = load_config(config_file)
    with pytest.raises(ValidationError, match="frozen"):
        config.training.value_loss.use_mc_mse = True


def test_resolved_config_reads_back_as_itself(config_file, tmp_path):
    config = load_config(config_file, ["seed=3", "training.max_grad_norm=null"])
    saved = tmp_path / "resolved.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(saved) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.value_los.use_pairwise=true", "unknown config key 'training.value_los'.*'training.value_loss'"),
        ("training.lam=0.9", f"unknown config key 'training.lam'.*'{LOSS}.lambda_return.lam'"),
        ("training.lr=0.1", "unknown config key 'training.lr'.*'training.learning_rate'"),
        ("model.lora.lr=0.1", "unknown config key 'model.lora.lr'.*'model.lora.learning_rate'"),
        ("training.steps=3", "unknown config key 'training.steps'.*'training.max_steps'"),
        ("seed=18446744073709551616", "seed must be less than 9223372036854775808, got 18446744073709551616"),
        ("warmup_steps=3", f"unknown config key 'warmup_steps'.*'{LOSS}.lambda_return.warmup_steps'"),
        ("training.batch_size=many", "training.batch_size must be a valid integer, got 'many'"),
        ("training.batch_size=0", "training.batch_size must be greater than or equal to 1, got 0"),
        ("training.batch_size=1.5", "training.batch_size must be a valid integer, got 1.5"),
        ("training.compile=1", "training.compile must be a valid boolean, got 1"),
        ("training.learning_rate=.nan", "training.learning_rate must be a finite number, got nan"),
        ("training.learning_rate=0", "training.learning_rate must be greater than 0, got 0"),
        (f"{LOSS}.lambda_return.gamma=1.01", "gamma must be less than or equal to 1, got 1.01"),
        (f"{LOSS}.lambda_return.lam=-0.1", "lam must be greater than or equal to 0, got -0.1"),
        (f"{LOSS}.lambda_return.warmup_steps=-1", "warmup_steps must be greater than or equal to 0, got -1"),
        ("model.head.type=conv", "model.head.type must be 'linear', 'mlp' or 'sigmoid', got 'conv'"),
        ("training=3", "training must be a section with keys of its own, got 3"),
        ("data=pairs.jsonl", "data must be a section with keys of its own, got 'pairs.jsonl'"),
        ("data.path=null", "data.path must be a valid string, got None"),
        ("data.path=", "data.path must be a valid string, got None"),
        ("model.backbone_frozen=false", "model.cache_features must be false when model.backbone_frozen is false"),
        ("seed", "an override must look like key=value, got 'seed'"),
        ("seed=[1", r"^the value of an override must be valid YAML, got 'seed=\[1'$"),
        ("seed=${oc.env:NOT_SET_ANYWHERE}", "must be valid YAML.*NOT_SET_ANYWHERE"),
    ],
)
def test_each_mistake_is_named(config_file, override, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_config(config_file, [override])


def test_monte_carlo_and_lambda_return_together_name_both_keys(config_file):
    with pytest.raises(UserError, match=f"{LOSS}.use_mc_mse and {LOSS}.use_lambda_return must not both be true"):
        load_config(config_file, [f"{LOSS}.use_mc_mse=true"])


def test_all_mistakes_are_reported_at_once(config_file):
    with pytest.raises(UserError, match=r"(?s)seed must.*unknown config key 'sed'"):
        load_config(config_file, ["seed=-1", "sed=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must be a YAML mapping"),
        ("a: b: c\n", "must be valid YAML"),
        ("seed: 1\nseed: 2\n", "must be valid YAML.*seed"),
        ("", "config key 'run_dir' must be given"),
        ("a: !!python/object/apply:os.mkdir [made-by-yaml]\n", "must be valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_config("bad.yaml")
    assert not (tmp_path / "made-by-yaml").exists()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"the config must be a readable YAML file, got .*No such file"):
        load_config(tmp_path / "none.yaml")


def test_the_shipped_configuration_of_rollouts_takes_every_answer_as_ppo_reads_values():
    config = load_config(Path(__file__).parents[2] / "configs/local/critic_rollouts.yaml")
    assert (config.data.sampling, config.model.value_position) == ("rollouts", "before")
    assert config.training.value_loss.lambda_return.bias_init == "mean"
    assert config.training.value_loss.warmup_steps == 0
    assert (config.best, config.balanced) == ("explained_variance", False)


def test_pairs_are_balanced_and_followed_by_their_accuracy_unless_told_otherwise(config_file):
    config = load_config(config_file)
    assert (config.best, config.balanced) == ("pairwise_accuracy", True)
    told = ["evaluation.best=explained_variance", "training.value_loss.balance=false"]
    config = load_config(config_file, told)
    assert (config.best, config.balanced) == ("explained_variance", False)


def test_a_head_without_a_bias_cannot_start_at_a_number(config_file):
    with pytest.raises(UserError, match=r"bias_init must be null when model\.head\.bias is false: .*, got 0\.5"):
        load_config(config_file, ["model.head.bias=false"])
    load_config(config_file, ["model.head.bias=false", "training.value_loss.lambda_return.bias_init=null"])


@pytest.mark.parametrize("value", ["average", "true", "[0.5]", ".nan"])
def test_a_first_prediction_that_is_no_number_is_one_sentence(config_file, value):
    key = "training.value_loss.lambda_return.bias_init"
    with pytest.raises(UserError, match=rf"^{key} must be a finite number, 'mean' or null, got [^\n]*$"):
        load_config(config_file, [f"{key}={value}"])
    assert load_config(config_file, [f"{key}=1"]).training.value_loss.lambda_return.bias_init == 1.0
