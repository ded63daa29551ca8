"""Data set (c): what the backbone itself answers at temperature 1, right or wrong by the scorer of reasoning-gym."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.families import FAMILIES, OPENINGS, Entry, Family
from experiments.sampling import sample
from lambda_return_ext.critic.files import write_json

ANSWER = "Answer:"
EXAMPLES = 6


def problems(name: str, family: Family, options: dict[str, Any], count: int, seed: int) -> tuple[Any, list[Entry], str]:
    """The scorer, up to `count` distinct problems, and the examples that stand before each of them in the prompt."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=4 * count + 20, seed=seed, **options)
    distinct = list({family.ask(entry): entry for entry in dataset}.values())
    shown = distinct[:EXAMPLES]
    blocks = [
        f"Q: {family.ask(entry)}\nA: {opening} {family.work(entry)}. {ANSWER} {family.give(entry)}\n\n"
        for entry, opening in zip(shown, itertools.cycle(OPENINGS), strict=False)
    ]
    return dataset, distinct[EXAMPLES : EXAMPLES + count], "".join(blocks)


def judge(dataset: Any, family: Family, entry: Entry, text: str) -> bool | None:
    """Whether the scorer calls an answer right; None where there is no answer in it."""
    work, mark, answer = text.rpartition(ANSWER)
    answer = answer.strip()
    if not mark or not work.strip() or not answer:
        return None
    try:
        return dataset.score_answer(family.read(answer), entry) == 1.0
    except ValueError:  # some scorers read what is no number at all
        return False


def line_ends(tokenizer: Any) -> Tensor:
    """A mask [vocabulary] of the tokens with a line break, and that of the end."""
    ends = torch.tensor(["\n" in tokenizer.decode([i]) for i in range(len(tokenizer))])
    ends[tokenizer.eos_token_id] = True
    return ends


def make_rollouts(settings: dict[str, Any], model: Any, tokenizer: Any, folder: Path, part: int, parts: int) -> None:
    """Answer every problem; one file a batch of problems, and what is there already is left alone.

    Args:
        settings: `rollouts` of the settings.
        model: the language model.
        tokenizer: its tokenizer.
        folder: where the files go.
        part: the share of this process, of `parts`.
        parts: how many processes share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ends, number = line_ends(tokenizer), 0
    for name, chosen in settings["families"].items():
        family = FAMILIES[name]
        dataset, entries, examples = problems(name, family, chosen["options"], chosen["problems"], settings["seed"])
        for start in range(0, len(entries), settings["batch_problems"]):
            number += 1
            path = folder / f"{name}-{start:03d}.json"
            if number % parts != part or path.exists():
                continue
            batch = entries[start : start + settings["batch_problems"]]
            prompts = [f"{examples}Q: {family.ask(entry)}\nA:" for entry in batch]
            ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
            shared = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
            written = sample(
                model,
                ids[0][:shared],
                [row[shared:] for row in ids],
                settings["samples"],
                settings["room"],
                ends,
                torch.Generator().manual_seed(settings["seed"] + number),
            )
            texts = [None if answer is None else tokenizer.decode(answer) for answer in written]
            records = []
            for index, (entry, prompt) in enumerate(zip(batch, prompts, strict=True)):
                answers = texts[index * settings["samples"] : (index + 1) * settings["samples"]]
                judged = [None if text is None else judge(dataset, family, entry, text) for text in answers]
                records.append({"family": name, "prompt": prompt, "answers": answers, "right": judged})
            write_json(path, records)
            right = sum(record["right"].count(True) for record in records)
            wrong = sum(record["right"].count(False) for record in records)
            print(f"{path.name}: {right} right, {wrong} wrong of {len(texts)}", flush=True)
