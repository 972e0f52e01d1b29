"""``pantarhei lr-transfer``: the learning rate of a large model from small ones."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

app = typer.Typer(name="lr-transfer", add_completion=False)


class Kind(StrEnum):
    """Parametrisations."""

    mup = "mup"
    depth_mup = "depth-mup"
    ntp = "ntp"
    sp = "sp"


class OptimizerName(StrEnum):
    """Optimizers."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class Precision(StrEnum):
    """Number formats of the loss."""

    single = "32"
    bf16 = "bf16"


@app.command("lr-transfer")
def lr_transfer(
    factory: Annotated[
        str, typer.Argument(help="file.py:function taking width= and/or depth=; returns a model.")
    ],
    data: Annotated[
        str, typer.Option(help="An .npz with X and y, a CSV, or file.py:function giving batches.")
    ],
    widths: Annotated[
        str | None, typer.Option(help="Ascending, such as 64,128,256; the first is the proxy.")
    ] = None,
    depths: Annotated[str | None, typer.Option(help="Ascending, such as 2,4,8.")] = None,
    grid: Annotated[
        str | None, typer.Option(help="2^-6..2^4 (the default for SGD), or 0.01,0.03,0.1.")
    ] = None,
    kind: Annotated[Kind, typer.Option(help="The parametrisation.")] = Kind.mup,
    optimizer: Annotated[OptimizerName, typer.Option(help="The optimizer.")] = OptimizerName.sgd,
    loss: Annotated[
        str, typer.Option(help="auto, cross-entropy, mse, or file.py:function(model, batch).")
    ] = "auto",
    branches: Annotated[
        list[str] | None,
        typer.Option(help="A residual branch for depth-mup, such as 'blocks.*.mlp'; repeat."),
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of SGD.", min=0)] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Independent of the width.", min=0)] = 0.0,
    steps: Annotated[int, typer.Option(help="Updates per training.", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="Rows per update.", min=1)] = 128,
    seeds: Annotated[int, typer.Option(help="Initial weights to average over.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="The first of their seeds.", min=0)] = 0,
    regret: Annotated[
        float, typer.Option(help="Largest cost, relative to the best loss, of a rate that serves.")
    ] = 0.03,
    target_width: Annotated[
        int | None, typer.Option(help="Print the rates of a model this wide.", min=1)
    ] = None,
    target_depth: Annotated[
        int | None, typer.Option(help="Print the rates of a model this deep.", min=1)
    ] = None,
    precision: Annotated[Precision, typer.Option(help="32 or bf16.")] = Precision.single,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[
        str | None, typer.Option(help="A new folder for the sweep, the verdict and the plot.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in that folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Find the best learning rate of small models, and whether it serves larger ones."""
    from pantarhei import report
    from pantarhei.learning import lr_transfer_job as job

    result = job.run(
        factory,
        data,
        widths=widths,
        depths=depths,
        grid=grid,
        loss=loss,
        kind=kind.value,
        optimizer=optimizer.value,
        branches=branches or (),
        momentum=momentum,
        weight_decay=weight_decay,
        steps=steps,
        batch_size=batch_size,
        seeds=seeds,
        seed=seed,
        regret=regret,
        target_width=target_width,
        target_depth=target_depth,
        precision=precision.value,
        device=device,
        out=out,
        resume=resume,
        quiet=json,
    )
    if json:
        report.emit_json(result.to_json())
        return
    report.emit(report.table(None, job.COLUMNS, result.rows()))
    for sentence in result.sentences():
        report.emit(sentence)
    if out:
        report.emit(f"Written to '{out}': sweep.json, transfer.json, sweep.png and sweep.svg.")
