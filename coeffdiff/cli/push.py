"""coeffdiff push"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from coeffdiff.cli.options import expanded_text
from coeffdiff.cli.root import answering, app
from coeffdiff.utils.console import print_info, print_json, print_result, print_text
from coeffdiff.utils.sizes import readable_size

if TYPE_CHECKING:
    from coeffdiff.training.publishing import Publication

Run = Annotated[
    str, typer.Argument(parser=expanded_text, metavar="RUN", help="Run or adapter folder, or RUN@STEP.")
]
Repo = Annotated[
    str, typer.Argument(metavar="USER/REPO", help="Repository on the Hub; created if it is new.")
]
Public = Annotated[
    bool, typer.Option("--public", help="Let everybody see a new repository. (default: private)")
]
Licence = Annotated[str | None, typer.Option("--license", help="For the card, such as apache-2.0.")]
Message = Annotated[str | None, typer.Option(help="Of the commit. (default: what is uploaded)")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print files and card, and upload nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command()
@answering
def push(
    run: Run,
    repo: Repo,
    public: Public = False,
    licence: Licence = None,
    message: Message = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter to the Hugging Face Hub: its files, a card and the card's pictures, in one commit."""
    from coeffdiff.hosts.hub.upload import check_repo_id, upload
    from coeffdiff.training.publishing import publication
    from coeffdiff.utils.launch_environment import forget_launch

    forget_launch()
    check_repo_id(repo)
    found = publication(run, repo, licence)
    for path in found.paths_of_this_machine():
        print_info(
            f"hint     the adapter names {path}, a path of this machine; others will see it, and pass --model"
        )
    if dry_run:
        _show(found, repo, public, as_json)
        return
    header = found.header
    usual = f"{' and '.join(header.tokens)}: {header.kind}, {header.trained_steps} steps"
    done = upload(repo, found.files, public=public, message=message or usual)
    if public and done.private:
        print_info(f"note     {repo} was private before, and stays so; the Hub's settings of it change that")
    if as_json:
        print_json({"url": done.url, "commit": done.commit, "private": done.private, "files": found.sizes()})
        return
    seen = "private" if done.private else "public"
    print_info(f"pushed   {len(found.files)} files to {repo} ({seen}{', new' if done.created else ''})")
    print_result(done.url)


def _show(found: Publication, repo: str, public: bool, as_json: bool) -> None:
    if as_json:
        print_json({"repo": repo, "private": not public, "files": found.sizes(), "card": found.card})
        return
    print_info(
        f"push     to {repo}, {'public' if public else 'private'} if it is new; nothing is uploaded now"
    )
    for name, size in found.sizes().items():
        print_info(f"file     {name} ({readable_size(size)})")
    print_text(found.card)
