"""The `lambda-critic` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lambda_return_ext.critic.errors import OtherRankError, UserError
from lambda_return_ext.critic.make_data import codeio
from lambda_return_ext.critic.training.interrupt import Interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 when a run fails, or 2 when the user has something to put right."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if arguments.run is _train:  # argparse itself takes no overrides behind a flag
        arguments.overrides += [word for word in more if not word.startswith("-")]
        more = [word for word in more if word.startswith("-")]
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"lambda-critic: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"lambda-critic: error: the trainer needs the Python package {error.name!r}: "
            "pip install 'lambda-return-ext[critic]'",
            file=sys.stderr,
        )
        return 2
    except FloatingPointError as error:
        print(f"lambda-critic: error: {error}", file=sys.stderr)
        return 1
    except OtherRankError:
        return 2
    except Interrupted as stopped:
        print(f"lambda-critic: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if arguments.run is _train else ""
        print(f"lambda-critic: interrupted{hint}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lambda-critic", description="Train and evaluate token-level value models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a critic on pairs of right and wrong solutions")
    train.add_argument("--config", required=True, metavar="FILE", help="YAML file, see docs/critic.md")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="override of a config key, dotted")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in run_dir")
    existing.add_argument("--overwrite", action="store_true", help="remove the run in run_dir and start again")
    train.add_argument("--dry-run", action="store_true", help="check all, say what memory a rank needs, and stop")
    train.add_argument("--ranks", type=int, metavar="N", help="processes that --dry-run reckons with")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate the best checkpoint of a run on its validation problems")
    evaluate.add_argument("run_dir", metavar="RUN", help="folder of the run")
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser(
        "inspect", help="write one HTML page that shows each token's value, target and advantage"
    )
    inspect.add_argument("run_dir", metavar="RUN", help="folder of the run")
    inspect.add_argument("--pairs", type=int, default=50, metavar="N", help="show at most so many pairs (default 50)")
    inspect.add_argument("--output", metavar="FILE", help="the page (default RUN/inspect.html)")
    inspect.set_defaults(run=_inspect)

    score = commands.add_parser("score", help="write the value and advantage of every token of a file")
    score.add_argument("data", metavar="FILE", help="what to score: a data file, folder or dataset")
    score.add_argument("--run", required=True, dest="run_dir", metavar="RUN", help="folder of the critic's run")
    score.add_argument("--output", required=True, metavar="FILE", help="file to write, .jsonl or .parquet")
    score.add_argument("--subset", metavar="NAME", help="configuration of a dataset that has several")
    score.add_argument("--split", default="train", metavar="NAME", help="split of a dataset (default train)")
    score.add_argument("--overwrite", action="store_true", help="replace the output where it is there")
    score.set_defaults(run=_score)

    compare = commands.add_parser("compare", help="print and draw several runs side by side")
    compare.add_argument("run_dirs", nargs="+", metavar="RUN", help="folders of finished runs, two or more")
    compare.add_argument("--output", default="compare.png", metavar="FILE", help="the picture (default compare.png)")
    compare.set_defaults(run=_compare)

    export = commands.add_parser("export", help="write the best checkpoint of a run as a folder for transformers")
    export.add_argument("run_dir", metavar="RUN", help="folder of the run")
    export.add_argument("output", metavar="FOLDER", help="must not exist yet")
    export.set_defaults(run=_export)

    make_data = commands.add_parser("make-data", help="build a data file")
    sources = make_data.add_subparsers(title="sources", required=True, metavar="SOURCE")
    source = sources.add_parser("codeio", help="right and wrong programs, labelled by running them")
    codeio.add_arguments(source)
    source.set_defaults(run=codeio.run)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    # Imported here: the trainer's packages take seconds, which --help need not wait for.
    from lambda_return_ext.critic.config import load_config
    from lambda_return_ext.critic.ranks import Launch, launched
    from lambda_return_ext.critic.training.dry_run import dry_run
    from lambda_return_ext.critic.training.trainer import train

    launch = launched() or Launch(0, 0, 1)
    if arguments.dry_run and launch.rank > 0:
        return 0  # the first process says it all
    ranks = launch.size if arguments.ranks is None else arguments.ranks
    if ranks < 1:
        raise UserError(f"--ranks must be at least 1, got {ranks}")
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        if launch.local_rank > 0:  # the processes of a machine read the same file: one of them says what is wrong
            raise OtherRankError from error
        raise
    if arguments.dry_run:
        dry_run(config, ranks, resume=arguments.resume, overwrite=arguments.overwrite)
        return 0
    train(config, resume=arguments.resume, overwrite=arguments.overwrite)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from lambda_return_ext.critic.training.trainer import evaluate

    evaluate(arguments.run_dir)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from lambda_return_ext.critic.evaluation.scoring import export_run

    export_run(arguments.run_dir, arguments.output)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from lambda_return_ext.critic.reports.inspection import inspect_run

    inspect_run(arguments.run_dir, arguments.pairs, arguments.output)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from lambda_return_ext.critic.evaluation.scoring import score_file

    a = arguments
    score_file(a.run_dir, a.data, a.output, a.subset, a.split, a.overwrite)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from lambda_return_ext.critic.reports.comparison import compare_runs

    compare_runs(arguments.run_dirs, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
