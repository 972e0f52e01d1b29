"""The bodies of ``pantarhei effective-theory analyse | init | vertex | advise``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.advice import advise, sweep
from pantarhei.learning.effective_theory.monte_carlo import measure
from pantarhei.learning.effective_theory.recursions import vertices
from pantarhei.learning.effective_theory.training import (
    critical_init_,
    find_activation,
    rates,
    weighted_layers,
)
from pantarhei.learning.user_code import load_function
from pantarhei.outcome import Outcome
from pantarhei.probes.mean_field import Activation, critical_gain, critical_point

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def analyse(activations: Sequence[str], gamma: float) -> Outcome:
    """Return the class and critical point of each activation."""
    rows = []
    for name in activations:
        act = Activation(name)
        point = critical_point(act, gamma)
        rows.append(
            {
                "activation": name,
                "class": point.universality,
                "C_b": point.C_b,
                "C_W": point.C_W,
                "K*": point.K,
                "nu": point.nu,
                "a1": point.a1,
                "b1": point.b1,
                "gain": _gain(act),
                "kinks": " ".join(f"{k:g}" for k in act.kinks.tolist()) or "none",
                "why": point.reason,
            }
        )
    return Outcome(f"Critical points{f', residual branch {gamma:g}' if gamma else ''}", rows)


def init(
    factory: str, activation: str | None, gamma: float, x2: float, seed: int, out: str | None
) -> Outcome:
    """Build a model, initialise it critically, and save its weights where ``out`` says."""
    import torch

    model = build(factory)
    act = Activation(activation if activation is not None else find_activation(model))
    devices = {p.device for p in model.parameters()}
    generator = torch.Generator(devices.pop()).manual_seed(seed)
    layers = critical_init_(model, act, gamma=gamma, x2=x2, generator=generator)
    biases, weights = rates(act, len(layers))
    if out is not None:
        _save(model, out)
    rows = [
        {
            "layer": row.name,
            "fan-in": row.fan_in,
            "std of weights": (row.C_W / row.fan_in) ** 0.5,
            "std of biases": row.C_b**0.5,
            "SGD rate of weights": W / row.fan_in,
            "SGD rate of biases": b,
        }
        for row, b, W in zip(layers, biases, weights, strict=True)
    ]
    watched = {id(layer) for _, layer in weighted_layers(model)}
    untouched = [
        name
        for name, module in model.named_modules()
        if id(module) not in watched and next(module.parameters(recurse=False), None) is not None
    ]
    facts = {
        "activation": act.name,
        "left as they were": ", ".join(untouched) or "nothing",
        "written to": out or "nowhere: give --out weights.safetensors",
    }
    return Outcome(f"Critical initialisation of {factory}", rows, facts)


def vertex(
    activation: str,
    layers: int,
    width: int,
    x2: float,
    gamma: float,
    lambda_b: float,
    lambda_W: float,
    networks: int,
    seed: int,
    quiet: bool,
) -> Outcome:
    """Return theory's statistics of every layer, beside those of random networks if asked for."""
    if networks and width < 2:
        raise RequestError(f"--width {width}: pairs of neurons need at least 2.")
    if width < 1:
        raise RequestError(f"--width {width} must be at least 1.")
    theory = vertices(activation, layers, x2, gamma=gamma, lambda_b=lambda_b, lambda_W=lambda_W)
    found = None
    if networks:
        found = measure(
            activation, (width,) * layers, x2, networks=networks, gamma=gamma, ntk=True,
            lambda_b=lambda_b, lambda_W=lambda_W, seed=seed, quiet=quiet,
        )  # fmt: skip
    names = [
        name
        for name in ("K", "Theta", "V", "D", "F", "A", "B", "P", "Q")
        if getattr(theory, name) is not None
    ]
    rows: list[dict[str, Any]] = []
    for layer in range(layers):
        row: dict[str, Any] = {"layer": layer + 1}
        for name in names:
            row[name] = float(getattr(theory, name)[layer])
            measured = "G" if name == "K" else name
            if found is not None and measured in found.values:
                row[f"{name} measured"] = float(found[measured][layer])
                row[f"{name} error"] = float(found.errors[measured][layer])
        row["V/(n K^2)"] = float(theory.V[layer] / theory.K[layer] ** 2) / width
        rows.append(row)
    facts = {"width": width, "networks": networks or "none: give --networks to measure"}
    return Outcome(
        f"{activation}, {layers} layers: cumulants are these over the width",
        rows,
        facts,
        figures={"vertices": lambda: _draw_vertices(activation, rows, width)},
    )


def advice(
    activation: str,
    outputs: int,
    depth: int | None,
    width: int | None,
    gamma: float,
    networks: int,
    seed: int,
    quiet: bool,
) -> Outcome:
    """Return how wide and deep a network should be, and how to initialise it."""
    told = advise(activation, outputs, depth=depth, width=width, gamma=gamma)
    facts: dict[str, Any] = {
        "C_b": told.critical.C_b,
        "C_W": told.critical.C_W,
        "K*": told.critical.K or None,
        "nu": told.critical.nu,
        "best depth over width": told.ratio,
        "depth": told.depth,
        "width": told.width,
        "V/(n K^2)": told.non_gaussianity,
    }
    if networks and told.depth and told.width and told.width > 1:
        row = sweep(
            activation, (told.width,), told.depth, networks=networks, gamma=gamma, seed=seed,
            quiet=quiet,
        )[-1]  # fmt: skip
        facts["V/(n G^2) measured"] = row["measured"]
        facts["its error"] = row["error"]
    return Outcome(
        f"A network with {activation} and {outputs} outputs",
        [{"advice": sentence} for sentence in told.sentences],
        facts,
    )


def build(factory: str) -> nn.Module:
    """Call ``module:function``, or ``file.py:function``, which returns a model."""
    make = load_function(factory, "MODEL")
    model = make if isinstance(make, nn.Module) else make()
    if not isinstance(model, nn.Module):
        raise RequestError(f"'{factory}' gives {type(model).__name__}, not a torch.nn.Module.")
    return model


def check_weights(out: str | None) -> None:
    """Refuse, before the work is done, weights that could not be written."""
    if out is not None and Path(out).suffix != ".safetensors":
        raise RequestError(f"'{out}' has no known ending: choose .safetensors.")
    if out is not None and Path(out).exists():
        raise RequestError(f"'{out}' exists already: name another file.")


def _save(model: nn.Module, out: str) -> None:
    from safetensors.torch import save_model

    from pantarhei.files import atomic

    with atomic(out) as temporary:
        save_model(model, str(temporary))


def _gain(act: Activation) -> float | None:
    try:
        return critical_gain(act).gain
    except RequestError:
        return None


def _draw_vertices(activation: str, rows: list[dict[str, Any]], width: int) -> Figure:
    from matplotlib.figure import Figure

    names = [name for name in rows[0] if name in ("K", "Theta", "V", "D", "F", "A", "B", "P", "Q")]
    figure = Figure(figsize=(9, 2.5 * -(-len(names) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(names) // 3), 3, squeeze=False).flatten()
    layers = [row["layer"] for row in rows]
    for axes, name in zip(grid, names, strict=False):
        axes.plot(layers, [row[name] for row in rows], "k-", label="recursion")
        if f"{name} measured" in rows[0]:
            axes.errorbar(
                layers,
                [row[f"{name} measured"] for row in rows],
                [3 * row[f"{name} error"] for row in rows],
                fmt="o",
                ms=4,
                capsize=3,
                label=f"networks, n = {width}",
            )
        axes.set(title=name, xlabel="layer")
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{activation}: vertices by layer")
    return figure
