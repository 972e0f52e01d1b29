"""How Alembic finds the database: :func:`pantarhei.feed.store.migrate` hands a connection over."""

from alembic import context

from pantarhei.feed.schema import metadata

if __name__ == "env_py":  # as Alembic names it; anybody else may import it for nothing
    context.configure(
        connection=context.config.attributes["connection"],
        version_table=context.config.attributes["version_table"],
        target_metadata=metadata,
    )
    context.run_migrations()
