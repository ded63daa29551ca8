"""The benchmarks time right answers only, in turns, and say what ran where."""

import csv
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import cpu
import general
import gpu
import harness
import pytest
import report
import torch
from harness import Batch, Contestant
from peers import Peer, UnavailableError, loops, numba_loop, rlax_process, torchrl_estimate
from peers.compiled import associative_scan, log2_doubling

from lambda_return_ext import reference

TINY = cpu.Plan(
    seconds=0.001,
    main_shapes=((3, 70),),
    memory_shapes=((2, 130),),
    columns=(8, 32),
    rows=(1, 4),
    densities=(0.3, 1.0),
    density_shapes=((2, 130),),
    general_shapes=((3, 70),),
    slow_peers=True,
    tokens_peers=True,
)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def batch_with(mask: str = "gaps", B: int = 4, T: int = 37) -> Batch:
    return cpu.make_batch(B, T, torch.float32, cpu.make_mask(mask, B, T))


# ---- answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["dense", "gaps", "runs"])
def test_exact_answers_are_those_of_the_reference(mask):
    batch = batch_with(mask, T=150)
    values = batch.values.double().requires_grad_()
    arguments = (batch.rewards.double(), batch.attention_mask, batch.loss_mask, harness.GAMMA, harness.LAM)
    loss = reference.compute_lambda_value_loss(values, *arguments)
    loss.backward()
    returns = reference.compute_lambda_return(values, arguments[0], *arguments[2:])
    exact = harness.exact_returns(batch)
    torch.testing.assert_close(exact, returns.detach(), rtol=0, atol=1e-14)
    for ours, wanted in zip(harness.exact_loss(batch, exact), (loss.detach(), values.grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("wrong", [1e-4, float("nan"), float("inf")])
def test_a_wrong_answer_stops_the_benchmark(wrong):
    exact = harness.exact_returns(batch_with())
    answer = exact.float()
    assert harness.check("right", answer, exact) < 1e-6
    answer[2, 5] += wrong
    with pytest.raises(SystemExit, match="wrong one is wrong by"):
        harness.check("wrong one", answer, exact)
    with pytest.raises(SystemExit, match="shape"):
        harness.check("wrong one", answer[:, 1:], exact)


def test_a_wrong_contestant_is_never_timed(monkeypatch, tmp_path):
    def timed(*_arguments):
        raise AssertionError("a wrong contestant was timed")

    def prepare(batch):
        return Contestant("liar", "1.0", lambda: batch.values, clock=timed)

    monkeypatch.setattr(cpu, "PEERS", (Peer("liar", prepare, gaps=True),))
    with pytest.raises(SystemExit, match="liar is wrong"):
        cpu.run(TINY, tmp_path, ["peers"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("peer", loops.PEERS, ids=lambda peer: peer.name)
def test_loops_are_right(peer):
    batch = batch_with()
    contestant = peer.prepare(batch)
    harness.check(contestant.name, contestant.answer(contestant.call()), harness.exact_returns(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", list(gpu.OURS))
def test_contestants_on_the_device_are_right(work, dtype):
    """What gpu.py compiles is here run as it is; the check is the one that its answers pass before they are timed."""
    values, rewards, _attention_mask, mask = batch_with(T=150)
    if work == gpu.CLASSIFICATION:
        values = torch.rand(*mask.shape, gpu.K, generator=torch.Generator().manual_seed(0))
    batch = (values.to(dtype), rewards, mask)
    exact = gpu.exact(work, batch)
    scan = torch.compile(associative_scan, backend="eager")
    names = [work, *(function.__name__ for function in (log2_doubling, gpu.return_loop)), "associative_scan"]
    contestants = [gpu.OURS[work](torch.ones(())), *map(gpu.ON_TOP[work], (log2_doubling, gpu.return_loop, scan))]
    for name, contestant in zip(names, contestants, strict=True):
        gpu.check_all(name, contestant(*batch), exact)
    if work in gpu.PUBLIC_LOSSES:
        gpu.check_all("full call", (gpu.full_call(work, batch)(),), exact[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", list(gpu.GENERAL))
def test_options_on_the_device_are_right(work, dtype):
    values, rewards, _attention_mask, mask = batch_with(T=150)
    batch = (values.to(dtype), rewards, mask)
    for name, contestant in gpu.contestants(work):
        gpu.check_all(name, contestant(*gpu.prepare(work, batch)), gpu.exact(work, batch))


@pytest.mark.parametrize("wrong", ["ours", "composed"])
def test_a_wrong_option_is_never_timed(monkeypatch, tmp_path, wrong):
    def of_a_wrong_case(batch):
        case = general.cases(batch)["huber, forward"]
        return {"huber, forward": case._replace(**{wrong: lambda: getattr(case, wrong)() + 1e-3})}

    monkeypatch.setattr(cpu, "cases", of_a_wrong_case)
    with pytest.raises(SystemExit, match="huber, forward is wrong"):
        cpu.run(TINY, tmp_path, ["general"])
    assert not list(tmp_path.iterdir())


def test_options_move_the_bytes_that_are_counted():
    ones = torch.ones(4, 50, dtype=torch.bool)
    cases = general.cases(Batch(torch.zeros(4, 50), torch.zeros(4), ones, ones))  # one mask for both
    rows, offsets = 4 * 4, 5 * 8
    for name, a_token, others in (
        ("rewards", 4 + 1 + 4 + 4, rows),
        ("returns and advantages", 4 + 1 + 4 + 4, rows),
        ("packed returns", 4 + 4, rows + offsets),
        ("clipped, forward", 4 + 1 + 4, rows),
        ("clipped, forward + backward", 2 * (4 + 1 + 4) + 4, 2 * rows),
    ):
        assert cases[name].bytes_moved == 200 * a_token + others, name


def test_exact_answers_on_the_device_are_those_on_the_cpu():
    values, rewards, _attention_mask, mask = batch = batch_with()
    returns = harness.exact_returns(batch)
    exact = {gpu.RETURN: (returns,), gpu.LOSS: harness.exact_loss(batch._replace(attention_mask=mask), returns)}
    for work, answers in exact.items():
        for ours, wanted in zip(gpu.exact(work, (values, rewards, mask)), answers, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)


def test_the_goals_of_the_device_say_whether_they_are_met():
    row = {"work": gpu.RETURN, "contestant": gpu.RETURN, "dtype": "float32", "share_of_copy": 0.9, "call_us": 13.0}
    long_rows, small = {**row, "B": 16, "T": 131072, "device_ms_min": 0.02}, {**row, "B": 1, "T": 8}
    loss = {**small, "work": gpu.LOSS, "contestant": gpu.LOSS}
    assert list(gpu.goals([long_rows, small, loss, {**small, "contestant": "another"}])) == [
        "lambda_return 16 x 131072 float32: share of copy >= 85%: 90.0%, met",
        "lambda_return 16 x 131072 float32: device <= 0.015 ms: 0.0200 ms, missed",
        "lambda_return 1 x 8 float32: full call <= 12.0 us: 13.0 us, missed",
        f"{gpu.LOSS} 1 x 8 float32: full call <= 12.0 us: 13.0 us, missed",
    ]


def test_associative_scan_is_right():
    batch = batch_with(T=16)
    scan = torch.compile(associative_scan, backend="eager")
    harness.check("scan", scan(batch.values, batch.rewards, batch.loss_mask), harness.exact_returns(batch))


# ---- time --------------------------------------------------------------------------------------------------------


def recorder(name: str, log: list[tuple[str, int]], cost: float) -> Contestant:
    def clock(calls: int) -> float:
        log.append((name, calls))
        return calls * cost

    return Contestant(name, "", lambda: None, clock=clock)


def test_contestants_take_turns():
    log: list[tuple[str, int]] = []
    contestants = [recorder("a", log, 1e-5), recorder("b", log, 2e-5), recorder("slow", log, 3.0)]
    timings = harness.interleave(contestants, seconds=0.01)
    assert [timing.minimum for timing in timings] == pytest.approx([1e-5, 2e-5, 3.0])
    assert timings[2].samples == 3
    assert all(20 <= timing.samples <= 22 for timing in timings[:2])  # 0.01 s in batches of 0.5 ms
    batches = [name for name, calls in log[3:] if calls > 1 or name == "slow"]
    rounds = [batches[i : i + 3] for i in range(0, 9, 3)]
    assert all(sorted(names) == ["a", "b", "slow"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1  # not always the same one after the same other one
    # One untimed call before every batch of many.
    assert all(log[i - 1] == (name, 1) for i, (name, calls) in enumerate(log) if calls > 1)


def test_seconds_are_those_of_all_calls():
    done = []
    assert Contestant("", "", lambda: done.append(1)).seconds(7) > 0
    assert len(done) == 7


def test_one_thread_stays_on_one_core():
    os = harness.os
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not pin threads")
    before = os.sched_getaffinity(0)
    with harness.pinned(2):
        assert os.sched_getaffinity(0) == before
    with harness.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


# ---- from end to end ---------------------------------------------------------------------------------------------


def absent(_batch):
    raise UnavailableError("absent is not installed")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_tiny_run_writes_csv_tables_and_plots(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "PEERS", (*loops.PEERS, Peer("absent", absent, gaps=False)))
    cpu.run(TINY, tmp_path, cpu.SCENARIOS)
    report.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.csv" for name in cpu.SCENARIOS} | {"cpu.md", "tokens.png", "peers.png", "density.png"}
    rows = rows_of(tmp_path / "peers.csv")
    facts = {key: str(value) for key, value in harness.machine().items()}
    assert all(facts.items() <= row.items() for row in rows)
    assert all(row["threads"] == "1" and row["load_before"] and row["dtype"] == "float32" for row in rows)
    timed = [row for row in rows if row["status"] == "ok"]
    assert all(0 < float(row["min_us"]) <= float(row["median_us"]) and row["version"] for row in timed)
    missing = [row for row in rows if row["status"] != "ok"]
    assert [(row["contestant"], row["status"], row["mask"], row["min_us"]) for row in missing] == [
        ("absent", "absent is not installed", "dense", "")
    ]
    assert "absent: absent is not installed." in (tmp_path / "cpu.md").read_text()
    loop = next(row for row in timed if row["contestant"] == "return loop over T" and row["mask"] == "gaps")
    ours = next(row for row in timed if row["contestant"] == "lambda_return" and row["mask"] == "gaps")
    assert float(loop["times_lambda_return"]) == pytest.approx(float(loop["min_us"]) / float(ours["min_us"]), rel=0.01)
    assert ours["bytes_a_token"] == "9"
    assert float(ours["times_copy"]) > 0
    options = [row["contestant"] for row in rows_of(tmp_path / "general.csv")]
    expected = general.cases(batch_with())
    assert options[0] == "lambda_return"
    assert [name for name in options[1:] if not name.startswith("composed: ")] == list(expected)
    assert [name[10:] for name in options if name.startswith("composed: ")] == [
        name for name, case in expected.items() if case.composed
    ]


def test_peers_without_their_packages_say_so(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr("peers.peer.metadata.version", version)
    for peer in (*torchrl_estimate.PEERS, *numba_loop.PEERS):
        with pytest.raises(UnavailableError, match="is not installed"):
            peer.prepare(batch_with("dense"))


@pytest.mark.parametrize(("python", "reason"), [("/nowhere/python", "not installed"), (sys.executable, "no jax here")])
def test_an_rlax_process_that_cannot_run_says_why(monkeypatch, tmp_path, python, reason):
    monkeypatch.setenv("RLAX_PYTHON", python)
    (tmp_path / "jax.py").write_text("raise ImportError('no jax here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rlax_process._worker.cache_clear()
    with pytest.raises(UnavailableError, match=reason):
        rlax_process.PEERS[0].prepare(batch_with("dense"))


def test_the_gpu_benchmark_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, gpu.__file__, "--quick"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a CUDA device" in done.stderr


# ---- pages -------------------------------------------------------------------------------------------------------


def test_only_what_stands_between_markers_is_replaced():
    page = "before\n<!-- benchmark a -->\nold\n<!-- end -->\nbetween\n<!-- benchmark b -->\nkept\n<!-- end -->\n"
    new = report.update(page, {"a": "new\n"})
    assert new == page.replace("old", "new")
    assert report.update(new, {"a": "new\n"}) == new


def test_the_pages_quote_the_results_that_are_checked_in():
    text = report.sections(report.RESULTS)
    for path in report.PAGES:
        page = path.read_text()
        assert "<!-- benchmark " in page
        assert report.update(page, text) == page, f"{path.name}: run python benchmarks/report.py"


def test_options_are_multiples_of_the_plain_operators_and_what_is_composed_of_ours():
    times = {
        "lambda_return": 10.0, "rewards": 15.0, "mse, forward": 20.0, "composed: mse, forward": 90.0,
        "mse, forward + backward": 40.0, "huber, forward + backward": 50.0,
        "composed: huber, forward + backward": 125.0, "clipped, forward": 30.0, "composed: clipped, forward": 15.0,
    }  # fmt: skip
    rows = [{"B": "64", "T": "1024", "contestant": name, "min_us": time} for name, time in times.items()]
    assert report.general_table(rows).splitlines()[2:] == [
        "| lambda_return | 10.0 | - |",
        "| rewards | 15.0 (1.50x) | - |",
        "| mse, forward | 20.0 | 90.0 (4.50x) |",
        "| mse, forward + backward | 40.0 | - |",
        "| huber, forward + backward | 50.0 (1.25x) | 125 (2.50x) |",
        "| clipped, forward | 30.0 (1.50x) | 15.0 (0.50x) |",
        "",
        "Slower than what is composed: clipped, forward (64 x 1,024).",
    ]


def test_goals_are_judged(tmp_path):
    facts = {"B": "1", "T": "8", "mask": "dense", "threads": "1"}
    times = {
        "lambda_return": 5.0, "loss forward": 9.0, "loss forward + backward": 30.0,
        "F.mse_loss forward + backward": 20.0,
    }  # fmt: skip
    rows = [{**facts, "contestant": name, "min_us": time} for name, time in times.items()]
    harness.write_csv(tmp_path / "overhead.csv", rows)
    verdicts = [(number, verdict) for _what, _where, number, verdict in report.goals(tmp_path)]
    assert verdicts == [(5.0, "met"), (9.0, "missed"), (1.5, "missed")]


def test_every_operator_is_judged_against_its_own_copy(tmp_path):
    floors = {"new": "copy, 5 bytes a token", "in place": "copy in place, 4 bytes a token"}
    floor_of = dict(zip(report.OURS, (floors["new"], floors["in place"], floors["new"]), strict=True))
    facts = {"B": "512", "T": "8192", "mask": "gaps", "dtype": "bfloat16", "threads": "1"}
    times = {floors["new"]: 10.0, floors["in place"]: 4.0, **dict.fromkeys(report.OURS, 12.0)}
    rows = [
        {**facts, "contestant": name, "floor": floor_of.get(name, ""), "min_us": 1.0, "median_us": time}
        for name, time in times.items()
    ]
    harness.write_csv(tmp_path / "dtypes.csv", rows)
    assert report.goals(tmp_path) == [
        (f"out of cache: {name} / {copy} <= 1.25, one thread", "512 x 8192 gaps bfloat16", ratio, verdict)
        for name, copy, ratio, verdict in (
            ("lambda_return", "copy into a new tensor", 1.2, "met"),
            ("loss forward", "copy in place", 3.0, "missed"),
            ("loss backward", "copy into a new tensor", 1.2, "met"),
        )
    ]
