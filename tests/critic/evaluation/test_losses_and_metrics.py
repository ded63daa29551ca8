"""The loss matrix and the numbers that validation reports, against their definitions."""

import numpy as np
import pytest
import torch
from critic_testing import Lookup, batch_of, pair, pair_of
from torch import nn

from lambda_return_ext import create_eos_only_mask
from lambda_return_ext.critic.config import Config, LambdaReturnConfig, TrainingConfig, ValueLossConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.rollouts import Solution, solutions_of
from lambda_return_ext.critic.evaluation.baselines import length_baseline, likelihood_baseline
from lambda_return_ext.critic.evaluation.metrics import (
    calibration,
    count_items,
    evaluate_items,
    measure_batch,
    summarise_pairs,
)
from lambda_return_ext.critic.losses import count_terms, value_loss
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import group_by_prompt
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
    loss, terms = value_loss(config, values, batch_of(attention_mask, loss_mask, rewards))
    right, wrong = (side_loss(values[s], loss_mask[s], rewards[s], lam) for s in (slice(3), slice(3, None)))
    torch.testing.assert_close(loss, (right + wrong) / 2)
    torch.testing.assert_close(terms[f"value/{name}_loss"], loss.detach())


def test_pairwise_is_the_mean_over_pairs_of_the_logistic_loss():
    values, attention_mask, loss_mask, rewards = inputs()
    loss, _ = value_loss(ValueLossConfig(use_pairwise=True), values, batch_of(attention_mask, loss_mask, rewards))
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
    values, *rest = inputs()
    loss, terms = value_loss(config, values, batch_of(*rest))
    coefficients = {"value/lambda_loss": 2.0, "value/mc_loss": 3.0, "value/pairwise_loss": 0.5}
    on = {f"value/{regression}_loss"} - {"value/None_loss"} | ({"value/pairwise_loss"} if pairwise else set())
    assert set(terms) == on
    torch.testing.assert_close(loss.detach(), sum(coefficients[name] * term for name, term in terms.items()))


def test_in_warm_up_only_the_last_token_has_a_gradient():
    values, attention_mask, loss_mask, rewards = inputs()
    ends = create_eos_only_mask(loss_mask).bool()
    config = ValueLossConfig(use_lambda_return=True, use_pairwise=True)
    loss, _ = value_loss(config, values, batch_of(attention_mask, ends, rewards))
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.equal(gradient != 0, ends)


def evaluate_pairs(loss, pairs, batch_size, model=None):
    """What validation says of a critic, by default of `Lookup`."""
    config = Config(
        run_dir="unused",
        data={"path": "unused"},
        model={"backbone": "unused"},
        training=TrainingConfig(value_loss=loss),
        evaluation={"batch_size": batch_size},
    )
    return evaluate_items(model or Lookup(), config, pairs, Collator(0))


PAIRS = [
    pair((4, 6), (1, 1, 1)),  # right by mean and by last token
    pair((8, 2), (3, 3)),  # right by mean, wrong by last token
    pair((2, 2, 2), (2, 2)),  # a tie by both: wrong
    pair((1,), (5, 0, 4)),  # wrong by both
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_validation_metrics_on_a_hand_made_case(batch_size):
    config = ValueLossConfig(use_mc_mse=True)
    measured = evaluate_pairs(config, PAIRS, batch_size)
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
    # Right tokens are 0.1 times 4, 6, 8, 2, 2, 2, 2 and 1 below 1; wrong ones as far above 0.
    assert measured["loss"] == pytest.approx((3.93 / 8 + 0.70 / 10) / 2, rel=1e-5)


def numpy_metrics(pairs, scale=0.1):
    """What the metrics mean, one token at a time, for gamma = lambda = 1."""
    sides = {
        side: [np.array(getattr(p, side).solution.output_ids, dtype=np.float32) * np.float32(scale) for p in pairs]
        for side in ("right", "wrong")
    }
    expected = {}
    for side, reward in (("right", 1.0), ("wrong", 0.0)):
        spikes, correlations = [], []
        for v in sides[side]:
            td = np.abs(np.append(v[1:], reward) - v)
            spikes.append(td.max() / td.mean() if td.any() else 1.0)
            position = np.arange(len(v))
            correlations.append(np.corrcoef(v, position)[0, 1] if len(v) > 1 and v.std() > 0 else 0.0)
        expected[f"td_spikiness_{side}"] = np.mean(spikes)
        expected[f"position_correlation_{side}"] = np.mean(correlations)
    values = np.concatenate(sides["right"] + sides["wrong"])
    rewards = np.concatenate([np.full(len(v), r) for side, r in (("right", 1), ("wrong", 0)) for v in sides[side]])
    expected["explained_variance"] = 1 - np.var(rewards - values) / np.var(rewards)
    lasts = [(v[-1], reward) for side, reward in (("right", 1), ("wrong", 0)) for v in sides[side]]
    expected["brier"] = np.mean([(v - reward) ** 2 for v, reward in lasts])
    return expected


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_credit_and_calibration_metrics_against_their_definitions(batch_size):
    rng = np.random.default_rng(0)
    pairs = PAIRS + [pair(*(tuple(rng.integers(0, 10, rng.integers(1, 9))) for _ in range(2))) for _ in range(30)]
    pairs = [
        pair_of(p.problem, *(Solution((9, 9), tuple(map(int, s.solution.output_ids))) for s in p.rollouts))
        for p in pairs
    ]
    measured = evaluate_pairs(ValueLossConfig(use_mc_mse=True), pairs, batch_size)
    for name, value in numpy_metrics(pairs).items():
        assert measured[name] == pytest.approx(value, abs=1e-6), name
    assert sum(measured["reliability_count"]) == 2 * len(pairs)
    assert len(measured["length_accuracy"]) == 4
    assert measured["length_shortest"] == sorted(measured["length_shortest"])
    parts = [len(part) for part in np.array_split(np.arange(len(pairs)), 4)]
    assert np.average(measured["length_accuracy"], weights=parts) == pytest.approx(measured["pairwise_accuracy"])


def test_metrics_skip_gaps_in_a_solution():
    whole = pair((4, 6), (1, 3, 5))
    gapped = pair_of(
        "p",
        Solution((9, 9), (4, 9, 9, 6), (True, False, False, True)),
        Solution((9, 9), (1, 7, 3, 8, 5), (True, False, True, False, True)),
    )
    config = ValueLossConfig(use_lambda_return=True)
    skipped, expected = (evaluate_pairs(config, [p], 1) for p in (gapped, whole))
    for name, value in expected.items():
        assert skipped[name] == pytest.approx(value), name


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_records_of_any_split_give_the_same_metrics(reduction):
    """Batches of one rank or of several: pairs are independent, so their records are only put together."""
    config = ValueLossConfig(use_mc_mse=True, use_pairwise=True, reduction=reduction)
    collate = Collator(0)
    counts = count_items(config, PAIRS, collate, True)
    assert torch.equal(counts, count_terms(config, collate(PAIRS)))

    def records(pairs):
        batch = collate(pairs)
        measured = measure_batch(Lookup()(batch.inputs, None).detach(), batch, config, counts)
        return {name: column.view(2, -1) for name, column in measured.items()}

    parts = [records(PAIRS[:1]), records(PAIRS[1:])]
    loss = sum(part.pop("loss").sum().item() for part in parts)
    whole = records(PAIRS)
    assert loss == pytest.approx(whole.pop("loss").sum().item(), rel=1e-6)
    batch = collate(PAIRS)
    assert loss == pytest.approx(value_loss(config, Lookup()(batch.inputs, None), batch)[0].item(), rel=1e-6)
    no_loss = {"loss": torch.zeros(2, 4)}
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    assert summarise_pairs(joined | no_loss) == summarise_pairs(whole | no_loss)


def test_calibration_on_a_hand_made_case():
    last = torch.tensor([0.95, 0.95, 1.2, 0.95, 0.12, -0.3]).double()
    measured = calibration(last, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]).double())
    assert measured["reliability_count"] == [1, 1, 4]
    assert measured["reliability_observed"] == [0, 0, 0.75]
    assert measured["reliability_predicted"] == pytest.approx([-0.3, 0.12, 4.05 / 4])
    assert measured["calibration_error"] == pytest.approx((0.3 + 0.12 + 4 * (4.05 / 4 - 0.75)) / 6)
    assert measured["brier"] == pytest.approx((2 * 0.05**2 + 0.2**2 + 0.95**2 + 0.12**2 + 0.3**2) / 6)


def test_a_constant_critic_is_no_spike_no_clock_and_explains_nothing():
    class Constant(Lookup):
        def forward(self, inputs, attention_mask):
            return inputs.float() * 0 + 0.3 + 0 * self.scale

    measured = evaluate_pairs(ValueLossConfig(use_mc_mse=True), PAIRS, 2, Constant())
    assert measured["position_correlation_right"] == measured["position_correlation_wrong"] == 0
    assert measured["explained_variance"] == pytest.approx(0, abs=1e-9)


def test_length_baseline_takes_its_direction_from_training():
    short_wins = [pair((1,), (1, 1)), pair((1,), (1, 1)), pair((1, 1), (1,))]
    validation = [pair((1,), (1, 1)), pair((1, 1), (1,)), pair((1, 1), (1,)), pair((1,), (1,))]
    assert length_baseline(short_wins, validation) == ("shorter is right", 0.25)
    long_wins = [pair_of(p.problem, p.wrong.solution, p.right.solution) for p in short_wins]
    assert length_baseline(long_wins, validation) == ("longer is right", 0.5)


def test_likelihood_baseline_is_the_mean_log_probability_of_the_whole_forward(tiny_backbone):
    language_model = Backbone(str(tiny_backbone)).language_model().eval()
    torch.manual_seed(1)

    def random_ids(low, high):
        return tuple(torch.randint(2, 45, (int(torch.randint(low, high, ())),)).tolist())

    prompts = [random_ids(1, 5) for _ in range(6)]
    pairs = [pair(random_ids(1, 9), random_ids(1, 9), prompts[i % 6]) for i in range(30)]

    def mean_log_probability(rollout):
        solution = rollout.solution
        ids = torch.tensor([solution.prompt_ids + solution.output_ids])
        with torch.no_grad():
            log_probabilities = language_model(input_ids=ids).logits.log_softmax(-1)
        positions = range(len(solution.prompt_ids), ids.shape[1])
        return sum(log_probabilities[0, i - 1, ids[0, i]].item() for i in positions) / len(positions)

    expected = sum(mean_log_probability(p.right) > mean_log_probability(p.wrong) for p in pairs) / len(pairs)
    assert 0 < expected < 1
    assert (
        likelihood_baseline(language_model, pairs, group_by_prompt(solutions_of(pairs)), lambda tokens: None)
        == expected
    )
