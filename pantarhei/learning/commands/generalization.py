"""``pantarhei generalization``: learning curves and stopping times from data or from the theory."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    name="generalization",
    help="Predict learning curves, stopping times and the effect of width, from data or theory.",
    no_args_is_help=True,
)


class LossName(StrEnum):
    """The loss whose gradient is descended."""

    mean = "mean"
    sum = "sum"
    half_mean = "half_mean"
    half_sum = "half_sum"


Data = Annotated[
    str | None,
    typer.Argument(metavar="[DATA]", help="A CSV with a header, or an .npz with X and y."),
]
Target = Annotated[str | None, typer.Option(help="The CSV's target column; the last by default.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not standardise the inputs.")]
Alpha = Annotated[list[float] | None, typer.Option(help="Examples over inputs; repeatable.")]
Inr = Annotated[float, typer.Option(help="Initial weights' variance over the teacher's.")]
Until = Annotated[float, typer.Option(help="The last time.")]
Out = Annotated[str | None, typer.Option(help="A new folder for tables and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Widths = Annotated[list[int] | None, typer.Option("--width", help="Hidden units; repeatable.")]
Examples = Annotated[int, typer.Option(help="Training examples of the ReLU teacher.")]
Snr = Annotated[float, typer.Option(help="Signal-to-noise ratio of the ReLU teacher.")]
Seeds = Annotated[int, typer.Option(help="First layers (and teachers) to draw.")]
Start = Annotated[float, typer.Option(help="Variance of the initial readout weights.")]
Center = Annotated[bool, typer.Option("--center", help="Centre the features.")]
TestShare = Annotated[float, typer.Option(help="Share of the data's rows for testing.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.")]


@app.command()
def curve(
    data: Data = None,
    target: Target = None,
    raw: Raw = False,
    alpha: Alpha = None,
    snr: Annotated[
        float | None, typer.Option(help="Signal over noise; estimated from data, else 5.")
    ] = None,
    inr: Inr = 0.0,
    until: Until = 100.0,
    points: Annotated[int, typer.Option(help="Times, evenly spaced in their logarithm.")] = 25,
    out: Out = None,
    json: Json = False,
) -> None:
    """Training and test error over time."""
    from pantarhei import outcome
    from pantarhei.learning.generalization import job

    outcome.check_out(out)
    table = None if data is None else job.read_table(data, target, not raw)
    found = job.curve(table, alpha or [0.5, 1.0, 2.0], snr, inr, until, points)
    outcome.deliver(found, out, json)


@app.command()
def stop(
    data: Data = None,
    target: Target = None,
    raw: Raw = False,
    alpha: Alpha = None,
    snr: Annotated[
        list[float] | None, typer.Option(help="Signal over noise; repeatable without data.")
    ] = None,
    inr: Inr = 0.0,
    lr: Annotated[float | None, typer.Option(help="Learning rate, to get steps.")] = None,
    loss: Annotated[
        LossName, typer.Option(help="Squared error summed or averaged, halved or not.")
    ] = LossName.mean,
    batch_size: Annotated[int | None, typer.Option(help="All examples by default.")] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """When to stop a linear model trained by gradient descent."""
    from pantarhei import outcome
    from pantarhei.learning.generalization import job

    outcome.check_out(out)
    table = None if data is None else job.read_table(data, target, not raw)
    found = job.stop(table, alpha or [0.5, 1.0, 2.0], snr or [], inr, lr, loss.value, batch_size)
    outcome.deliver(found, out, json)


def _sweep(name: str, bounds: bool, summary: str) -> None:
    """Add a command over the number of random features: both take the same options."""

    @app.command(name, help=summary)
    def command(
        data: Data = None,
        target: Target = None,
        raw: Raw = False,
        width: Widths = None,
        examples: Examples = 300,
        snr: Snr = 10.0,
        seeds: Seeds = 10,
        until: Until = 1e5,
        start: Start = 0.0,
        center: Center = False,
        test_share: TestShare = 0.25,
        seed: Seed = 0,
        out: Out = None,
        json: Json = False,
    ) -> None:
        from pantarhei import outcome
        from pantarhei.learning.generalization import job

        outcome.check_out(out)
        table = None if data is None else job.read_table(data, target, not raw)
        found = job.sweep(
            table,
            width or [],
            bounds=bounds,
            examples=examples,
            snr=snr,
            seeds=seeds,
            until=until,
            start=start,
            center=center,
            test_share=test_share,
            seed=seed,
            quiet=json,
        )
        outcome.deliver(found, out, json)


_sweep("width-sweep", False, "Overtraining of random ReLU features over their number.")
_sweep(
    "bound",
    True,
    "Plain and conditioned complexity terms of random ReLU features beside the true gap.",
)
