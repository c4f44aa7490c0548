"""A database and a user of its own for an application: the SQL behind `fly postgres attach`.

Talks to the serving primary at `address` (ip:port), as superuser. Can be
called again: what exists is kept, the password is set anew.
"""

from __future__ import annotations

from urllib.parse import quote

from flyd.errors import Unavailable

CONNECT_TIMEOUT_S = 5


def database_name(app: str) -> str:
    """The database (and user) of an app: dashes would need quoting in every query."""
    return app.replace("-", "_")


def database_url(cluster: str, app: str, password: str) -> str:
    """The secret that an attached app gets. The host resolves <cluster>.internal to its endpoint."""
    name = database_name(app)
    return f"postgres://{name}:{quote(password)}@{cluster}.internal:5432/{name}"


async def ensure_database(
    address: str, superuser_password: str, app: str, password: str, cluster: str
) -> None:
    """Create the role and the database unless they exist, and set the role's password."""
    import psycopg  # 10 MB that a flyd which attaches nothing should not hold
    from psycopg import sql

    name = database_name(app)
    host, _, port = address.rpartition(":")
    try:
        connection = await psycopg.AsyncConnection.connect(
            host=host,
            port=port,
            user="postgres",
            password=superuser_password,
            dbname="postgres",
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_S,
        )
    except psycopg.Error as error:
        raise Unavailable(
            f"the primary of {cluster} does not take connections at {address}: {error}",
            hint=f"`fly postgres status -a {cluster}` shows its members.",
        ) from error
    async with connection:
        role = await connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name])
        verb = "ALTER" if await role.fetchone() else "CREATE"
        await connection.execute(
            sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(
                sql.SQL(verb), sql.Identifier(name), sql.Literal(password)
            )
        )
        found = await connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
        if not await found.fetchone():
            await connection.execute(
                sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(name))
            )
