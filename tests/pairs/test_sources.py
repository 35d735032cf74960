"""Teachers by their specification."""

from __future__ import annotations

import json

import pytest

from plad_fast.data.prompts import Prompt
from plad_fast.data.store import RowStore
from plad_fast.errors import UsageError
from plad_fast.models.devices import best_device
from plad_fast.pairs.generation.given import ColumnModel
from plad_fast.pairs.generation.sampling import Sampling
from plad_fast.pairs.generation.sources import (
    OFFLINE,
    open_teacher,
    split_spec,
    teacher_fingerprint,
)
from plad_fast.pairs.generation.vllm_model import VllmModel
from plad_fast.recipe import sources
from plad_fast.recipe.settings import DistillConfig

SECRET = "sk-planted-0123456789"
PROMPTS = [Prompt("a", "A"), Prompt("b", "B"), Prompt("c", "C")]


def items(model, prompts=PROMPTS, **sampling):
    found = [item for batch in model.generate(prompts, Sampling(**sampling)) for item in batch]
    return {(item.prompt_id, item.sample): item for item in found}


def test_a_function_that_was_edited_is_another_teacher(tmp_path, monkeypatch):
    """Its old answers are refused, whatever it is wrapped in."""
    module = tmp_path / "my_edited_module.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    wrapped = (
        "import functools\n\n\n@functools.lru_cache\ndef cached(prompt):\n    return prompt\n"
        "class Teacher:\n    def __call__(self, prompt):\n        return prompt\n\n\n"
        "called = Teacher()\n"
    )
    module.write_text(wrapped)
    names = ("cached", "called")
    before = [teacher_fingerprint(f"python:my_edited_module.{name}") for name in names]
    assert [len(settings["source"]) for settings in before] == [16, 16]
    module.write_text(wrapped + "# edited\n")
    for name, settings in zip(names, before, strict=True):
        now = teacher_fingerprint(f"python:my_edited_module.{name}")
        with RowStore.open(tmp_path / f"{name}.jsonl", settings) as store:
            store.append([{"id": "a"}])
        with pytest.raises(UsageError, match="source was"):
            RowStore.open(tmp_path / f"{name}.jsonl", now)


def test_a_local_teacher_is_loaded_when_it_is_asked(tiny_teacher, monkeypatch):
    from plad_fast.models import loading as students

    loaded = []
    monkeypatch.setattr(
        students,
        "load_model",
        lambda *a, real=students.load_model, **k: loaded.append(a) or real(*a, **k),
    )
    teacher = open_teacher(str(tiny_teacher), name="teacher", precision="float32")
    assert teacher.name == "teacher"
    assert teacher.sharded  # as the model behind it
    assert not loaded
    first = items(teacher, max_new_tokens=8, temperature=0)
    assert len(first) == 3
    assert items(teacher, max_new_tokens=8, temperature=0) == first
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("anthropic:claude", {}, "unknown kind.*openai:"),
        ("openai:", {}, "ends with its colon"),
        ("", {}, "no teacher"),
        ("org/model", {"base_url": "http://h/v1"}, "is no endpoint"),
        ("column:x", {}, "needs data"),
    ],
)
def test_specifications_that_mean_nothing(spec, options, says):
    with pytest.raises(UsageError, match=says):
        open_teacher(spec, **options)


@pytest.mark.parametrize("url", ["http://me:planted-word@host/v1", "http://host?key=planted-word"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_password_in_an_address_gets_into_no_message(url, times):
    """Nor into a record: it is refused before anything else is."""
    with pytest.raises(UsageError, match="base URL holds a user or parameters") as refusal:
        DistillConfig(teacher=(f"openai:m@{url}",) * times)
    assert "planted-word" not in str(refusal.value)


def test_the_endpoint_of_the_settings_may_be_the_judges_alone(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)

    def teacher(**settings):
        config = DistillConfig(teacher="column:x", base_url="http://127.0.0.1:1/v1", **settings)
        return sources.open_teacher(config, lambda name: {"a": "A"}, "column:x", "teacher")

    for name in ("scorer", "eval_scorer"):
        assert items(teacher(**{name: "judge:openai:m"}))["a", 0].text == "A"
    with pytest.raises(UsageError, match="is no endpoint"):
        teacher()


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert best_device() == "cuda"
    for rank, device in [("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0"), ("-1", "cuda")]:
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert best_device() == device


def test_what_specifications_mean(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert split_spec("org/model") == ("local", "org/model")
    assert split_spec("openai:org/model:free") == ("openai", "org/model:free")
    assert split_spec("C:\\models\\m") == ("local", "C:\\models\\m")
    (tmp_path / "odd:name").mkdir()
    assert split_spec(str(tmp_path / "odd:name"))[0] == "local"
    assert isinstance(open_teacher("vllm:org/model"), VllmModel)
    assert isinstance(open_teacher("column:x", columns=lambda name: {}), ColumnModel)


def test_fingerprints_tell_what_answers_depend_on(tiny_teacher, tmp_path, monkeypatch):
    """Without a key, for nothing is asked; and never with one."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("plad_fast.models.loading.offline_teacher_path", lambda: tiny_teacher)
    here = {"base_url": "http://127.0.0.1:1/v1/"}
    prints = [
        teacher_fingerprint("openai:m"),
        teacher_fingerprint("openai:m", **here),
        teacher_fingerprint("vllm:org/m"),
        teacher_fingerprint("org/m"),
        teacher_fingerprint("column:x", columns=lambda name: {"a": "1"}),
        teacher_fingerprint("column:x", columns=lambda name: {"a": "2"}),
        teacher_fingerprint("python:math.sqrt"),
        teacher_fingerprint(str(tiny_teacher)),
        teacher_fingerprint(OFFLINE),
    ]
    assert len({json.dumps(p) for p in prints}) == len(prints)
    assert prints[1] == {"teacher": "openai:m", "base_url": "http://127.0.0.1:1/v1"}
    assert prints[-1]["weights"] == prints[-2]["weights"]  # of the same files
