"""`lambda-critic score`: values and advantages of every token of a file, row by row, for use as weights elsewhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.config import Config, DataConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.chat import Renderer, read_chat_template
from lambda_return_ext.critic.data.rollouts import Rollout, fit_prompts, fits, tokenize
from lambda_return_ext.critic.data.rows import Answer, Example, parse_example
from lambda_return_ext.critic.data.sources import EXTRA, Source
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.errors import UserError, require
from lambda_return_ext.critic.evaluation.credit import credit_solutions
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.value_model import ValueModel, build_model
from lambda_return_ext.critic.ranks import choose_device

ROWS_AT_ONCE = 64
VALUES = ("values", "targets", "advantages", "td_errors")  # columns of one number a token
# A Parquet file ends in a description of all its row groups, which a writer keeps in memory until then: two kilobytes
# each. With groups of this size that is a ten-thousandth of the file.
ROW_GROUP_BYTES = 1 << 24
Record = dict[str, Any]
Write = Callable[[list[Record]], Any]


class Critic(NamedTuple):
    """A trained critic without its data."""

    config: Config
    model: ValueModel
    tokenizer: Any
    device: torch.device


class Item(NamedTuple):
    """One answer on its way through the model."""

    row: int
    example: Example
    answer: Answer
    rollout: Rollout
    cut: bool


def score_file(
    run: str, data: str, output: str, subset: str | None = None, split: str = "train", overwrite: bool = False
) -> None:
    """Score every answer of a file with the best checkpoint of a run.

    Rows are read and scored a few at a time and written in groups of some megabytes, so that memory does not grow with
    the file.

    Args:
        run: folder of the run.
        data: what `data.path` may be.
        output: a `.jsonl` or `.parquet` file; it appears once it is whole.
        subset: the configuration of a dataset that has several.
        split: the split of a dataset that has several.
        overwrite: replace an output that is there.

    Raises:
        UserError: the run, the data or the output is wrong.
    """
    if Path(output).resolve() == Path(data).resolve():
        raise UserError(f"--output must be another file than the data, got {output!r} for both")
    if Path(output).exists() and not overwrite:
        raise UserError(f"--output must not exist yet, got {output!r}: give --overwrite to replace it")
    writer_of = _writer_of(Path(output))
    settings = checkpoint.saved_config(Path(run)).data
    # Before the model, which takes longer to load than a wrong name to be said.
    source, display = Source(data, subset, split, "FILE", settings.columns, unlabelled=True), Display()
    critic = load_critic(run)
    columns = VALUES if critic.config.model.value_position != "both" else (*VALUES, "values_after")
    renderer = Renderer(critic.tokenizer, read_chat_template(settings.chat_template))
    rows = ((number, parse_example(row, unlabelled=True)) for number, row in enumerate(source, 1))
    scored = left_out = cut = 0
    with writer_of(Path(output), columns) as write, display.phase("scoring", "rows", None) as advance:
        while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
            rollouts = tokenize([example for _, example in part], renderer)
            items = [
                item
                for (number, example), answers in zip(part, rollouts, strict=True)
                for item in fitting_items(number, example, answers, settings)
            ]
            write(score(critic, items))
            scored += len(items)
            left_out += sum(map(len, rollouts)) - len(items)
            cut += sum(item.cut for item in items)
            advance(len(part))
    display.line(f"wrote {output}: {scored:,} answers")
    if cut:
        display.line(f"cut the beginning of the prompt of {cut:,} answers: data.overlong = truncate_prompt")
    if left_out:
        display.line(f"left out: {left_out:,} answers that do not fit into data.max_length = {settings.max_length}")


def fitting_items(row: int, example: Example, rollouts: Sequence[Rollout], config: DataConfig) -> list[Item]:
    """The answers of a row that fit, with their prompts cut as training cuts them: those of a pair the same."""
    whole = [both for both in zip(example.answers, rollouts, strict=True) if fits(both[1].solution, config)]
    groups = [whole] if example.paired and config.sampling == "pairs" else [[both] for both in whole]
    items = []
    for group in filter(None, groups):
        fitted = fit_prompts([rollout.solution for _, rollout in group], config.max_length)
        for (answer, rollout), short in zip(group, fitted, strict=True):
            items.append(Item(row, example, answer, rollout._replace(solution=short), short != rollout.solution))
    return items


def export_run(run: str, output: str) -> None:
    """Write the best checkpoint of a run, with its backbone and tokenizer, as `ValueModel.from_pretrained` reads it.

    Raises:
        UserError: the folder holds no run, or the output exists or cannot be written.
    """
    if Path(output).exists():
        raise UserError(f"FOLDER must not exist yet, got {output!r}")
    critic = load_critic(run)
    critic.model.backbone.config.value_position = critic.config.model.value_position
    try:
        with files.atomic_folder(Path(output)) as temporary:
            critic.model.to("cpu").save_pretrained(temporary)
            critic.tokenizer.save_pretrained(temporary)
    except ValueError as error:  # transformers: a quantized backbone that has no form on disk
        raise UserError(f"{run} has a backbone that cannot be saved: {error}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"FOLDER must be writable and have room, got {output!r}: {error}") from error


def load_critic(run: str) -> Critic:
    """The model of a run's best checkpoint.

    Raises:
        UserError: the folder holds no run, or one without a validation.
    """
    config = checkpoint.saved_config(Path(run))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, backbone = choose_device(config.device), Backbone(config.model)
    model = build_model(backbone, config.data.max_length, None)
    model.autocast_dtype = torch.bfloat16 if config.training.precision == "bfloat16" else None
    checkpoint.load_model(model, checkpoint.load_best(Path(run))[0])
    return Critic(config, model.to(device).eval(), backbone.tokenizer(), device)


def score(critic: Critic, items: Sequence[Item]) -> list[Record]:
    """The records of some answers, in their order."""
    config = critic.config
    gamma, lam = config.training.value_loss.gamma_lam
    size, position = 2 * config.evaluation.batch_size, config.model.value_position
    collate = Collator(
        critic.tokenizer.pad_token_id or 0,
        multiple=config.data.pad_to_multiple_of,
        position=position,
        step_rewards=any(item.rollout.step_rewards is not None for item in items),
    )
    by_length = sorted(range(len(items)), key=lambda i: items[i].rollout.length)
    records: dict[int, Record] = {}
    for start in range(0, len(by_length), size):
        part = by_length[start : start + size]
        solutions = [items[i].rollout.solution for i in part]
        batch = collate.pad([items[i].rollout for i in part]).to(critic.device)
        credits = credit_solutions(critic.model, batch, solutions, gamma, lam, position)
        for i, credit in zip(part, credits, strict=True):
            row, example, answer, rollout, _ = items[i]
            labelled = rollout.reward is not None
            records[i] = {
                "row": row,
                "problem_id": example.problem,
                "answer": answer.name,
                "reward": rollout.reward,
                "prompt_tokens": len(rollout.solution.prompt_ids),
                "token_ids": list(rollout.solution.output_ids),
                "mask": credit.mask.tolist(),
                "values": credit.values.tolist(),
                "targets": credit.targets.tolist() if labelled else None,
                "advantages": credit.advantages.tolist() if labelled else None,
                "td_errors": credit.td_errors.tolist() if labelled else None,
            }
            if credit.values_after is not None:
                records[i]["values_after"] = credit.values_after.tolist()
    return [records[i] for i in range(len(items))]


def _writer_of(output: Path) -> Callable[[Path, Sequence[str]], AbstractContextManager[Write]]:
    """How to write a file of this name.

    Raises:
        UserError: the name is of no format that is written.
    """
    if output.suffix == ".jsonl":
        return _write_jsonl
    if output.suffix == ".parquet":
        require("pyarrow", f"--output {output}", EXTRA)
        return _write_parquet
    raise UserError(f"--output must end in .jsonl or .parquet, got {str(output)!r}")


@contextmanager
def _write_jsonl(output: Path, columns: Sequence[str]) -> Iterator[Write]:
    with _whole(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda records: file.writelines(json.dumps(record) + "\n" for record in records)


@contextmanager
def _write_parquet(output: Path, columns: Sequence[str]) -> Iterator[Write]:
    import pyarrow
    import pyarrow.parquet

    numbers = pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema(
        {
            "row": pyarrow.int64(),
            "problem_id": pyarrow.string(),
            "answer": pyarrow.string(),
            "reward": pyarrow.float32(),
            "prompt_tokens": pyarrow.int32(),
            "token_ids": pyarrow.list_(pyarrow.int32()),
            "mask": pyarrow.list_(pyarrow.bool_()),
            **dict.fromkeys(columns, numbers),
        }
    )
    waiting: list[Any] = []

    with _whole(output) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as file:

        def write_group() -> None:
            file.write_table(pyarrow.concat_tables(waiting))
            waiting.clear()

        def write(records: list[Record]) -> None:
            waiting.append(pyarrow.Table.from_pylist(records, schema))
            if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                write_group()

        yield write
        if waiting:
            write_group()


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A file beside `output` that takes its name once all is written."""
    try:
        with files.atomic_path(output) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"--output must be a file that can be written, got {str(output)!r}: {error}") from error
