"""`lambda-critic compare`: tables of what differs, and one picture."""

import pytest

from lambda_return_ext.critic.cli import main
from lambda_return_ext.critic.reports import plots


@pytest.fixture
def train(config_file, tmp_path):
    def run(name, *overrides):
        folder = tmp_path / name
        settings = [f"run_dir={folder}", "training.max_steps=6", *overrides]
        assert main(["train", "--config", str(config_file), *settings]) == 0
        return str(folder)

    return run


@pytest.fixture
def length_plot(monkeypatch):
    """Of the accuracy by length drawn last the titles under the bars, their heights, and the legend."""
    drawn = {}
    save = plots._save

    def spy(figure, path):
        axis = figure.axes[-1]
        assert "ccuracy by length" in axis.get_title()
        drawn["titles"] = [label.get_text() for label in axis.get_xticklabels()]
        drawn["bars"] = [[bar.get_height() for bar in run] for run in axis.containers]
        drawn["legend"] = axis.get_legend()
        save(figure, path)

    monkeypatch.setattr(plots, "_save", spy)
    return drawn


def cells(line):
    return [cell.strip() for cell in line.strip("\u2502\n").split("\u2502")]


def test_two_runs_side_by_side(train, tmp_path, capsys):
    lam = "training.value_loss.lambda_return.lam"
    runs = [train("td"), train("mc", f"{lam}=1.0", "training.learning_rate=0.1", "evaluation.baselines=true")]
    capsys.readouterr()
    picture = tmp_path / "both.png"
    assert main(["compare", *runs, "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in map(cells, out.splitlines()) if len(row) == 3}
    assert rows[lam] == ["0.95", "1.0"]
    assert rows["training.learning_rate"] == ["0.01", "0.1"]
    assert rows["evaluation.baselines"] == ["False", "True"]
    assert not {"run_dir", "seed"} & rows.keys()
    assert all(0 <= float(cell) <= 1 for cell in rows["pairwise accuracy"])
    assert rows["baseline: likelihood"][0] == ""
    assert float(rows["baseline: likelihood"][1]) >= 0
    assert sum(title.endswith(" tokens") for title in rows) == 4
    assert "different data" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_other_data_and_the_same_configuration_are_said(train, tmp_path, capsys, length_plot):
    runs = [train("a"), train("b", "data.split_seed=1", "data.length_bin=8"), train("c")]
    capsys.readouterr()
    assert main(["compare", *runs, "--output", str(tmp_path / "abc.png")]) == 0
    out = capsys.readouterr().out
    assert "measured on different data" in out
    # Quarters that end elsewhere have no lengths in common, in the table and in the picture.
    quarters = ["shortest quarter", "second quarter", "third quarter", "longest quarter"]
    assert length_plot["titles"] == quarters
    rows = {row[0]: row[1:] for row in map(cells, out.splitlines()) if len(row) == 4}
    for i, quarter in enumerate(quarters):
        told = [float(cell) for cell in rows[f"pairwise accuracy, {quarter}"]]
        assert told == pytest.approx([bars[i] for bars in length_plot["bars"]], abs=5e-5)
    assert main(["compare", runs[0], runs[2], "--output", str(tmp_path / "ac.png")]) == 0
    assert "The runs have the same configuration." in capsys.readouterr().out
    assert len(length_plot["titles"]) == 4
    assert all(title.endswith(" tokens") for title in length_plot["titles"])
    assert length_plot["legend"] is None  # it would cover bars


def test_what_compare_refuses(train, tmp_path, capsys):
    run = train("a")
    capsys.readouterr()
    for arguments, message in (
        ([run], "RUN must be given at least twice, got 1"),
        ([run, str(tmp_path / "none")], "RUN must be the folder of a run"),
        ([run, run, "--output", "x.jpg"], "--output must end in .png, got 'x.jpg'"),
        ([run, run, "--output", str(tmp_path / "no" / "x.png")], "--output must be a file that can be written"),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "a" / "results.json").unlink()
    assert main(["compare", run, run]) == 2
    assert "RUN must be a finished run, with a results.json in it" in capsys.readouterr().err
