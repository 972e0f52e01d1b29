"""``pantarhei forecast``: train on trajectories, run forward, compare with the baselines."""

from __future__ import annotations

from typing import Annotated

import typer

Names = Annotated[
    list[str] | None,
    typer.Option("--baseline", help="Another model to train beside it; repeatable."),
]


def forecast(
    data: Annotated[
        str,
        typer.Argument(
            metavar="TRAIN_DATA", help="Trajectories: .npz, .h5, .zarr, or a folder of such."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="sinenet, unet, unet-mod, dil-resnet, fno, ffno, neuralop-fno; "
            "auto-deeponet, auto-edeeponet, auto-deeponet-cnn or auto-ffn."
        ),
    ] = "sinenet",
    baseline: Names = None,
    horizon: Annotated[
        int | None, typer.Option(help="Frames to forecast; all that the tests hold by default.")
    ] = None,
    history: Annotated[int, typer.Option(help="Frames that the model sees.")] = 2,
    test: Annotated[
        str | None, typer.Option(help="Trajectories to test on; a fifth is held out otherwise.")
    ] = None,
    members: Annotated[int, typer.Option(help="Networks of the ensemble.")] = 3,
    steps: Annotated[int, typer.Option(help="Updates of each.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows in an update.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    parameters: Annotated[int, typer.Option(help="Weights of each model, about.")] = 300_000,
    padding: Annotated[
        str, typer.Option(help="Beyond the grid: zeros, or circular for periodic fields.")
    ] = "zeros",
    tell: Annotated[
        bool, typer.Option(help="Tell the models the cases' parameters and masks, where they are.")
    ] = True,
    coverage: Annotated[float, typer.Option(help="Share that the intervals should cover.")] = 0.9,
    cases: Annotated[int, typer.Option(help="Test trajectories at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        str | None,
        typer.Option(help="A new folder: forecasts with intervals, pictures, animation, models."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Train a forecaster of fields on your trajectories, and say what it is worth.

    It is run forward from the first frames of trajectories that it has not seen, beside
    persistence, the training mean and the baselines named.
    """
    from pantarhei.errors import RequestError
    from pantarhei.outcome import check_out, deliver
    from pantarhei.systems import field_job

    check_out(out)
    if padding not in ("zeros", "circular"):
        raise RequestError(f"--padding '{padding}' is unknown: choose zeros or circular.")
    plan = field_job.Plan(
        horizon, history, members, steps, batch_size, lr, parameters, padding, coverage, cases,
        seed, device, json, tell,
    )  # fmt: skip
    deliver(field_job.forecast(data, test, model, baseline or [], plan), out, json)
