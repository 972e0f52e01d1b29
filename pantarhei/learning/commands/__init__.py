"""The command lines of the learning methods; each module holds one typer application, `app`."""
