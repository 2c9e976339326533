"""The upload to the hub: off by default, checked before a run, whole behind it; against a stand-in
for the hub's own calls. Not here: what the card says (../views/test_card.py)."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from darts_lora import InputError
from darts_lora.config import TrainingConfig
from darts_lora.evaluate import EvaluateConfig, evaluate
from darts_lora.finetune import FinetuneConfig, finetune

TRAINING = TrainingConfig(max_steps=1, batch_size=4, logging_steps=1)
PUSH = {"push_to_hub": True, "hub_model_id": "me/ranks"}


@pytest.fixture
def hub(monkeypatch):
    """What the hub was asked for, in order: repositories, and the files of each upload."""
    calls = []

    def create_repo(self, repo_id, *, private, exist_ok):
        calls.append((repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*")]
        sent = {n for n in names if any(fnmatch(n, pattern) for pattern in allow_patterns)}
        calls.append((repo_id, sent, (Path(folder_path) / "README.md").read_text()))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def uniform(folder, **options):
    return FinetuneConfig(
        None, rank=1, target_modules=["q_proj"], output_dir=str(folder), **options
    )


def test_nothing_goes_to_the_hub_unless_it_is_asked_for(hub, base_config, data, tmp_path):
    finetune(uniform(tmp_path), base_config, data, TRAINING)
    evaluate(EvaluateConfig(str(tmp_path), exact_match=False), base_config, data)
    assert hub == []


def test_the_adapter_and_its_card_are_uploaded(hub, base_config, data, tmp_path):
    config = uniform(tmp_path, pad_to_max=True, **PUSH)
    _, record = finetune(config, base_config, data, TRAINING)
    assert record["uploaded"] == "https://hub/me/ranks/commit/1"
    (opened, (repository, sent, text)) = hub
    assert opened == ("me/ranks", True, True) and repository == "me/ranks"
    files = {"adapter_model.safetensors", "adapter_config.json", "README.md", "ranks.png"}
    assert sent == files | {"padded/adapter_model.safetensors", "padded/adapter_config.json"}
    assert "Not evaluated yet" in text
    options = EvaluateConfig(str(tmp_path), exact_match=False, **PUSH)
    results = evaluate(options, base_config, data)
    assert len(hub) == 4 and f"| adapter | {results['adapter']['loss']:.4f} |" in hub[-1][2]


def test_what_the_hub_refuses_is_told_before_the_training(base_config, data, tmp_path):
    """The hub cannot be reached here: its own client says so."""
    with pytest.raises(InputError, match=r"^push_to_hub=true: the hub does not take 'me/ranks' \("):
        finetune(uniform(tmp_path, **PUSH), base_config, data, TRAINING)
    assert not (tmp_path / "config.yaml").exists()


def test_an_upload_that_fails_leaves_the_adapter(hub, monkeypatch, base_config, data, tmp_path):
    def lost(*args, **options):
        raise ConnectionError("the line is down")

    monkeypatch.setattr(HfApi, "upload_folder", lost)
    with pytest.raises(InputError, match=r"not uploaded to 'me/ranks' \(the line is down\); the"):
        finetune(uniform(tmp_path, **PUSH), base_config, data, TRAINING)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "finetune.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub=true: give the repository too"),
        ({"hub_model_id": "me/x"}, "hub_model_id='me/x': nothing is uploaded without"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, "hub_model_id='a b': is none .Repo id must"),
        ({"push_to_hub": True, "hub_model_id": "../x"}, r"hub_model_id='\.\./x': "),
    ],
)
@pytest.mark.parametrize("kind", [lambda **o: uniform("x", **o), lambda **o: EvaluateConfig(**o)])
def test_options_that_do_not_go_together(kind, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        kind(**options)
