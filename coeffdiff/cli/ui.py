"""coeffdiff ui"""

from __future__ import annotations

from typing import Annotated

import typer

from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import print_info, print_result

Host = Annotated[str, typer.Option(help="Address to serve at; any but this machine's own needs a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")]
AccessToken = Annotated[
    str | None,
    typer.Option(help="What the page's address must hold. (default: one is made where one is needed)"),
]


@app.command()
@answering
def ui(host: Host = "127.0.0.1", port: Port = 7860, token: AccessToken = None) -> None:
    """A local web page for photos, training, pictures and adapters. Runs are those of the working folder."""
    from coeffdiff.ui.server import serve
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    try:
        serve(host, port, token, _announce)
    except KeyboardInterrupt:
        print_info("The page has ended. A training that it started goes on; coeffdiff ui finds it again.")


def _announce(address: str) -> None:
    print_info("page     open this address in a browser; Ctrl-C ends the page, not a training:")
    print_result(address)
