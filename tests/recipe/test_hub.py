"""Model cards, and `--push-to-hub` against a hub on loopback."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from plad_fast.cli import main
from plad_fast.models.loading import load_model
from tests.support.hub_server import HubServer
from tests.support.recipe_runs import arguments, content, train, write_pairs

PUSH = ("--push-to-hub", "someone/student")


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", 4)


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def settings_of(card: ModelCard) -> dict:
    return yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])


def test_a_push_is_the_model_with_its_card(hub, tiny_teacher, pairs, tmp_path, capsys):
    output = tmp_path / "out"
    measured = ("--eval-pairs", str(pairs), "--eval-steps", "1")
    optimizer = ("--training", "optim=adafactor")
    assert main(train(tiny_teacher, pairs, output, *PUSH, *measured, *optimizer)) == 0
    assert f"pushed: {hub.address}/someone/student" in capsys.readouterr().out
    assert "private" in hub.created[0].values() or hub.created[0]["private"]
    pushed = hub.files["someone/student"]
    here = {path.name: path.read_bytes() for path in output.iterdir()}
    assert pushed == {name: here[name] for name in pushed}
    of_machine = {"training.json", "log_history.json", "files.json", "training_args.bin"}
    assert here.keys() - pushed.keys() == of_machine
    folder = tmp_path / "pushed"
    folder.mkdir()
    for name, data in pushed.items():
        (folder / name).write_bytes(data)
    assert load_model(folder).num_parameters() == load_model(tiny_teacher).num_parameters()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder of this machine
    assert str(tmp_path) not in card.content
    for told in (
        "plad_ranking",
        "4 rows",
        "all weights",
        "best checkpoint",
        "To be stated by whoever",
    ):
        assert told in card.text
    # The card's settings make the model again.
    config = settings_of(card)
    assert (config["model"], config["eval_pairs"]) == (tiny_teacher.name, pairs.name)
    config |= {"model": str(tiny_teacher), "pairs": str(pairs), "eval_pairs": str(pairs)}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config))
    again = ["train", "--config", str(tmp_path / "settings.yaml"), "--output-dir"]
    assert main([*again, str(tmp_path / "again")]) == 0
    records = [json.loads((f / "training.json").read_text()) for f in (output, tmp_path / "again")]
    assert records[0] == records[1]
    assert config["training"] == {"optim": "adafactor"}


def test_a_push_that_failed_is_made_up_for(hub, tiny_teacher, pairs, tmp_path, capsys):
    hub.refuses = "/commit/"
    command = train(tiny_teacher, pairs, tmp_path / "out", *PUSH)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "the model is trained, and the hub did not take it" in error
    assert "not today" in error
    before = content(tmp_path / "out")
    hub.refuses = None
    assert main(command) == 0
    assert "done before" in capsys.readouterr().out
    assert content(tmp_path / "out") == before
    assert "model.safetensors" in hub.files["someone/student"]


@pytest.mark.parametrize(
    ("repository", "role", "environment", "named"),
    [
        ("student", "write", {}, "give NAME/MODEL"),
        ("nobody/student", "write", {}, "you are someone there, and not in nobody"),
        ("lab/student", "read", {}, "the token may only read"),
        ("lab/student", "write", {"HF_TOKEN": "hf_other"}, "the hub does not know who you are"),
    ],
)
def test_what_cannot_be_pushed_is_found_before_training(
    repository, role, environment, named, tiny_teacher, pairs, tmp_path, capsys, monkeypatch
):
    for command in (
        train(tiny_teacher, pairs, tmp_path / "out"),
        arguments(tiny_teacher, tmp_path / "run"),
    ):
        with HubServer(role) as server, monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert main([*command, "--push-to-hub", repository]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert f"--push-to-hub {repository}" in error
        # huggingface_hub asks for the second by itself, once in a process.
        assert set(server.asked) <= {"/api/whoami-v2", "/api/agent-harnesses"}
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}


def test_without_a_hub_nothing_is_trained(tiny_teacher, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    assert main(train(tiny_teacher, pairs, tmp_path / "out", *PUSH)) == 2
    assert "hf auth login" in capsys.readouterr().err


def test_adapters_on_a_model_of_this_machine_are_not_pushed(
    hub, tiny_teacher, pairs, tmp_path, capsys
):
    command = train(tiny_teacher, pairs, tmp_path / "out", *PUSH, "--lora-r", "2")
    for others in (arguments(tiny_teacher, tmp_path / "run", *PUSH, "--lora-r", "2"), command):
        assert main(others) == 2
        assert "add --merge" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}
    assert main([*command, "--merge"]) == 0
    assert "model.safetensors" in hub.files["someone/student"]
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert "LoRA adapters of rank 2, alpha 4, on all-linear, merged" in card.text


def test_the_cards_of_a_run_have_its_evaluation(
    hub, finished_run, tiny_teacher, tmp_path, no_plots
):
    """With intervals; one that was edited is kept, and no part of the run. The last student is
    pushed."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    cards = [ModelCard.load(run / name / "README.md") for name in ("sft", "plad")]
    for card in cards:
        assert "## Evaluation" in card.text
        assert " ±0" in card.text
        assert "PLaD student compared with SFT student" in card.text
        assert tiny_teacher.name in card.text
        assert settings_of(card)["loss"] == "plad_ranking"
    assert "| loss | sft |" in cards[0].text
    assert "## Load" not in cards[1].text  # it is a whole model
    edited = cards[1].content.replace("**To be stated", "MIT, stated")
    (run / "plad" / "README.md").write_text(edited)
    command = arguments(tiny_teacher, run)
    assert main(command) == 0
    assert (run / "plad" / "README.md").read_text() == edited
    assert main([*command, "--beta", "3"]) == 2  # would replace the model and the card beside it
    (run / "plad" / "README.md").unlink()
    assert main([*command, "--beta", "3", *PUSH]) == 0
    pushed = hub.files["someone/student"]
    assert pushed["README.md"] == (run / "plad" / "README.md").read_bytes()
    assert pushed["model.safetensors"] == (run / "plad" / "model.safetensors").read_bytes()
    assert settings_of(ModelCard.load(run / "plad" / "README.md"))["beta"] == 3.0
