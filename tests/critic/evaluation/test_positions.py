"""Which position a value belongs to: after a token, before it, or both, told by values that are known."""

import itertools
import json
from collections import defaultdict

import pytest
import torch
from critic_testing import make_records, steps_of
from torch import nn
from transformers import AutoModelForTokenClassification, AutoTokenizer

from lambda_return_ext import compute_lambda_return
from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data.batches import Collator, value_places
from lambda_return_ext.critic.data.rollouts import Rollout, Solution
from lambda_return_ext.critic.evaluation.credit import credit_solutions, value_changes
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.model import ValueModel

POSITIONS = ("after", "before", "both")
TURNS = Rollout("p", Solution((5, 6), (7, 1, 9, 9, 8, 1), (True, True, False, False, True, True)), 1.0)


def test_each_run_of_output_tokens_moves_one_to_the_left_or_gains_one_there():
    # The prompt's last token, then two tokens of the assistant, two of a tool, two of the assistant.
    expected = {"after": [0, 1, 1, 0, 0, 1, 1], "before": [1, 1, 0, 0, 1, 1, 0], "both": [1, 1, 1, 0, 1, 1, 1]}
    for position, mask in expected.items():
        assert value_places(TURNS, position).mask.int().tolist() == mask


def test_a_reward_of_a_turn_stands_where_its_last_token_has_its_value():
    rollout = TURNS._replace(step_rewards=(0.0, 0.25, 0.0, 0.0, 0.0, 0.0))
    expected = {"after": 2, "before": 1, "both": 2}
    for position, place in expected.items():
        rewards = value_places(rollout, position).rewards
        assert rewards.nonzero().tolist() == [[place]]
        assert rewards[place] == 0.25


@pytest.mark.parametrize("position", POSITIONS)
def test_features_packed_and_padded_batches_have_the_same_values_and_targets(position):
    rollouts = [
        TURNS._replace(step_rewards=(0.0, 0.25, 0.0, 0.0, 0.0, 0.0)),
        Rollout("p", Solution((5,), (7, 8)), -2.0),
        Rollout("q", Solution((5, 6, 7), (1,)), 0.5),
    ]
    embedding = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    features = {
        one.solution: embedding[torch.tensor((one.solution.prompt_ids[-1], *one.solution.output_ids))]
        for one in rollouts
    }
    found = []
    for held, packed in itertools.product((None, features), (False, True)):
        collate = Collator(0, held, multiple=4, packed=packed, position=position, midpoint=0.0, step_rewards=True)
        batch = collate(rollouts)
        inputs = embedding[batch.inputs] if held is None else batch.inputs
        values = inputs.sum(-1)
        assert batch.upper.tolist() == [True, False, True]
        loss = value_loss(ValueLossConfig(use_lambda_return=True), values, batch, balanced=False)[0]
        found.append((values[batch.loss_mask], batch.step_rewards[batch.loss_mask], loss))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs)
    values = {"after": 4 + 2 + 1, "before": 4 + 2 + 1, "both": 6 + 3 + 2}[position]
    assert len(found[0][0]) == values


# ---- a policy whose values are known ---------------------------------------------------------------------------------

PROMPT, WORDS, END = (9,), (1, 2), 3


def next_words(prefix):
    """The policy: what it says next, with its probability; it ends after three words at the latest."""
    if len(prefix) == 3:
        return {END: 1.0}
    lean = 0.7 if sum(prefix) % 2 else 0.4
    return {1: lean * 0.8, 2: (1 - lean) * 0.8, END: 0.2} if prefix else {1: 0.5, 2: 0.5}


def reward_of(answer):
    return float(answer.count(2) == 1) + 0.5 * (len(answer) == 4)


def answers():
    """Every answer with its probability."""
    waiting, done = [((), 1.0)], []
    while waiting:
        prefix, probability = waiting.pop()
        for word, its in next_words(prefix).items():
            longer = (*prefix, word), probability * its
            (done if word == END else waiting).append(longer)
    return done


def true_values():
    """V of each prefix, complete ones included: the mean reward of what follows it."""
    mass, total = defaultdict(float), defaultdict(float)
    for answer, probability in answers():
        for length in range(len(answer) + 1):
            mass[answer[:length]] += probability
            total[answer[:length]] += probability * reward_of(answer)
    return {prefix: total[prefix] / mass[prefix] for prefix in mass}


def prefixes_of(answer, position):
    """What has been read where each value stands."""
    lengths = {"after": range(1, len(answer) + 1), "before": range(len(answer)), "both": range(len(answer) + 1)}
    return [answer[:length] for length in lengths[position]]


class Table(nn.Module):
    """A critic with a number for each prefix."""

    def __init__(self, values=None):
        super().__init__()
        self.index = {prefix: i for i, prefix in enumerate(true_values())}
        start = torch.zeros(len(self.index)) if values is None else torch.tensor([values[p] for p in self.index])
        self.values = nn.Parameter(start)

    def places(self, inputs):
        """The number of the prefix that has been read at each token."""
        places = torch.zeros_like(inputs)
        for row, ids in enumerate(inputs.tolist()):
            for t in range(len(ids)):
                places[row, t] = self.index.get(tuple(ids[1 : t + 1]), 0)
        return places

    def forward(self, inputs, attention_mask):
        return self.values[self.places(inputs)]


def rollouts_of_the_policy():
    return [Rollout("p", Solution(PROMPT, answer), reward_of(answer)) for answer, _ in answers()]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("lam", [1.0, 0.6])
def test_the_mean_target_at_a_prefix_is_its_true_value(position, lam):
    """With the true values as V, for any lambda: the target is an unbiased sample of the value it belongs to."""
    truth, rollouts = true_values(), rollouts_of_the_policy()
    batch = Collator(0, position=position).pad(rollouts)
    values = Table(truth)(batch.inputs, None).detach()
    targets = compute_lambda_return(values, batch.terminal_rewards, batch.loss_mask, 1.0, lam)
    mass, total = defaultdict(float), defaultdict(float)
    for row, (answer, probability) in enumerate(answers()):
        found = targets[row][batch.loss_mask[row]].tolist()
        for prefix, target in zip(prefixes_of(answer, position), found, strict=True):
            mass[prefix] += probability
            total[prefix] += probability * target
    assert len(mass) == {"after": len(truth) - 1, "before": len(truth) - len(rollouts), "both": len(truth)}[position]
    for prefix in mass:
        assert total[prefix] / mass[prefix] == pytest.approx(truth[prefix], abs=1e-6), prefix


@pytest.mark.parametrize("position", POSITIONS)
def test_a_table_learns_the_true_values_from_the_loss(position):
    """Each answer as often as the policy says it; where no value stands, the table stays where it started."""
    copies = [
        one
        for one, (_, probability) in zip(rollouts_of_the_policy(), answers(), strict=True)
        for _ in range(round(probability * 500))
    ]
    batch, table = Collator(0, position=position, midpoint=0.0).pad(copies), Table()
    places = table.places(batch.inputs)
    config = ValueLossConfig(use_lambda_return=True)
    optimizer = torch.optim.LBFGS(table.parameters(), max_iter=100, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = value_loss(config, table.values[places], batch, lam=torch.tensor(1.0).double(), balanced=False)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    said = defaultdict(list)
    for one in copies:
        for prefix in prefixes_of(one.solution.output_ids, position):
            said[prefix].append(one.reward)
    truth = true_values()
    for prefix, index in table.index.items():
        learned, rewards = table.values[index].item(), said[prefix]
        assert learned == pytest.approx(sum(rewards) / len(rewards) if rewards else 0.0, abs=1e-3), prefix
        if len(rewards) > 50:  # whole numbers of copies are not quite the policy's probabilities
            assert learned == pytest.approx(truth[prefix], abs=0.02), prefix


def test_with_before_the_advantage_belongs_to_the_token_as_an_action():
    """Its mean over what follows is Q(s, a) - V(s), by enumeration."""
    truth, rollouts = true_values(), rollouts_of_the_policy()
    table = Table(truth)
    for position in ("before", "both"):
        batch = Collator(0, position=position).pad(rollouts)
        credits = credit_solutions(table, batch, [one.solution for one in rollouts], 1.0, 1.0, position)
        mass, total = defaultdict(float), defaultdict(float)
        for (answer, probability), credit in zip(answers(), credits, strict=True):
            assert credit.values.tolist() == pytest.approx([truth[answer[:t]] for t in range(len(answer))])
            for t in range(len(answer)):
                mass[answer[: t + 1]] += probability
                total[answer[: t + 1]] += probability * credit.advantages[t].item()
            changes = [truth[answer[: t + 1]] - truth[answer[:t]] for t in range(len(answer))]
            if position == "before":
                changes[-1] = 0.0  # nothing is said after the last token
            assert value_changes(credit, position).tolist() == pytest.approx(changes, abs=1e-6)
            if position == "both":
                after = [truth[answer[: t + 1]] for t in range(len(answer))]
                assert credit.values_after.tolist() == pytest.approx(after)
        for prefix in mass:
            expected = truth[prefix] - truth[prefix[:-1]]
            assert total[prefix] / mass[prefix] == pytest.approx(expected, abs=1e-6), prefix


# ---- the whole command -----------------------------------------------------------------------------------------------


def rows():
    return [
        {"problem_id": row["problem_id"], "prompt": row["prompt"], "completion": row[side], "reward": reward}
        for row in make_records()
        for side, reward in (("chosen", 1.0), ("rejected", 0.0))
    ]


@pytest.fixture
def settings(write_pairs):
    path = write_pairs(rows(), "rollouts.jsonl")
    return [f"data.path={path}", "data.sampling=rollouts", "training.value_loss.lambda_return.bias_init=mean"]


@pytest.mark.parametrize("position", POSITIONS)
def test_an_export_is_read_as_ppo_stacks_read_a_critic(train, run_dir, settings, tmp_path, write_pairs, position):
    """verl: the values of the response are those of the tokens before each response token, of one forward pass."""
    assert train(*settings, f"model.value_position={position}", "model.head.type=linear") == 0
    assert main(["export", str(run_dir), str(tmp_path / "critic")]) == 0
    scores = tmp_path / "scores.jsonl"
    one_file = write_pairs(rows()[:6], "some.jsonl")
    assert main(["score", str(one_file), "--run", str(run_dir), "--output", str(scores)]) == 0
    whole = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic").eval()
    assert whole.config.value_position == position
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "critic")
    ours = ValueModel.from_pretrained(tmp_path / "critic")
    records = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 6
    for row, record in zip(rows(), records, strict=False):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *record["token_ids"]]])
        with torch.no_grad():
            logits = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :, 0]
            torch.testing.assert_close(ours(ids, torch.ones_like(ids).bool())[0], logits, rtol=1e-5, atol=1e-6)
        length = len(record["token_ids"])
        before, after = logits[-length - 1 : -1], logits[-length:]
        expected = after if position == "after" else before
        torch.testing.assert_close(torch.tensor(record["values"]), expected, rtol=1e-5, atol=1e-6)
        if position == "both":
            torch.testing.assert_close(torch.tensor(record["values_after"]), after, rtol=1e-5, atol=1e-6)
        else:
            assert "values_after" not in record


@pytest.mark.parametrize("position", POSITIONS)
def test_rollouts_train_the_same_padded_packed_and_from_token_ids(train, run_dir, settings, position):
    """Packed or not, from cached features or through the backbone: the same run but for rounding."""
    runs = {
        "padded": [],
        "packed": ["data.packing=true"],
        "whole": ["model.cache_features=false"],
    }
    losses = {}
    for name, more in runs.items():
        assert train(*settings, f"model.value_position={position}", f"run_dir={run_dir}-{name}", *more) == 0
        losses[name] = [step["train/loss"] for step in steps_of(type(run_dir)(f"{run_dir}-{name}"))]
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-3)
    assert losses["whole"] == pytest.approx(losses["padded"], rel=1e-3)


def test_a_critic_of_rollouts_learns_what_their_last_word_says(train, run_dir, settings):
    more = ["training.epochs=20", "training.learning_rate=0.03", "evaluation.every=50", "model.value_position=both"]
    more += ["training.value_loss.lambda_return.lam=1.0", "model.cache_features=false", "model.backbone_frozen=false"]
    assert train(*settings, *more, "training.value_loss.lambda_return.warmup_steps=0") == 0
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    best = results["checkpoints"]["best"]["metrics"]
    assert best["validation/explained_variance"] > 0.2
    assert best["validation/mean_reward"] == 0.5
    assert results["data"]["rows"]["shapes"] == {"prompt, completion, reward": 144}


def test_the_first_prediction_is_the_mean_reward_of_the_training_rollouts(train, run_dir, settings, write_pairs):
    more = [row for row in rows() if row["reward"] == 1.0 or row["problem_id"] < "p2"]
    path = write_pairs(more, "more.jsonl")
    last = ["training.max_steps=1", "training.learning_rate=1e-12", "evaluation.train_pairs=1000"]
    warm = "training.value_loss.lambda_return.warmup_steps=0"
    assert train(*settings, f"data.path={path}", *last, warm) == 0
    best = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["checkpoints"]["best"]["metrics"]
    assert 0.5 < best["train_subset/mean_reward"] < 1.0
    assert best["validation/mean_value"] == pytest.approx(best["train_subset/mean_reward"], abs=1e-6)
