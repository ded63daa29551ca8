"""The loss matrix and the numbers that validation reports, against their definitions."""

import pytest
import torch
from torch import nn

from lambda_return_ext import create_eos_only_mask
from lambda_return_ext.critic.config import LambdaReturnConfig, ValueLossConfig
from lambda_return_ext.critic.data import Collator, Solution, TokenPair
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.metrics import evaluate_pairs, length_baseline, likelihood_baseline
from lambda_return_ext.critic.model import Backbone, group_by_prompt
from lambda_return_ext.reference import compute_lambda_return as reference_return


def inputs(pairs=3, tokens=7, seed=0):
    torch.manual_seed(seed)
    values = torch.rand(2 * pairs, tokens, requires_grad=True)
    lengths = torch.randint(2, tokens + 1, (2 * pairs, 1))
    attention_mask = torch.arange(tokens) < lengths
    loss_mask = attention_mask & (torch.arange(tokens) > 0)
    return values, attention_mask, loss_mask, torch.tensor([1.0, 0.0]).repeat_interleave(pairs)


def side_loss(values, mask, rewards, lam):
    targets = reference_return(values.detach(), rewards, mask, 1.0, lam)
    return ((values - targets)[mask] ** 2).mean()


@pytest.mark.parametrize(("name", "lam"), [("lambda", 0.9), ("mc", 1.0)])
def test_each_side_counts_half_whatever_its_length(name, lam):
    values, attention_mask, loss_mask, rewards = inputs()
    config = ValueLossConfig(
        use_lambda_return=name == "lambda", use_mc_mse=name == "mc", lambda_return=LambdaReturnConfig(lam=0.9)
    )
    loss, terms = value_loss(config, values, attention_mask, loss_mask, rewards)
    right, wrong = (side_loss(values[s], loss_mask[s], rewards[s], lam) for s in (slice(3), slice(3, None)))
    torch.testing.assert_close(loss, (right + wrong) / 2)
    torch.testing.assert_close(terms[f"value/{name}_loss"], loss.detach())


def test_pairwise_is_the_mean_over_pairs_of_the_logistic_loss():
    values, attention_mask, loss_mask, rewards = inputs()
    loss, _ = value_loss(ValueLossConfig(use_pairwise=True), values, attention_mask, loss_mask, rewards)
    means = torch.stack([row[mask].mean() for row, mask in zip(values, loss_mask, strict=True)])
    torch.testing.assert_close(loss, -nn.functional.logsigmoid(means[:3] - means[3:]).mean())


@pytest.mark.parametrize(
    ("regression", "pairwise"), [("lambda", False), ("lambda", True), ("mc", False), ("mc", True), (None, True)]
)
def test_the_loss_is_the_sum_of_its_terms_times_their_coefficients(regression, pairwise):
    config = ValueLossConfig(
        use_lambda_return=regression == "lambda",
        use_mc_mse=regression == "mc",
        use_pairwise=pairwise,
        pairwise_coef=0.5,
        mc_mse_coef=3.0,
        lambda_return=LambdaReturnConfig(coef=2.0),
    )
    loss, terms = value_loss(config, *inputs())
    coefficients = {"value/lambda_loss": 2.0, "value/mc_loss": 3.0, "value/pairwise_loss": 0.5}
    on = {f"value/{regression}_loss"} - {"value/None_loss"} | ({"value/pairwise_loss"} if pairwise else set())
    assert set(terms) == on
    torch.testing.assert_close(loss.detach(), sum(coefficients[name] * term for name, term in terms.items()))


def test_in_warm_up_only_the_last_token_has_a_gradient():
    values, attention_mask, loss_mask, rewards = inputs()
    ends = create_eos_only_mask(loss_mask).bool()
    config = ValueLossConfig(use_lambda_return=True, use_pairwise=True)
    loss, _ = value_loss(config, values, attention_mask, ends, rewards)
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.equal(gradient != 0, ends)


class Lookup(nn.Module):
    """A critic that says the token id as a share of ten."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, inputs, attention_mask):
        return inputs.float() * self.scale


def pair(right, wrong, prompt=(9, 9)):
    return TokenPair("p", Solution(prompt, right), Solution(prompt, wrong))


PAIRS = [
    pair((4, 6), (1, 1, 1)),  # right by mean and by last token
    pair((8, 2), (3, 3)),  # right by mean, wrong by last token
    pair((2, 2, 2), (2, 2)),  # a tie by both: wrong
    pair((1,), (5, 0, 4)),  # wrong by both
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_validation_metrics_on_a_hand_made_case(batch_size):
    config = ValueLossConfig(use_mc_mse=True)
    measured = evaluate_pairs(Lookup(), config, PAIRS, Collator(0), batch_size)
    expected = {
        "pairwise_accuracy": 2 / 4,
        "last_token_accuracy": 1 / 4,
        "mean_right": (0.5 + 0.5 + 0.2 + 0.1) / 4,
        "mean_wrong": (0.1 + 0.3 + 0.2 + 0.3) / 4,
        "margin": (1.3 - 0.9) / 4,
        "token_variance_right": (0.01 + 0.09 + 0 + 0) / 4,
        "token_variance_wrong": (0 + 0 + 0 + 0.14 / 3) / 4,
    }
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-6), name
    assert measured["loss"] > 0


def test_length_baseline_takes_its_direction_from_training():
    short_wins = [pair((1,), (1, 1)), pair((1,), (1, 1)), pair((1, 1), (1,))]
    validation = [pair((1,), (1, 1)), pair((1, 1), (1,)), pair((1, 1), (1,)), pair((1,), (1,))]
    assert length_baseline(short_wins, validation) == ("shorter is right", 0.25)
    long_wins = [TokenPair(p.problem, p.wrong, p.right) for p in short_wins]
    assert length_baseline(long_wins, validation) == ("longer is right", 0.5)


def test_likelihood_baseline_is_the_mean_log_probability_of_the_whole_forward(tiny_backbone):
    language_model = Backbone(str(tiny_backbone)).language_model().eval()
    torch.manual_seed(1)

    def random_ids(low, high):
        return tuple(torch.randint(2, 45, (int(torch.randint(low, high, ())),)).tolist())

    prompts = [random_ids(1, 5) for _ in range(6)]
    pairs = [pair(random_ids(1, 9), random_ids(1, 9), prompts[i % 6]) for i in range(30)]

    def mean_log_probability(solution):
        ids = torch.tensor([solution.prompt_ids + solution.output_ids])
        with torch.no_grad():
            log_probabilities = language_model(input_ids=ids).logits.log_softmax(-1)
        positions = range(len(solution.prompt_ids), ids.shape[1])
        return sum(log_probabilities[0, i - 1, ids[0, i]].item() for i in positions) / len(positions)

    expected = sum(mean_log_probability(p.right) > mean_log_probability(p.wrong) for p in pairs) / len(pairs)
    assert 0 < expected < 1
    assert likelihood_baseline(language_model, pairs, group_by_prompt(pairs), lambda tokens: None) == expected
