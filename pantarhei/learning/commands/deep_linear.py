"""``pantarhei deep-linear``: learning curves from data, and what depth and gain do."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(
    name="deep-linear",
    help="Predict learning curves of linear and deep linear networks; sweep depth and gain.",
    no_args_is_help=True,
)


class Start(StrEnum):
    """Where training starts."""

    zero = "zero"
    small = "small"
    orthogonal = "orthogonal"
    gaussian = "gaussian"
    decoupled = "decoupled"
    pretrained = "pretrained"


class LossName(StrEnum):
    """The loss whose gradient is descended."""

    mse = "mse"
    mse_sum = "mse-sum"
    half_mean = "half-mean"
    half_sum = "half-sum"


Target = Annotated[
    list[str] | None, typer.Option(help="A target column of the CSV, the last by default; repeat.")
]
Classes = Annotated[bool, typer.Option("--classes", help="Targets that are numbers are classes.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.", min=0)]
Out = Annotated[str | None, typer.Option(help="A new folder for CSV, JSON and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Starts = Annotated[
    list[str] | None, typer.Option("--start", help="Initial weights, by name; repeat.")
]


@app.command()
def predict(
    data: Annotated[str, typer.Argument(help="A CSV with a header, or an .npz with X and y.")],
    target: Target = None,
    classes: Classes = False,
    hidden: Annotated[
        list[int] | None, typer.Option(help="Width of a hidden layer; repeat. None: linear model.")
    ] = None,
    start: Annotated[
        Start | None, typer.Option(help="Default: zero for a linear model, else small.")
    ] = None,
    std: Annotated[float, typer.Option(help="Of the weights of a small start.")] = 0.01,
    u0: Annotated[float, typer.Option(help="End-to-end strength of a decoupled start.")] = 1e-3,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.1,
    loss: Annotated[
        LossName, typer.Option(help="mse is torch.nn.MSELoss(); half-sum the paper's.")
    ] = LossName.mse,
    steps: Annotated[
        int | None, typer.Option(help="Last step; until learned unless given.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Random starts behind the error bars.")] = 20,
    validation: Annotated[float, typer.Option(help="Share of the rows held back.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Standardise deep inputs only.")] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Go on where inputs are not white.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Simulate the descent, and compare.")
    ] = False,
    seed: Seed = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Predict the full-batch training of a (deep) linear network on your data, without it.

    Which mode is learned when, the plateaus of the loss, and when to stop.
    """
    from pantarhei import outcome
    from pantarhei.data.table import read_table
    from pantarhei.learning.deep_linear import job

    outcome.check_out(out)
    found = job.learning_curve(
        read_table(data, target or (), classes),
        hidden=hidden or (),
        start=(start or (Start.small if hidden else Start.zero)).value,
        std=std,
        u0=u0,
        lr=lr,
        loss=loss.value,
        steps=steps,
        draws=draws,
        validation=validation,
        raw=raw,
        approximate=approximate,
        check=check,
        seed=seed,
    )
    outcome.deliver(found, out, json)


@app.command("depth-sweep")
def depth_sweep(
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="A CSV or .npz; graded modes without.")
    ] = None,
    target: Target = None,
    classes: Classes = False,
    size: Annotated[int, typer.Option(help="Graded modes: how many.", min=1)] = 32,
    low: Annotated[float, typer.Option(help="Graded modes: the weakest.")] = 0.5,
    high: Annotated[float, typer.Option(help="Graded modes: the strongest.")] = 2.0,
    depth: Annotated[list[int] | None, typer.Option(help="Weight matrices; repeat.")] = None,
    start: Starts = None,
    rate: Annotated[list[float] | None, typer.Option(help="A learning rate; repeat.")] = None,
    width: Annotated[
        int | None, typer.Option(help="Of hidden layers; as many as inputs unless given.", min=1)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Initial weights to draw.")] = 3,
    error: Annotated[
        float, typer.Option(help="Share of the learnable loss to come down to.")
    ] = 0.02,
    max_steps: Annotated[int, typer.Option(help="Give up after so many.")] = 600,
    seed: Seed = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Learning time and best rate against depth, from orthogonal, Gaussian and other weights."""
    from pantarhei import outcome
    from pantarhei.data.table import read_table
    from pantarhei.learning.deep_linear import job

    outcome.check_out(out)
    found = job.depths(
        None if data is None else read_table(data, target or (), classes),
        size=size,
        low=low,
        high=high,
        depth=depth or (2, 5, 10, 20),
        starts=start or ("orthogonal", "gaussian"),
        rates=rate or [0.005 * 2**k for k in range(9)],
        width=width,
        seeds=seeds,
        error=error,
        max_steps=max_steps,
        seed=seed,
    )
    outcome.deliver(found, out, json)


@app.command("gain-sweep")
def gain_sweep(
    activation: Annotated[
        str, typer.Argument(help="A name such as tanh, or package.module:function.")
    ] = "tanh",
    gain: Annotated[
        list[float] | None, typer.Option(help="A gain; repeat. Around the critical one by default.")
    ] = None,
    start: Starts = None,
    width: Annotated[int, typer.Option(help="Of every layer.")] = 200,
    depth: Annotated[int, typer.Option(help="Layers.")] = 100,
    seeds: Annotated[int, typer.Option(help="Networks to draw.")] = 1,
    seed: Seed = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Singular values of a deep network's input-output Jacobian against the gain."""
    from pantarhei import outcome
    from pantarhei.learning.deep_linear import job

    outcome.check_out(out)
    found = job.gains(
        activation,
        gain=gain,
        starts=start or ("orthogonal", "gaussian"),
        width=width,
        depth=depth,
        seeds=seeds,
        seed=seed,
    )
    outcome.deliver(found, out, json)
