"""The command line. Each command declares its options here; its body lives with its feature.

Exit codes: 0 done (``run``: every claim holds), 1 a claim does not hold, 2 the request was wrong
(one sentence on stderr), 70 a defect of pantarhei, 130 interrupted, 141 the reader went away.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from pantarhei.data.simulate.command import simulate
from pantarhei.errors import RequestError, nearest
from pantarhei.feed.commands.add import add
from pantarhei.feed.commands.digest import digest
from pantarhei.feed.commands.serve import serve
from pantarhei.feed.commands.update import update
from pantarhei.learning.commands import deep_linear, effective_theory, generalization, lr_transfer
from pantarhei.systems.commands import graph
from pantarhei.systems.commands.forecast import forecast
from pantarhei.systems.commands.forecast_series import forecast_series

app = typer.Typer(
    name="pantarhei",
    help="Dynamic deep neural networks: methods that run on your model, papers measured again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (deep_linear, generalization, effective_theory, graph):
    app.add_typer(group.app)
for command in (lr_transfer.lr_transfer, simulate, forecast, forecast_series, serve):
    app.command()(command)
feed = typer.Typer(name="feed", help="The page's papers and its mail.", no_args_is_help=True)
for action in (add, update, digest):
    feed.command()(action)
app.add_typer(feed)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
_FAULT = 70


def _version(wanted: bool) -> None:
    if wanted:
        import pantarhei

        print(f"pantarhei {pantarhei.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words to look for.")] = None,
    wing: Annotated[str | None, typer.Option(help="compute, systems or learning.")] = None,
    status: Annotated[str | None, typer.Option(help="runs or planned.")] = None,
    json: Json = False,
) -> None:
    """List the papers, or those that match."""
    from pantarhei import report
    from pantarhei.papers import find

    text = " ".join(query or ())
    found = find(text, wing=wing, status=status)
    if json:
        report.emit_json([card.to_json() for card in found])
    else:
        report.show_papers(found, text)


@app.command()
def show(slug: Annotated[str, typer.Argument(help="The paper.")], json: Json = False) -> None:
    """Show a paper: its claims with their bounds, its settings, what was measured here."""
    from pantarhei import report
    from pantarhei.papers import card, load_recipe

    paper = card(slug)
    recipe = load_recipe(slug) if paper.status == "runs" else None
    if json:
        report.emit_json(report.paper_document(paper, recipe))
    else:
        report.show_paper(paper, recipe)


@app.command()
def run(
    slug: Annotated[str, typer.Argument(help="The paper.")],
    scale: Annotated[
        str, typer.Option(help="quick (2 minutes), cpu (30 minutes) or gpu.")
    ] = "quick",
    out: Annotated[
        str | None, typer.Option(help="The run's folder; a new one under runs/ unless named.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="0 unless named.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    json: Json = False,
) -> None:
    """Run a paper's recipe and judge its claims."""
    from pantarhei import report, runs
    from pantarhei.claims import Ledger
    from pantarhei.papers import load_recipe

    recipe = load_recipe(slug)
    ledger = Ledger()
    with runs.start(
        recipe,
        scale=scale,
        seed=seed,
        out=out,
        device=device,
        changes=_changes(set_ or ()),
        resume=resume,
    ) as begun:
        try:
            result = runs.execute(begun, ledger)
        except KeyboardInterrupt:
            again = ["pantarhei", "run", slug, "--scale", scale, "--out", str(begun.dir)]
            print(f"Interrupted; continue with: {shlex.join(again)} --resume", file=sys.stderr)
            raise typer.Exit(130) from None
    if json:
        report.emit_json(dict(result.document))
    elif begun.leads:
        report.show_result(result)
    raise typer.Exit(0 if result.holds else 1)


@app.command()
def report(
    out: Annotated[str | None, typer.Option(help="The file to write, such as RESULTS.md.")] = None,
    ledger: Annotated[
        str | None, typer.Option(help="The ledger to read; the user's own unless named.")
    ] = None,
    take: Annotated[
        str | None, typer.Option("--import", help="A folder of records to add first.")
    ] = None,
    give: Annotated[
        str | None, typer.Option("--export", help="A folder to write the newest runs' records to.")
    ] = None,
) -> None:
    """Render the newest results of every claim as Markdown; exchange them as files."""
    from pantarhei.claims import Ledger
    from pantarhei.records import export_records, import_records
    from pantarhei.report import write_report

    if take is not None:
        import_records(Ledger(ledger), take)
    write_report(out, ledger)
    if give is not None:
        export_records(Ledger(ledger), give)


@app.command()
def data(json: Json = False) -> None:
    """List the known data sets and where each was found."""
    from pantarhei import report
    from pantarhei.data import located

    found = located()
    if json:
        report.emit_json([row.__dict__ for row in found])
        return
    columns = ("data set", "where", "content")
    report.emit(report.table(None, columns, ((r.name, r.where, r.content) for r in found)))


@app.command()
def enhance(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Pictures and folders.")],
    out: Annotated[str, typer.Option("-o", "--out", help="The folder to write to.")],
    model: Annotated[
        str | None, typer.Option(help="A trained model's file; the shipped one unless named.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="0.5 or 50% of the full network's MACs; 0.02dB against its quality."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="The quality to reach, 0 to 1.")] = None,
    exit: Annotated[int | None, typer.Option(help="Take this exit for every picture.")] = None,
    format: Annotated[str, typer.Option(help="png, jpeg or webp.")] = "png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace old outputs.")] = False,
    max_pixels: Annotated[
        int | None, typer.Option(help="Refuse larger pictures before decoding them.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Repair compressed pictures of unknown quality, each with as much network as it needs."""
    from pantarhei import report
    from pantarhei.compute.enhancement import images, job

    results = job.run_job(
        inputs,
        out,
        model=model,
        budget=budget,
        threshold=threshold,
        exit=exit,
        format=format,
        overwrite=overwrite,
        device=device,
        max_pixels=images.MAX_PIXELS if max_pixels is None else max_pixels,
        quiet=json,
    )
    if json:
        report.emit_json([result.to_json() for result in results])
    else:
        report.emit(report.table(None, job.COLUMNS, (result.row() for result in results)))
    raise typer.Exit(job.exit_code(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a substitute rather than failing.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name="pantarhei",
            standalone_mode=False,
        )
        return code if isinstance(code, int) else 0
    except RequestError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if hasattr(error, "format_message"):  # the parser's own errors, whichever click it uses
            return _refuse(_usage(error))
        traceback.print_exc()
        print("This is a defect of pantarhei, not of the request.", file=sys.stderr)
        return _FAULT


def _refuse(sentence: str) -> int:
    line = " ".join(sentence.split())
    print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return 2


def _usage(error: Exception) -> str:
    """Say in one sentence what is wrong with the command line, with the nearest option."""
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option:
        context = getattr(error, "ctx", None)
        known = [name for p in context.command.params for name in p.opts] if context else []
        where = context.command_path if context else "pantarhei"
        return f"Unknown option '{option}': `{where} --help` lists them.{nearest(option, known)}"
    return str(error.format_message())  # type: ignore[attr-defined]


def _changes(pairs: Sequence[str]) -> dict[str, str]:
    changes: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RequestError(f"--set takes KEY=VALUE, not '{pair}'.")
        if key.strip() in changes:
            raise RequestError(f"--set names '{key.strip()}' twice: keep one.")
        changes[key.strip()] = value
    return changes
