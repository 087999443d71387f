"""The commands for keys and kits: provision, keygen, admit, revoke."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .common import reported

__all__ = ["Insecure", "InsecureNetwork", "KitFolder", "register"]


KitFolder = Annotated[
    Path | None,
    typer.Option(
        "--kit",
        envvar="FEDCORE_KIT",
        help="Kit folder with the key to use; not needed beside a run folder.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Plain text between processes of this machine, without keys."),
]
InsecureNetwork = Annotated[
    bool, typer.Option("--insecure-network", help="With --insecure: between machines too.")
]


class _Role(enum.StrEnum):
    SITE = "site"
    OBSERVER = "observer"
    OPERATOR = "operator"


ServerKit = Annotated[
    Path, typer.Option("--server-kit", help="The server's kit: its key and the allow-list.")
]


@reported
def provision(
    project: Annotated[Path, typer.Argument(help="The project file.", metavar="PROJECT.toml")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the kits.  [default: kits, beside the file]"),
    ] = None,
) -> None:
    """Make the server's keys and a kit for each party of a project.

    A kit is a folder with its owner's secret key and what it takes to reach the server: hand it over on a way
    that you trust, and delete it here. Called again with more names, it makes the missing kits alone.

    \b
    Example of a project file:
      [project]
      server = "tcp://fl.example.org:7733"
      sites = ["north", "south", "west"]
      observers = ["dashboard"]
      operators = ["ops"]

    \b
    Examples:
      fedcore provision project.toml
      fedcore provision project.toml --out /srv/fl/kits
    """
    from fedcore.security.provision import load_project
    from fedcore.security.provision import provision as make

    folder = out if out is not None else project.parent / "kits"
    parties = load_project(project)
    made = make(parties, folder)
    typer.echo(f'server: {made.server}   (run file: [server] keys = "{made.server}")')
    for name, kit in made.kits.items():
        site = str(parties.parties[name]) == "site"
        use = f"FEDCORE_KIT={name} python train.py" if site else f"fedcore status --kit {name}"
        typer.echo(f"{name}: {kit}   (there: {use})")
    if made.admitted:
        typer.echo(f"admitted before, left as they are: {', '.join(made.admitted)}")


@reported
def keygen(
    folder: Annotated[Path, typer.Argument(help="Folder of the new kit.", metavar="KIT")],
    like: Annotated[
        Path | None, typer.Option(help="A kit whose server and name the new one takes over.")
    ] = None,
    server: Annotated[str, typer.Option(help="The server's address, tcp://HOST:PORT.")] = "",
    server_key: Annotated[
        str, typer.Option(help="The server's public key: public.key in its kit.")
    ] = "",
    name: Annotated[
        str, typer.Option(help="The name by which the server is to know this key.")
    ] = "",
) -> None:
    """Make a kit whose secret key never leaves this machine.

    It shows the public half, which the server has to admit.

    With --like, it is the next key of the same name: admit it, start with it, then revoke the old one.

    \b
    Examples:
      fedcore keygen kit --name north --server tcp://fl.example.org:7733 --server-key KEY
      fedcore keygen kit-2 --like kit
    """
    from fedcore.security.provision import make_key

    kit = make_key(folder, like, server, server_key, name)
    public = kit.credentials.pair.public
    typer.echo(f"{folder}: the secret key stays here. At the server:")
    typer.echo(f"  fedcore admit {kit.name} '{public}'")


@reported
def admit(
    name: Annotated[str, typer.Argument(help="The name by which the key is known.")],
    public_key: Annotated[str, typer.Argument(help="What `fedcore keygen` showed.")],
    role: Annotated[_Role, typer.Option(help="What the key may do.")] = _Role.SITE,
    server_kit: ServerKit = Path("kits/server"),
) -> None:
    """Put a public key on the server's allow-list.

    A server that runs takes it up within a second.

    A name may have two keys, so that one can take the other's place.

    \b
    Examples:
      fedcore admit north 'PUBLIC_KEY'
      fedcore admit ops 'PUBLIC_KEY' --role operator --server-kit /srv/fl/kits/server
    """
    from fedcore.security.keys import Role
    from fedcore.security.provision import admit as put

    keys = put(server_kit, name, Role(role), public_key)
    typer.echo(f"{name} is admitted as {role}" + (f", with {keys} keys" if keys > 1 else ""))


@reported
def revoke(
    name: Annotated[str, typer.Argument(help="Whose keys to take off the list.")],
    key: Annotated[
        str | None, typer.Option(help="This public key alone.  [default: all of the name]")
    ] = None,
    server_kit: ServerKit = Path("kits/server"),
) -> None:
    """Take a name's keys off the server's allow-list.

    A server that runs takes its processes out of the round within a second, and goes on as without a lost site.

    \b
    Examples:
      fedcore revoke north
      fedcore revoke north --key 'OLD_PUBLIC_KEY'
    """
    from fedcore.security.provision import revoke as take

    left = take(server_kit, name, key)
    typer.echo(f"{name}: revoked" + (f", {left} key left" if left else ""))


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (provision, keygen, admit, revoke):
        app.command()(command)
