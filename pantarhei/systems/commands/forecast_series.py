"""``pantarhei forecast-series``: forecast a user's sensor tables, with intervals and baselines."""

from __future__ import annotations

from typing import Annotated

import typer


def forecast_series(
    data: Annotated[
        list[str], typer.Argument(help="CSV, Parquet or NPZ: a file for each run, or folders.")
    ],
    target: Annotated[str, typer.Option(help="The column to forecast.")],
    control: Annotated[
        list[str] | None, typer.Option(help="A column that is planned and known ahead; repeat.")
    ] = None,
    amplitude: Annotated[
        list[str] | None,
        typer.Option(help="A column that oscillates fast: seen by its log amplitude; repeat."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="A column to leave out; repeat.")] = None,
    time: Annotated[str, typer.Option(help="The column of times: seconds, or ISO dates.")] = "time",
    run: Annotated[
        str | None, typer.Option(help="A column that tells runs in one table apart.")
    ] = None,
    step: Annotated[
        float | None, typer.Option(help="Seconds of a frame; the target's interval unless given.")
    ] = None,
    history: Annotated[int, typer.Option(help="Frames to look back.", min=1)] = 10,
    horizon: Annotated[int, typer.Option(help="Frames to look ahead.", min=1)] = 10,
    lead: Annotated[
        list[int] | None, typer.Option(help="Frames ahead to forecast; repeat. Seven by default.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="A run to hold back, by name; repeat.")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of the runs (of one run: its end) to hold back.")
    ] = 0.25,
    members: Annotated[int, typer.Option(help="Networks in the ensemble.", min=1)] = 10,
    epochs: Annotated[int, typer.Option(help="Passes over the training windows.", min=1)] = 40,
    gru: Annotated[bool, typer.Option(help="Train a GRU as a baseline, too.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the random numbers.", min=0)] = 0,
    out: Annotated[str | None, typer.Option(help="A new folder for CSV, JSON, pictures.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Forecast a column of your tables by an ensemble, with intervals, beside the baselines.

    Trained on some runs, judged on others; predictions of these and onwards go to --out.
    """
    from pantarhei import outcome
    from pantarhei.systems.series.job import forecast_table

    outcome.check_out(out)
    found = forecast_table(
        data,
        target=target,
        controls=control or (),
        amplitudes=amplitude or (),
        ignore=ignore or (),
        time=time,
        run=run,
        step=step,
        history=history,
        horizon=horizon,
        leads=lead or (),
        test=test or (),
        share=share,
        members=members,
        epochs=epochs,
        gru=gru,
        device=device,
        seed=seed,
        quiet=json,
    )
    outcome.deliver(found, out, json)
