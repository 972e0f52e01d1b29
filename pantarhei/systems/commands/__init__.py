"""The command lines of the systems' methods; each module holds one typer application, `app`."""
