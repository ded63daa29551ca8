"""Rows of a data file, of a `datasets` folder or of a dataset on the hub, one at a time."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lambda_return_ext.critic.errors import UserError, require

FORMATS = (".jsonl", ".json", ".parquet", ".csv")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
EXTRA = "'lambda-return-ext[data]'"
# Cells of a CSV file that are JSON, and those that are where they hold chat messages and else are text.
JSON_CELLS = ("messages", "correct", "incorrect", "tools")
CHAT_CELLS = ("prompt", "chosen", "rejected", "completion")
# How messages begin, also as Python prints them, which is what some programs write into CSV.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
ROWS_AT_ONCE = 256


class Row(NamedTuple):
    """One record and where it stands, as an error names it."""

    where: str
    values: dict[str, Any]


class Source:
    """The rows at `path`, read anew by each iteration; a JSON list alone is held in memory whole.

    Args:
        path: a JSONL, JSON, Parquet or CSV file, a folder that `datasets` can load, or `owner/name` on the hub.
        subset: the configuration of a dataset that has several.
        split: the split of a dataset that has several.
        name: what the user calls the path.

    Raises:
        UserError: there is no such thing, or none that can be read.
    """

    def __init__(self, path: str | Path, subset: str | None = None, split: str = "train", name: str = "data.path"):
        self.path = str(path)
        self._file: Path | None = None
        self._dataset: Any = None
        if Path(path).is_dir() or (not Path(path).exists() and self._names_a_hub_dataset()):
            self._dataset = _load_dataset(self.path, subset, split)
            self._name = f"{self.path} [{split}]"
        else:
            self._file = Path(path)
            kind = self._file.suffix.lower()
            if kind not in FORMATS:
                raise UserError(
                    f"{name} must be a file that ends in {', '.join(FORMATS)}, a folder that `datasets` can load, "
                    f"or owner/name on the hub, got {self.path!r}"
                )
            self._kind = kind.removeprefix(".")
            try:
                self._file.open("rb").close()
            except OSError as error:
                raise UserError(
                    f"{name} must be a readable {self._kind.upper()} file, got {self.path!r}: {error.strerror}"
                    f"{self._hint()}"
                ) from error

    def _hint(self) -> str:
        demo = "data/codeio.jsonl"
        return f"; `lambda-critic make-data codeio` writes {demo}" if self.path.endswith(demo) else ""

    def _names_a_hub_dataset(self) -> bool:
        return Path(self.path).suffix.lower() not in FORMATS and HUB_NAME.fullmatch(self.path) is not None

    def sha256(self) -> str:
        """The digest of the file, or of the rows of a dataset: by it a run notices that its data changed."""
        digest = hashlib.sha256()
        if self._file is None:
            for row in self:
                digest.update(json.dumps(row.values, sort_keys=True, default=str).encode())
        else:
            with self._file.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        """Read row by row.

        Raises:
            UserError: names the file and the line or row that is wrong.
        """
        if self._file is None:
            for number, values in enumerate(self._dataset, 1):
                where, values = f"{self._name}, row {number}", _without_nulls(values)
                yield Row(where, _parse_cells(values, where) if self._dataset.builder_name == "csv" else values)
        else:
            try:
                yield from getattr(self, f"_read_{self._kind}")(self._file)
            except OSError as error:
                raise UserError(f"{self.path} could not be read: {error}") from error

    def _read_jsonl(self, path: Path) -> Iterator[Row]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{self.path}:{number}"
                    yield Row(where, _record(_parse_json(line, where, "a line must be one JSON object"), where))

    def _read_json(self, path: Path) -> Iterator[Row]:
        content = path.read_bytes()
        if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):  # as `datasets` does: one object a line
            yield from self._read_jsonl(path)
            return
        records = _parse_json(content, self.path, "the file must be a JSON list of objects, or one object a line")
        for number, record in enumerate(records, 1):
            where = f"{self.path}, row {number}"
            yield Row(where, _record(record, where))

    def _read_csv(self, path: Path) -> Iterator[Row]:
        limit = csv.field_size_limit(1 << 30)  # a solution may be longer than the 128 KiB that csv lets a cell have
        number = 1
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                columns = reader.fieldnames or []
                if len(set(columns)) < len(columns):
                    raise UserError(f"{self.path}:1: every column must have a name of its own, got {columns}")
                while True:
                    number = reader.line_num + 1
                    try:
                        cells = next(reader)
                    except StopIteration:
                        return
                    where = f"{self.path}:{number}"
                    if None in cells or None in cells.values():
                        raise UserError(
                            f"{where}: a row must have one cell for each of the columns {columns}, got "
                            f"{sum(cell is not None for key, cell in cells.items() if key is not None)}"
                            f"{' and more' if None in cells else ''}"
                        )
                    values: dict[str, Any] = {key: cell for key, cell in cells.items() if cell != ""}
                    yield Row(where, _parse_cells(values, where))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path}:{number}: the file must be CSV in UTF-8 with a header line, got what is not: {error}"
            ) from error
        finally:
            csv.field_size_limit(limit)

    def _read_parquet(self, path: Path) -> Iterator[Row]:
        parquet = require("pyarrow.parquet", f"data.path = {self.path}", EXTRA)
        arrow_error = require("pyarrow", f"data.path = {self.path}", EXTRA).ArrowException
        try:
            with parquet.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(ROWS_AT_ONCE):
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(f"{self.path}, row {number}", _without_nulls(values))
        except (arrow_error, OSError, UnicodeDecodeError) as error:  # OSError: a damaged part of the file, among others
            raise UserError(f"{self.path} must be a Parquet file: {error}") from error


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
    if key in JSON_CELLS:
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
