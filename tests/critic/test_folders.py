"""The folders of the trainer depend one way, and no file of it is long."""

import ast
from pathlib import Path

from lambda_return_ext import critic

FOLDER = Path(critic.__file__).parent
NAME = "lambda_return_ext.critic"
# Each may import from those before it, and from itself. docs/design.md draws it.
ORDER = (
    "errors",
    "files",
    "display",
    "config",
    "data",
    "model",
    "ranks",
    "losses",
    "checkpoint",
    "task",
    "evaluation",
    "reports",
    "training",
    "make_data",
    "cli",
)
LONGEST_FILE = 400


def sources():
    return [path for path in sorted(FOLDER.rglob("*.py")) if path != FOLDER / "__init__.py"]


def room(path):
    """The folder of the trainer, or the module, that a file belongs to."""
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported_rooms(path):
    """What a file imports of the trainer, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        names = []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[2] for name in names if name.startswith(f"{NAME}."))


def test_every_room_is_in_the_order():
    assert {room(path) for path in sources()} == set(ORDER)


def test_folders_depend_one_way():
    upwards = [
        f"{path.relative_to(FOLDER)} imports {other}"
        for path in sources()
        for other in imported_rooms(path)
        if ORDER.index(other) > ORDER.index(room(path))
    ]
    assert not upwards


def test_no_file_is_long():
    files = [path for path in FOLDER.rglob("*") if path.suffix in (".py", ".html")]
    lengths = {str(path.relative_to(FOLDER)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lengths) > 40
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}
