"""``pantarhei serve``: the page, on one's own machine or for others."""

from __future__ import annotations

from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    store: Annotated[
        str | None,
        typer.Option(help="A file, or postgresql://...; the user's own unless named."),
    ] = None,
    mine: Annotated[
        bool,
        typer.Option("--mine", help="For you alone, who may vote, comment, tag and keep a list."),
    ] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="For many people, who log in by mail to do so.")
    ] = False,
    public_url: Annotated[
        str | None,
        typer.Option(
            envvar="PANTARHEI_URL", help="The address people use, as https://papers.example.org."
        ),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="A proxy whose X-Forwarded-For is believed, as 127.0.0.1; repeat."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that answer.")] = 1,
) -> None:
    """Serve the page: papers, search, and what was measured of their claims; for reading only.

    --mine and --shared let people take part.
    """
    from pantarhei.errors import RequestError
    from pantarhei.feed.commands import installed

    if shared and mine:
        raise RequestError("A page is yours alone or shared: choose --mine or --shared.")
    with installed():
        from pantarhei.feed.web import serving
        from pantarhei.feed.web.security import Mode
    mode: Mode = "shared" if shared else "local" if mine else "reading"
    # For oneself, an address set for mail (PANTARHEI_URL) is not this page's.
    url = public_url if mode != "local" else None
    serving.serve(serving.Plan(mode, store, url, tuple(proxy or ())), host, port, workers)
