"""Rows of a data file, of a `datasets` folder or of a dataset on the hub, one at a time."""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import json
import os.path
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lambda_return_ext.critic.data.columns import Columns
from lambda_return_ext.critic.errors import UserError, require

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
EXTRA = "'lambda-return-ext[data]'"
# Cells of a CSV file that are JSON, those that are where they hold chat messages and else are text, and those that are
# where they hold a list.
JSON_CELLS = (
    *("messages", "correct", "incorrect", "tools", "answers", "rewards", "prompt_ids", "completion_ids"),
    *("completion_mask", "logprobs", "entropies", "turn_rewards", "completions", "labels", "steps"),
)
CHAT_CELLS = ("prompt", "chosen", "rejected", "completion")
LIST_CELLS = ("finish_reason", "truncated")
# How messages begin, also as Python prints them, which is what some programs write into CSV.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
ROWS_AT_ONCE = 256
Records = Iterator[tuple[str, dict[str, Any]]]
# What `datasets` takes for a split where it stands in the name of a file.
SPLIT_NAME = re.compile(r"(?<![a-z])(train|training|test|testing|eval|evaluation|val|valid|validation|dev)(?![a-z])")
# What makes a folder one that `datasets` saved or that says itself how to load it.
DATASET_FILES = ("state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "README.md")


class Row(NamedTuple):
    """One record and where it stands, as an error names it.

    Attributes:
        where: file and line.
        values: the record.
        named: keys that `data.columns` gives.
    """

    where: str
    values: dict[str, Any]
    named: frozenset[str] = frozenset()


class Source:
    """The rows at `path`, read anew by each iteration; a JSON list alone is held in memory whole.

    Args:
        path: a JSONL, JSON, Parquet or CSV file, a glob or a folder of such files, which are read in natural order, a
            folder that `datasets` saved or whose files name splits, or `owner/name` on the hub.
        subset: the configuration of a dataset that has several.
        split: the split of a dataset that has several.
        name: what the user calls the path.
        columns: {our name of a column: theirs}.
        unlabelled: rows may come without a reward, whatever `columns` says.

    Raises:
        UserError: there is no such thing, or none that can be read.
    """

    def __init__(
        self,
        path: str | Path,
        subset: str | None = None,
        split: str = "train",
        name: str = "data.path",
        columns: Mapping[str, str] | None = None,
        unlabelled: bool = False,
    ):
        self.path = str(path)
        self._columns = dict(columns or {})
        self._unlabelled = unlabelled
        Columns(self._columns)
        self._dataset: Any = None
        self._files = _find_files(self.path, name, plain=subset is None and split == "train")
        if self._files is None:
            self._dataset = _load_dataset(self.path, subset, split)
            self._name = f"{self.path} [{split}]"
        for file in self._files or ():
            if _kind(file) not in FORMATS:
                raise UserError(
                    f"{name} must be a file that ends in {', '.join(FORMATS)}, a glob or a folder of such files, a "
                    f"folder that `datasets` can load, or owner/name on the hub, got {file!r}"
                )
            try:
                open(file, "rb").close()
            except OSError as error:
                raise UserError(
                    f"{name} must be a readable {_kind(file)[1:].upper()} file, got {file!r}: {error.strerror}"
                    f"{self._hint()}"
                ) from error

    def _hint(self) -> str:
        demo = "data/codeio.jsonl"
        return f"; `lambda-critic make-data codeio` writes {demo}" if self.path.endswith(demo) else ""

    def sha256(self) -> str:
        """The digest of the file, of all names and files, or of the rows of a dataset.

        By it a run notices that its data changed.
        """
        digest = hashlib.sha256()
        if self._files is None:
            for row in self:
                digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
            return digest.hexdigest()
        several = self._files != [self.path]
        folder = os.path.commonpath([os.path.dirname(file) for file in self._files]) if several else ""
        for file in self._files:
            if several:
                # Name and size first, so that no other cut of the same bytes into files has this digest.
                name = Path(os.path.relpath(file, folder or ".")).as_posix()
                digest.update(f"{name}\0{os.path.getsize(file)}\0".encode())
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        """Read row by row.

        Raises:
            UserError: names the file and the line or row that is wrong.
        """
        columns = Columns(self._columns, self._unlabelled)
        for kind, where, record in self._records():
            values = columns.rename(record, where) if columns.names else record
            if kind == ".csv":
                values = _parse_cells({key: cell for key, cell in values.items() if cell != ""}, where)
            elif kind == ".parquet":
                values = _without_nulls(values)
            yield Row(where, values, columns.names)
        columns.finish(self.path)

    def _records(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """The format, place and values of each row, as they stand there."""
        if self._files is None:
            kind = ".csv" if self._dataset.builder_name == "csv" else ".parquet"
            for number, values in enumerate(self._dataset, 1):
                yield kind, f"{self._name}, row {number}", _without_nulls(values) if kind == ".csv" else values
            return
        for file in self._files:
            try:
                for where, values in READERS[_kind(file)](file):
                    yield _kind(file), where, values
            except OSError as error:
                raise UserError(f"{file} could not be read: {error}") from error


def _kind(file: str) -> str:
    return Path(file).suffix.lower()


def _find_files(path: str, name: str, plain: bool) -> list[str] | None:
    """The files that a path stands for, in natural order; None where `datasets` is to load it.

    Args:
        path: the path.
        name: what the user calls it.
        plain: neither a subset nor a split other than `train` is asked for.

    Raises:
        UserError: a glob or a folder has no files.
    """
    rule = f"{name} must be a glob or a folder of files that end in {', '.join(FORMATS)}"
    if os.path.isdir(path):
        if not any(names for _, _, names in os.walk(path)):
            raise UserError(f"{rule}, got {path!r}, an empty folder")
        return _files_of_a_folder(path) if plain else None
    if os.path.exists(path):
        return [path]
    if glob.has_magic(path):
        files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)), key=_natural)
        if not files:
            raise UserError(f"{rule}, got {path!r}, which matches no file")
        return files
    return None if HUB_NAME.fullmatch(path) and _kind(path) not in FORMATS else [path]


def _files_of_a_folder(folder: str) -> list[str] | None:
    """The files of a folder as trainers write it; None for one with several splits, formats or levels, a dataset."""
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    files = sorted((entry.path for entry in entries if _kind(entry.name) in FORMATS), key=_natural)
    is_dataset = (
        any(entry.is_dir() or entry.name in DATASET_FILES for entry in entries)
        or any(SPLIT_NAME.search(Path(file).stem.lower()) for file in files)
        or len({_kind(file) for file in files}) != 1
    )
    return None if is_dataset else files


def _natural(path: str) -> list[str | int]:
    """Sorts `2.jsonl` before `10.jsonl`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _read_jsonl(path: str) -> Records:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _record(_parse_json(line, where, "a line must be one JSON object"), where)


def _read_json(path: str) -> Records:
    content = Path(path).read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):  # as `datasets` does: one object a line
        yield from _read_jsonl(path)
        return
    records = _parse_json(content, path, "the file must be a JSON list of objects, or one object a line")
    for number, record in enumerate(records, 1):
        where = f"{path}, row {number}"
        yield where, _record(record, where)


def _read_csv(path: str) -> Records:
    limit = csv.field_size_limit(1 << 30)  # a solution may be longer than the 128 KiB that csv lets a cell have
    number = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if len(set(columns)) < len(columns):
                raise UserError(f"{path}:1: every column must have a name of its own, got {columns}")
            while True:
                number = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                where = f"{path}:{number}"
                if None in cells or None in cells.values():
                    raise UserError(
                        f"{where}: a row must have one cell for each of the columns {columns}, got "
                        f"{sum(cell is not None for key, cell in cells.items() if key is not None)}"
                        f"{' and more' if None in cells else ''}"
                    )
                yield where, dict(cells)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}:{number}: the file must be CSV in UTF-8 with a header line, got what is not: {error}"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: str) -> Records:
    parquet = require("pyarrow.parquet", f"data.path = {path}", EXTRA)
    arrow_error = require("pyarrow", f"data.path = {path}", EXTRA).ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values
    except (arrow_error, OSError, UnicodeDecodeError) as error:  # OSError: a damaged part of the file, among others
        raise UserError(f"{path} must be a Parquet file: {error}") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _load_dataset(path: str, subset: str | None, split: str) -> Any:
    datasets = require("datasets", f"data.path = {path}", EXTRA)
    datasets.disable_progress_bars()
    try:
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(path)
        else:
            dataset = datasets.load_dataset(path, name=subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = "" if Path(path).exists() else " is no file or folder here, and on the hub"
        raise UserError(f"data.path = {path}{where} could not be loaded by `datasets`: {error}") from error
    if isinstance(dataset, dict):
        if split not in dataset:
            raise UserError(f"data.split must be one of {sorted(dataset)} for {path}, got {split!r}")
        dataset = dataset[split]
    return dataset


def _parse_json(text: bytes, where: str, rule: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {rule}, got {text[:60]!r}: {error}") from error


def _parse_cells(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of CSV with the cells parsed that are JSON."""
    return {key: _parse_cell(key, cell, where) if isinstance(cell, str) else cell for key, cell in values.items()}


def _parse_cell(key: str, cell: str, where: str) -> Any:
    if key in JSON_CELLS or (key in LIST_CELLS and cell.lstrip().startswith("[")):
        return _parse_json(cell.encode(), where, f"{key!r} must be a JSON list")
    if key not in CHAT_CELLS or not cell.lstrip().startswith("["):
        return cell
    if MESSAGES.match(cell):
        return _parse_json(cell.encode(), where, f"{key!r} must be text, or messages as a JSON list")
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return value if any(isinstance(item, dict) and "role" in item for item in value) else cell


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a line must be one JSON object, got {type(value).__name__}")
    return value


def _without_nulls(value: Any) -> Any:
    """Columns give every object the keys of all; the null ones were not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
