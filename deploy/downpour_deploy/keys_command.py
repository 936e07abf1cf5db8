"""``downpour keys``: make and list the keys that let processes of several hosts talk to each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from downpour_common import exitcodes
from downpour_common.errors import ConfigError

keys_app = typer.Typer(
    help="Make and list the keys of coordinator, servers, workers and users.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Option("--dir", help="The folder of the key files.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of text.")]

DEFAULT = Path("keys")
PURPOSE = {
    "coordinator": "the coordinator proves with it who it is",
    "server": "hosts of parameter servers",
    "worker": "hosts of workers",
    "user": "whoever submits and watches jobs",
}


@keys_app.callback()
def _root() -> None:
    """Make and list the keys of coordinator, servers, workers and users."""


@keys_app.command()
def new(folder: Folder = DEFAULT, json_: AsJson = False) -> None:
    """Make one key pair for each role. Existing files are never overwritten.

    Exit code: 0 success, 2 when a file exists or cannot be written.
    """
    from downpour_common.keys import ROLES, new_keys
    from downpour_common.transport.zeromq import new_key_pair

    with _errors():
        new_keys(folder, {role: new_key_pair() for role in ROLES})
    if json_:
        _print_json(folder, [entry for role in ROLES for entry in _files(folder, role, "")])
        return
    typer.echo(f"{folder}: one key pair per role. A .key file is secret (mode 0600), a .pub file is not.\n")
    for role in ROLES:
        typer.echo(f"  {role + '.key':<18} {role + '.pub':<18} {PURPOSE[role]}")
    typer.echo(
        "\nWhat goes where; copy with a means that keeps others from reading, such as scp -p:\n\n"
        "  coordinator's host   coordinator.key and every .pub: it lets in whom it has a .pub of\n"
        "  hosts of servers     server.key and coordinator.pub\n"
        "  hosts of workers     worker.key and coordinator.pub\n"
        "  users                user.key and coordinator.pub\n\n"
        f"One key per person instead of one for all: downpour keys add user --name NAME --dir {folder}"
    )


@keys_app.command()
def add(
    role: Annotated[str, typer.Argument(help="server, worker or user.")],
    name: Annotated[str, typer.Option("--name", help="Whose key it is, [a-z0-9-].")],
    folder: Folder = DEFAULT,
    json_: AsJson = False,
) -> None:
    """Make one more key pair of a ROLE, for one host or one person.

    Exit code: 0 success, 2 when the file exists or cannot be written, or for a role that is not known.
    """
    from downpour_common.keys import add_key
    from downpour_common.transport.zeromq import new_key_pair

    with _errors():
        add_key(folder, role, name, new_key_pair())
    if json_:
        _print_json(folder, _files(folder, role, name))
        return
    stem = f"{role}-{name}"
    typer.echo(
        f"{folder / stem}.key  secret: move it to where it is used, beside coordinator.pub\n"
        f"{folder / stem}.pub  copy it into the coordinator's folder of keys; removing it there withdraws the key"
    )


@keys_app.command(name="list")
def list_(folder: Folder = DEFAULT, json_: AsJson = False) -> None:
    """Show whom the .pub files of a folder let in.

    Exit code: 0 success, 2 when the folder or one of its files cannot be used.
    """
    from downpour_common.keys import authorized, load_public

    with _errors():
        users = {user: public for public, user in authorized(folder).items()}
        if (folder / "coordinator.pub").exists():
            users = {"coordinator": load_public(folder, "coordinator"), **users}
    if json_:
        rows = [
            {"user": user, "public": public, "secret_here": _has_secret(folder, user)} for user, public in users.items()
        ]
        typer.echo(json.dumps({"dir": str(folder), "keys": rows}))
        return
    for user, public in users.items():
        typer.echo(f"{user:<24} {public}{'   secret key here' if _has_secret(folder, user) else ''}")


def _has_secret(folder: Path, user: str) -> bool:
    return (folder / f"{user.replace('/', '-')}.key").exists()


def _files(folder: Path, role: str, name: str) -> list[dict[str, Any]]:
    stem = f"{role}-{name}" if name else role
    rows = []
    for suffix in (".key", ".pub"):
        secret = suffix == ".key"
        if role == "coordinator":
            hosts = ["coordinator"] if secret else ["coordinator", "server", "worker", "user"]
        else:
            hosts = [role] if secret else ["coordinator"]
        path = str(folder / f"{stem}{suffix}")
        rows.append({"path": path, "role": role, "name": name, "secret": secret, "copy_to": hosts})
    return rows


def _print_json(folder: Path, files: list[dict[str, Any]]) -> None:
    typer.echo(json.dumps({"dir": str(folder), "files": files}))


@contextmanager
def _errors() -> Iterator[None]:
    """Errors of usage go to stderr and end the command."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"downpour: {problem}", err=True)
        raise typer.Exit(exitcodes.USAGE) from None
