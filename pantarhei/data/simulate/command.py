"""``pantarhei simulate``: sets of trajectories from the simulators, written to a folder."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """The files that are written."""

    npz = "npz"
    h5 = "h5"
    zarr = "zarr"


def simulate(
    name: Annotated[
        str | None,
        typer.Argument(help="A simulator's name; lists them without."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder, new or begun before.")] = None,
    cases: Annotated[int, typer.Option(help="How many trajectories.", min=1)] = 64,
    shard: Annotated[int, typer.Option(help="Trajectories in a file.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Of the random starts.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    format: Annotated[Format, typer.Option(help="h5 needs h5py, zarr zarr.")] = Format.npz,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; repeat.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Simulate flows, or runs of a combustor; called again, it goes on with what is missing."""
    from pantarhei import report
    from pantarhei.data.simulate.write import SIMULATORS, simulator, write
    from pantarhei.devices import chosen_device
    from pantarhei.errors import RequestError

    if name is None:
        rows = [(one, str(simulator(one)).partition("(")[2][:-1]) for one in SIMULATORS]
        if json:
            report.emit_json([{"name": one, "settings": settings} for one, settings in rows])
        else:
            report.emit(report.table("Simulators", ["name", "settings"], rows))
        return
    pairs = [text.partition("=") for text in set_ or ()]
    if any(not (key and equals) for key, equals, _ in pairs):
        raise RequestError("--set takes KEY=VALUE, for example --set size=128.")
    where = str(chosen_device(device))
    simulation = simulator(name, {key: value for key, _, value in pairs})
    if out is None:
        raise RequestError("Name the folder to write to with --out.")
    files = write(
        simulation, out, cases, shard=shard, seed=seed, device=where, suffix=f".{format.value}"
    )
    if json:
        report.emit_json({"simulator": name, "cases": cases, "files": [str(f) for f in files]})
    else:
        report.emit(f"{cases} cases of {name} are in {out}, {len(files)} files.")
