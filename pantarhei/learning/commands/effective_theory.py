"""``pantarhei effective-theory``: how wide, how deep, and how to initialise."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="effective-theory",
    help="How wide and deep a network should be and how to initialise it, for any activation.",
    no_args_is_help=True,
)

Name = Annotated[
    str, typer.Argument(metavar="ACTIVATION", help="A name, such as gelu, or module:function.")
]
Gamma = Annotated[float, typer.Option(help="Strength of residual branches, 0 to 1.")]
X2 = Annotated[float, typer.Option(help="Mean square of the inputs' entries.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.")]
Out = Annotated[str | None, typer.Option(help="A new folder for tables and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def analyse(
    activations: Annotated[
        list[str], typer.Argument(metavar="ACTIVATION...", help="Names, or module:function.")
    ],
    gamma: Gamma = 0.0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Universality class and critical initialisation of activations."""
    from pantarhei.learning.effective_theory import job
    from pantarhei.outcome import check_out, deliver

    check_out(out)
    deliver(job.analyse(activations, gamma), out, json)


@app.command()
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="module:function or file.py:function.")
    ],
    activation: Annotated[
        str | None, typer.Option(help="Found among the model's modules unless named.")
    ] = None,
    gamma: Gamma = 0.0,
    x2: X2 = 1.0,
    seed: Seed = 0,
    out: Annotated[str | None, typer.Option(help="A .safetensors file to write.")] = None,
    json: Json = False,
) -> None:
    """Initialise a model critically; print its layers with their SGD rates."""
    from pantarhei.learning.effective_theory import job
    from pantarhei.outcome import deliver

    job.check_weights(out)
    deliver(job.init(model, activation, gamma, x2, seed, out), None, json)


@app.command()
def vertex(
    activation: Name,
    layers: Annotated[int, typer.Option(help="The output layer included.")] = 5,
    width: Annotated[int, typer.Option(help="Neurons of every layer.")] = 100,
    x2: X2 = 1.0,
    gamma: Gamma = 0.0,
    lambda_b: Annotated[float, typer.Option(help="Learning-rate factor of biases.")] = 1.0,
    lambda_w: Annotated[float, typer.Option(help="That of weights, before 1/fan-in.")] = 1.0,
    networks: Annotated[int, typer.Option(help="Random networks to measure; 0: theory.")] = 0,
    seed: Seed = 0,
    out: Out = None,
    json: Json = False,
) -> None:
    """Finite-width statistics layer by layer: theory, and random networks beside it."""
    from pantarhei.learning.effective_theory import job
    from pantarhei.outcome import check_out, deliver

    check_out(out)
    found = job.vertex(
        activation, layers, width, x2, gamma, lambda_b, lambda_w, networks, seed, json
    )
    deliver(found, out, json)


@app.command()
def advise(
    activation: Name,
    outputs: Annotated[int, typer.Option(help="Outputs of the network.")] = 1,
    depth: Annotated[int | None, typer.Option(help="Layers; asks for the width.")] = None,
    width: Annotated[int | None, typer.Option(help="Neurons a layer; asks for the depth.")] = None,
    gamma: Gamma = 0.0,
    networks: Annotated[int, typer.Option(help="Random networks to check it with.")] = 0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Say how wide and deep a network with this activation should be."""
    from pantarhei.learning.effective_theory import job
    from pantarhei.outcome import deliver

    deliver(job.advice(activation, outputs, depth, width, gamma, networks, seed, json), None, json)
