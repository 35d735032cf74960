"""A trained model pushed to the Hugging Face hub, as its folder has it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from plad_fast.data.file_states import MANIFEST
from plad_fast.errors import UsageError, reason_of, reported_as
from plad_fast.training.trained_folders import LOG, RECORD

# Of this machine, or of no use without it.
_STAYS = (MANIFEST, RECORD, LOG, "training_args.bin")
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN"


def check_push(repository: str, *, adapters_on: str | None = None) -> None:
    """Finds out before long work whether a model could be pushed; the hub is asked who we are.

    Args:
        repository: NAME/MODEL.
        adapters_on: model of this machine that adapters are to be pushed for; None for a model
            that others can load.

    Raises:
        UsageError: no such name, no token or one that may not write there, no hub to be reached,
            or adapters on a model that nobody else has.
    """
    option = f"--push-to-hub {repository}"
    owner, slash, name = repository.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise UsageError(f"{option}: give NAME/MODEL, your name or an organisation's and a new one")
    if adapters_on is not None:
        raise UsageError(
            f"{option}: others could not use adapters on {adapters_on}, which is on this machine "
            "only; add --merge"
        )
    with reported_as(f"{option}: the hub does not know who you are; {_TOKEN}", "huggingface_hub"):
        user = HfApi().whoami()
    if owner not in (user["name"], *(org["name"] for org in user.get("orgs", ()))):
        raise UsageError(f"{option}: you are {user['name']} there, and not in {owner}")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(f"{option}: the token may only read; make one that may write")


def push(folder: Path, repository: str) -> str:
    """Pushes model, tokenizer and card, and returns the address. UsageError if the hub does not
    take them."""
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[*_STAYS],
            commit_message="Add a model trained with plad_fast",
        )
    except Exception as error:
        raise UsageError(
            f"--push-to-hub {repository}: the model is trained, and the hub did not take it "
            f"({reason_of(error)}); run the same command again to push {folder}"
        ) from error
    return f"{api.endpoint}/{repository}"
