"""An adapter on the hub: whether it may go there, before a run; the upload, behind it.
Not here: what the card says (views/card.py)."""

from __future__ import annotations

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from darts_lora.base.errors import InputError, told_as

# what a reader needs: no option with a path of this machine goes along
UPLOADED = ["adapter_model.safetensors", "adapter_config.json", "README.md", "ranks.png"]
UPLOADED += [f"padded/{name}" for name in UPLOADED[:2]]


def check_hub_options(push_to_hub: bool, hub_model_id: str | None) -> None:
    """Whether both options go together.

    Raises:
        InputError: one of them is missing, or the id is none.
    """
    if push_to_hub and hub_model_id is None:
        raise InputError("push_to_hub=true: give the repository too, --hub_model_id NAME/MODEL")
    if hub_model_id is not None and not push_to_hub:
        raise InputError(
            f"hub_model_id={hub_model_id!r}: nothing is uploaded without --push_to_hub"
        )
    with told_as(f"hub_model_id={hub_model_id!r}: is none", HFValidationError):
        validate_repo_id(hub_model_id or "of/nobody")


def open_repository(hub_model_id: str) -> None:
    """Make the repository, private, where it is not there: what is wrong with the name, the network
    or the user's rights shows before a run.

    Raises:
        InputError: the hub refuses.
    """
    refused = f"push_to_hub=true: the hub does not take {hub_model_id!r}"
    advice = "; log in by `hf auth login`, or leave push_to_hub out"
    # any kind: the hub's own, the network's, a token that is missing
    with told_as(refused, Exception, behind=advice):
        HfApi().create_repo(hub_model_id, private=True, exist_ok=True)


def upload(folder: str, hub_model_id: str) -> str:
    """Upload the adapter in `folder` with its card; the address of the commit.

    Raises:
        InputError: the hub refuses; the folder stays as it is.
    """
    failed = f"push_to_hub=true: {folder} was not uploaded to {hub_model_id!r}"
    advice = "; the adapter is whole in that folder: `hf upload` takes it later"
    with told_as(failed, Exception, behind=advice):  # as above
        commit = HfApi().upload_folder(
            repo_id=hub_model_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            commit_message="LoRA adapter, made with darts_lora",
        )
    return str(commit.commit_url)
