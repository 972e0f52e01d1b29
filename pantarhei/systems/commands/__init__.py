"""The command lines of the forecasters; each module holds one typer application, `app`."""
