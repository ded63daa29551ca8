"""What is measured of rollouts, against plain definitions; and over how much the loss is a mean."""

import itertools

import numpy as np
import pytest
import torch
from critic_testing import Lookup

from lambda_return_ext.critic.config import Config, LambdaReturnConfig, TrainingConfig, ValueLossConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.rollouts import Rollout, Solution
from lambda_return_ext.critic.evaluation.metrics import count_items, evaluate_items
from lambda_return_ext.critic.losses import count_terms, value_loss
from lambda_return_ext.reference import compute_lambda_return as reference_return


def rollouts_of(seed=0, number=30, rewards=(0.0, 1.0)):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return tuple(int(i) for i in rng.integers(1, 10, rng.integers(low, high)))

    return [Rollout(f"p{i % 7}", Solution(ids(1, 4), ids(1, 9)), float(rng.choice(rewards))) for i in range(number)]


def measured_of(rollouts, position="after", batch_size=8, loss=None, balance=None):
    loss = (loss or ValueLossConfig(use_mc_mse=True)).model_copy(update={"balance": balance})
    config = Config(
        run_dir="unused",
        data={"path": "unused", "sampling": "rollouts"},
        model={"backbone": "unused", "value_position": position},
        training=TrainingConfig(value_loss=loss),
        evaluation={"batch_size": batch_size},
    )
    return evaluate_items(Lookup(), config, rollouts, Collator(0, position=position, midpoint=0.5))


def values_of(rollout, position):
    ids = np.array((rollout.solution.prompt_ids[-1], *rollout.solution.output_ids), dtype=np.float32) * np.float32(0.1)
    return {"after": ids[1:], "before": ids[:-1], "both": ids}[position]


@pytest.mark.parametrize("position", ["after", "before", "both"])
@pytest.mark.parametrize("rewards", [(0.0, 1.0), (-2.0, 0.5, 3.0)])
def test_metrics_are_their_definitions(position, rewards):
    rollouts = rollouts_of(rewards=rewards)
    measured = measured_of(rollouts, position)
    values = [values_of(one, position) for one in rollouts]
    v = np.concatenate(values)
    r = np.concatenate([np.full(len(each), one.reward) for each, one in zip(values, rollouts, strict=True)])
    assert measured["explained_variance"] == pytest.approx(1 - np.var(r - v) / np.var(r), abs=1e-6)
    assert measured["loss"] == pytest.approx(np.mean((v - r) ** 2), rel=1e-5)
    assert measured["mean_value"] == pytest.approx(np.mean([each.mean() for each in values]), abs=1e-6)
    assert measured["mean_reward"] == pytest.approx(np.mean([one.reward for one in rollouts]))
    last = [each[-1] for each in values]
    squares = [(said - one.reward) ** 2 for said, one in zip(last, rollouts, strict=True)]
    assert measured["brier"] == pytest.approx(np.mean(squares), rel=1e-5)
    assert sum(measured["reliability_count"]) == len(rollouts)
    pairs = [
        (i, j)
        for i, j in itertools.permutations(range(len(rollouts)), 2)
        if rollouts[i].problem == rollouts[j].problem and rollouts[i].reward > rollouts[j].reward
    ]
    assert len(pairs) > 10
    ranked = np.mean([values[i].mean(dtype=np.float64) > values[j].mean(dtype=np.float64) for i, j in pairs])
    assert measured["pairwise_accuracy"] == pytest.approx(ranked, abs=1e-9)
    assert measured["last_token_accuracy"] == pytest.approx(np.mean([last[i] > last[j] for i, j in pairs]))


def test_the_size_of_batches_changes_nothing():
    rollouts = rollouts_of()
    whole, alone = measured_of(rollouts, batch_size=64), measured_of(rollouts, batch_size=1)
    for name, value in whole.items():
        assert alone[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_rollouts_without_a_pair_have_no_accuracy():
    alone = [one._replace(problem=f"p{i}") for i, one in enumerate(rollouts_of())]
    measured = measured_of(alone)
    assert "pairwise_accuracy" not in measured
    assert measured["explained_variance"] == measured_of(rollouts_of())["explained_variance"]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("position", ["after", "before", "both"])
def test_counts_of_all_are_the_sum_of_those_of_batches(position, reduction, balanced):
    rollouts, config = rollouts_of(), ValueLossConfig(use_mc_mse=True, reduction=reduction)
    collate = Collator(0, position=position, midpoint=0.5)
    parts = [count_terms(config, collate(rollouts[i : i + 7]), balanced) for i in range(0, len(rollouts), 7)]
    total = count_items(config, rollouts, collate, balanced)
    assert torch.equal(torch.stack(parts).sum(0), total)
    assert (total[1] > 0) == balanced
    assert total[2] == 0


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_loss_is_one_mean_or_that_of_two_halves(reduction, balanced):
    rollouts = rollouts_of()
    batch = Collator(0, midpoint=0.5).pad(rollouts)
    torch.manual_seed(0)
    values = torch.rand(batch.inputs.shape, requires_grad=True)
    config = ValueLossConfig(
        use_lambda_return=True, lambda_return=LambdaReturnConfig(lam=0.8, gamma=0.9), reduction=reduction
    )
    targets = reference_return(values.detach(), batch.terminal_rewards, batch.loss_mask, 0.9, 0.8)
    errors = (values - targets) ** 2

    def mean(rows):
        if reduction == "token":
            return errors[rows][batch.loss_mask[rows]].mean()
        chosen = zip(errors[rows], batch.loss_mask[rows], strict=True)
        return torch.stack([row[mask].mean() for row, mask in chosen]).mean()

    upper = torch.tensor([one.reward == 1.0 for one in rollouts])
    assert torch.equal(batch.upper, upper)
    assert 0 < upper.sum() < len(rollouts)
    expected = (mean(upper) + mean(~upper)) / 2 if balanced else mean(torch.ones_like(upper))
    loss, _ = value_loss(config, values, batch, balanced=balanced)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, values)[0] for x in (loss, expected)))


def test_an_explicit_balance_reaches_validation():
    rollouts = rollouts_of()
    plain, halves = (measured_of(rollouts, balance=balance)["loss"] for balance in (None, True))
    squares = {
        reward: np.concatenate([(values_of(one, "after") - reward) ** 2 for one in rollouts if one.reward == reward])
        for reward in (0.0, 1.0)
    }
    assert halves == pytest.approx((squares[0.0].mean() + squares[1.0].mean()) / 2, rel=1e-5)
    assert plain == pytest.approx(np.concatenate([*squares.values()]).mean(), rel=1e-5)
