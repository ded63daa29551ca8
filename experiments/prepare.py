"""Everything before the first run: the backbone on disk, the data sets, and the features of all their solutions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.block import BlockInputs
from experiments.programs import human_eval_pairs, make_hard_pairs, read_records, take
from experiments.rollouts import make_rollouts
from experiments.settings import Settings
from lambda_return_ext.critic.config import DataConfig, ModelConfig
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Solution, solutions_of
from lambda_return_ext.critic.data.split import RunData, read_rows, select_data
from lambda_return_ext.critic.evaluation.baselines import likelihood_baseline
from lambda_return_ext.critic.files import atomic_folder, atomic_path
from lambda_return_ext.critic.make_data.codeio.build import write_jsonl
from lambda_return_ext.critic.model.backbone import Backbone, forget_gguf
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt

DATA_SETS = ("rollouts", "mutants", "hard", "human_eval")


def save_backbone(settings: Settings) -> Path:
    """The backbone as a folder: reading the GGUF file takes a quarter of a minute each time, this one second."""
    folder = Path(settings["folder"]) / "backbone"
    if not folder.exists():
        packaged = Backbone(settings["features"]["backbone"])
        model: Any = packaged.language_model()
        tokenizer = packaged.tokenizer()
        forget_gguf(model)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder


def sample_rollouts(settings: Settings, part: int, parts: int) -> None:
    """This process's share of the rollouts."""
    chosen = settings["rollouts"]
    backbone = Backbone(ModelConfig(backbone=str(save_backbone(settings)), dtype=chosen["dtype"]))
    folder = Path(settings["folder"]) / "rollouts"
    make_rollouts(chosen, backbone.language_model().eval(), backbone.tokenizer(), folder, part, parts)


def pair_rollouts(settings: Settings) -> None:
    """`rollouts.jsonl`: in each problem right and wrong answers of similar length that part ways early."""
    chosen, records = settings["pairing"], []
    tokenizer = Backbone(str(save_backbone(settings))).tokenizer()
    for path in sorted((Path(settings["folder"]) / "rollouts").glob("*.json")):
        for problem in read_json(path):
            judged = list(zip(problem["answers"], problem["right"], strict=True))
            right, wrong = (sorted({text for text, label in judged if label is wanted}) for wanted in (True, False))
            ids = {text: tokenizer(text)["input_ids"] for text in right + wrong}
            for one, other in choose_pairs(right, wrong, ids, chosen["pairs"], chosen["length_bin"]):
                question = problem["prompt"].rpartition("Q: ")[2].removesuffix("\nA:")
                name = f"{problem['family']}: {question}"
                records.append({"problem_id": name, "prompt": problem["prompt"], "chosen": one, "rejected": other})
    write_jsonl(records, Path(settings["folder"]) / "rollouts.jsonl")


def choose_pairs(
    right: list[str], wrong: list[str], ids: Mapping[str, list[int]], limit: int, length_bin: int
) -> list[tuple[str, str]]:
    """Pairs within a bin of length; every answer as seldom as can be, then those that part ways earliest."""

    def shared(pair: tuple[str, str]) -> int:
        one, other = ids[pair[0]], ids[pair[1]]
        together = zip(one, other, strict=False)
        return next((i for i, (a, b) in enumerate(together) if a != b), min(len(one), len(other)))

    left = [
        (one, other) for one in right for other in wrong if len(ids[one]) // length_bin == len(ids[other]) // length_bin
    ]
    used: dict[str, int] = defaultdict(int)
    chosen: list[tuple[str, str]] = []
    while left and len(chosen) < limit:
        pair = min(left, key=lambda pair: (used[pair[0]] + used[pair[1]], shared(pair), pair))
        left.remove(pair)
        chosen.append(pair)
        for text in pair:
            used[text] += 1
    return chosen


def make_program_pairs(settings: Settings) -> None:
    """`mutants.jsonl`, `hard.jsonl` and `human_eval.jsonl`, those that are not there."""
    folder, chosen = Path(settings["folder"]), settings["programs"]
    records = read_records(Path(chosen["source"]))
    if not (folder / "mutants.jsonl").exists():
        write_jsonl(take(records, chosen["problems"], chosen["pairs"]), folder / "mutants.jsonl")
    if not (folder / "hard.jsonl").exists():
        tokenizer = Backbone(str(save_backbone(settings))).tokenizer()
        tried = take(records, chosen["tried"], chosen["pairs"])
        how = {**chosen["hard"], "problems": chosen["problems"], "pairs": chosen["pairs"]}
        print(make_hard_pairs(tried, how, tokenizer, folder / "hard.jsonl"), flush=True)
    if not (folder / "human_eval.jsonl").exists():
        print(human_eval_pairs(chosen["human_eval"], folder / "human_eval.jsonl"), flush=True)


def load_pairs(settings: Settings, name: str, validation: int, train: int | None, seed: int) -> RunData:
    """The pairs of a data set, split by problem."""
    config = DataConfig(
        path=str(Path(settings["folder"]) / f"{name}.jsonl"),
        max_length=settings["features"]["max_length"],
        validation_problems=validation,
        train_problems=train,
        split_seed=seed,
    )
    return select_data(read_rows(config), Backbone(str(save_backbone(settings))).tokenizer(), config)


def all_pairs(settings: Settings, name: str) -> list[TokenPair]:
    """Every pair of a data set."""
    data = load_pairs(settings, name, 1, None, 0)
    return sorted(item for item in (*data.train, *data.validation) if isinstance(item, TokenPair))


def base_model(settings: Settings) -> Any:
    """The layers that features come from."""
    layers, length = settings["features"]["layers"], settings["features"]["max_length"]
    backbone = Backbone(ModelConfig(backbone=str(save_backbone(settings)), layers=layers))
    return backbone.base_model(layers, length).eval()


def make_features(settings: Settings, name: str) -> None:
    """Features of every solution of a data set, and what the last block reads where a contestant trains it."""
    folder = Path(settings["folder"])
    path, block_path = folder / f"{name}.safetensors", folder / f"{name}-block.safetensors"
    for_block = any(
        name in part["data_sets"] and trains_block(settings, part["contestants"]) for part in settings["plan"]
    )
    if path.exists() and (block_path.exists() or not for_block):
        return
    groups = group_by_prompt(solutions_of(all_pairs(settings, name)))
    total, done = sum(group.tokens for group in groups), [0, 0]

    def advance(tokens: int) -> None:
        done[0] += tokens
        done[1] += 1
        if done[1] % 20 == 0:
            print(f"{name}: features of {done[0]:,} of {total:,} tokens", flush=True)

    model, seen = base_model(settings), []
    model.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rows, prompts, outputs = [], {}, []
    for group in groups:
        computed = compute_features(model, [group], advance)
        rows += [computed[solution][1:] for solution in group.solutions]
        prompt, continued = seen
        seen.clear()
        if for_block:
            prompts[group.prompt_ids] = prompt[0].clone()
            outputs += [
                one[: len(solution.output_ids)].clone()
                for one, solution in zip(continued, group.solutions, strict=True)
            ]
    if for_block:
        tensors = {"prompts": torch.cat([*prompts.values()]), "outputs": torch.cat(outputs)}
        with atomic_path(block_path) as temporary:
            save_file(tensors, temporary)
    with atomic_path(path) as temporary:
        save_file({"features": torch.cat(rows)}, temporary)


def trains_block(settings: Settings, contestants: list[str]) -> bool:
    """Whether one of them trains the last block."""
    return any(settings["contestants"][name].get("head") == "block" for name in contestants)


def load_features(settings: Settings, name: str) -> dict[Solution, Tensor]:
    """What `make_features` wrote."""
    rows = load_file(Path(settings["folder"]) / f"{name}.safetensors")["features"]
    return split_rows(all_solutions(settings, name), rows)


def load_block_inputs(settings: Settings, name: str) -> BlockInputs:
    """What `make_features` wrote for the last block."""
    tensors = load_file(Path(settings["folder"]) / f"{name}-block.safetensors")
    solutions = all_solutions(settings, name)
    prompts = list(dict.fromkeys(solution.prompt_ids for solution in solutions))
    parts = tensors["prompts"].split([len(prompt) for prompt in prompts])
    return BlockInputs(dict(zip(prompts, parts, strict=True)), split_rows(solutions, tensors["outputs"]))


def all_solutions(settings: Settings, name: str) -> list[Solution]:
    """Every solution of a data set, in the order of its features."""
    return [
        solution for group in group_by_prompt(solutions_of(all_pairs(settings, name))) for solution in group.solutions
    ]


def split_rows(solutions: list[Solution], rows: Tensor) -> dict[Solution, Tensor]:
    """The rows [total, H] by solution."""
    parts = rows.split([len(solution.output_ids) for solution in solutions])
    return dict(zip(solutions, parts, strict=True))


def likelihood(settings: Settings, name: str) -> dict[str, list[float]]:
    """The accuracy of ranking by likelihood per token in each problem, or in every so many of them."""
    model = Backbone(str(save_backbone(settings))).language_model().eval()
    by_problem: dict[str, list[TokenPair]] = defaultdict(list)
    for pair in all_pairs(settings, name):
        by_problem[pair.problem].append(pair)
    return {
        problem: [likelihood_baseline(model, pairs, group_by_prompt(solutions_of(pairs)), lambda _: None)]
        for problem, pairs in sorted(by_problem.items())[:: settings["report"]["likelihood_every"]]
    }


def describe_pairs(settings: Settings, name: str) -> dict[str, Any]:
    """A data set in numbers."""
    pairs = all_pairs(settings, name)
    shared = []
    for pair in pairs:
        together = zip(pair.right.solution.output_ids, pair.wrong.solution.output_ids, strict=False)
        same = next((i for i, (a, b) in enumerate(together) if a != b), 0)
        shared.append(same / min(pair.right.outputs, pair.wrong.outputs))
    return {
        "data_set": name,
        "problems": len({pair.problem for pair in pairs}),
        "pairs": len(pairs),
        "tokens_right": round(sum(pair.right.outputs for pair in pairs) / len(pairs), 1),
        "tokens_wrong": round(sum(pair.wrong.outputs for pair in pairs) / len(pairs), 1),
        "right_longer": round(sum(pair.right.outputs > pair.wrong.outputs for pair in pairs) / len(pairs), 3),
        "right_shorter": round(sum(pair.right.outputs < pair.wrong.outputs for pair in pairs) / len(pairs), 3),
        "shared_prefix": round(sum(shared) / len(pairs), 3),
        "differ_from_first_token": round(sum(share == 0 for share in shared) / len(pairs), 3),
    }


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
