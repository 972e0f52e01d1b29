"""``pantarhei graph-forecast``: who will be linked to whom next, from a list of events."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pantarhei.data.events import Events

app = typer.Typer(
    name="graph-forecast",
    help="Forecast the edges of a changing graph, or their labels, from a list of events.",
    no_args_is_help=True,
)


class TaskName(StrEnum):
    """What is told."""

    link = "link"
    edge = "edge"


class ModelName(StrEnum):
    """What can be trained."""

    h = "evolvegcn-h"
    o = "evolvegcn-o"
    gcn = "gcn"
    gcn_gru = "gcn-gru"
    roland = "roland"
    mlp = "mlp"


class PolicyName(StrEnum):
    """Where the recurrent state begins."""

    restart = "restart"
    carry = "carry"


class SamplingName(StrEnum):
    """Which pairs are not edges."""

    smart = "smart"
    uniform = "uniform"
    historical = "historical"
    all = "all"


EventList = Annotated[
    str, typer.Argument(help="CSV or other text (.gz too): source, target, time, one a row.")
]
Column = Annotated[str | None, typer.Option(help="Its column: a name of the header, or 0, 1, ...")]
Folder = Annotated[str, typer.Argument(help="A folder that `graph-forecast train` made.")]
Top = Annotated[int, typer.Option(help="How many edges to predict.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Out = Annotated[str | None, typer.Option(help="A new folder for what is found.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def train(
    events: EventList,
    task: Annotated[
        TaskName, typer.Option(help="link: the next snapshot's edges; edge: labels of edges.")
    ] = TaskName.link,
    model: Annotated[ModelName, typer.Option(help="The model to keep.")] = ModelName.h,
    against: Annotated[
        list[ModelName] | None, typer.Option(help="A rival trained alike; repeat. All others.")
    ] = None,
    bin: Annotated[
        str | None, typer.Option(help="Width of a snapshot: 3600, 12h, 7d. A 50th of the time.")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Each event counts in both directions.")
    ] = False,
    window: Annotated[int, typer.Option(help="Snapshots seen before the last.")] = 5,
    adjacency_window: Annotated[
        int, typer.Option(help="Each graph seen is the sum of so many snapshots.")
    ] = 1,
    policy: Annotated[
        PolicyName, typer.Option(help="carry: EvolveGCN's state runs on from the first snapshot.")
    ] = PolicyName.restart,
    hidden: Annotated[int, typer.Option(help="Width of the layers.", min=1)] = 32,
    head_hidden: Annotated[int, typer.Option(help="Width of the head's layer.", min=1)] = 64,
    degree_cap: Annotated[
        int, typer.Option(help="Degrees from here on are one input; 0: none are.", min=0)
    ] = 64,
    epochs: Annotated[int, typer.Option(help="At most.", min=1)] = 20,
    patience: Annotated[int, typer.Option(help="Epochs without a better one.", min=1)] = 5,
    lr: Annotated[float, typer.Option(help="Adam's rate.")] = 0.005,
    class_weight: Annotated[
        list[float] | None, typer.Option(help="Of a class in the loss; repeat for each class.")
    ] = None,
    sampling: Annotated[
        SamplingName, typer.Option(help="How pairs that are not edges are drawn.")
    ] = SamplingName.uniform,
    negatives: Annotated[float, typer.Option(help="Such pairs for each edge.")] = 20.0,
    top: Top = 100,
    source: Column = None,
    target: Column = None,
    time: Column = None,
    label: Column = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the random numbers.", min=0)] = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Train on the past, measure on the last fifth of time beside its rivals, predict what comes.

    With --out: table.csv (test), training.csv, snapshots.csv, next.csv (predicted edges) and the
    forecaster, for `evaluate` and `predict`.
    """
    from pantarhei import outcome
    from pantarhei.systems.evolving_graphs import job

    outcome.check_out(out)
    rivals = list(ModelName) if against is None else against
    learned = job.learn(
        _events(events, source, target, time, label),
        task=task.value,
        model=model.value,
        against=[name.value for name in rivals],
        bin=bin,
        symmetric=symmetric,
        window=window,
        adjacency_window=adjacency_window,
        policy=policy.value,
        hidden=hidden,
        head_hidden=head_hidden,
        degree_cap=degree_cap,
        epochs=epochs,
        patience=patience,
        lr=lr,
        class_weights=class_weight or None,
        sampling=sampling.value,
        negatives_per_edge=negatives,
        top=top,
        device=device,
        seed=seed,
        quiet=json,
    )
    outcome.deliver(learned.outcome, out, json)
    if out is not None:
        job.save(learned, out)


@app.command()
def evaluate(
    folder: Folder,
    events: EventList,
    source: Column = None,
    target: Column = None,
    time: Column = None,
    label: Column = None,
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure a trained forecaster on other events, beside rules that learn nothing."""
    from pantarhei import outcome
    from pantarhei.systems.evolving_graphs import job

    outcome.check_out(out)
    found = job.judge(_events(events, source, target, time, label), folder, device)
    outcome.deliver(found, out, json)


@app.command()
def predict(
    folder: Folder,
    events: EventList,
    top: Top = 100,
    source: Column = None,
    target: Column = None,
    time: Column = None,
    label: Column = None,
    device: Device = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Predict the edges of the snapshot that follows the last event, to table.csv."""
    from pantarhei import outcome
    from pantarhei.systems.evolving_graphs import job

    outcome.check_out(out)
    found = job.predict(_events(events, source, target, time, label), folder, top, device)
    outcome.deliver(found, out, json)


def _events(path: str, *columns: str | None) -> Events:
    """Read the list; a column is a number or a name."""
    from pantarhei.data.events import read_events

    found = [int(c) if c is not None and c.isdecimal() else c for c in columns]
    named = dict(zip(("source", "target", "time", "label"), found, strict=True))
    return read_events(path, **named)
