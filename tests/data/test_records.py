"""Records tell what is whole, ours and current from what is damaged, foreign or stale."""

from __future__ import annotations

import json

import pytest

from plad_fast.data.records import RecordFormat, changed_settings, digest, recorded_scores
from plad_fast.errors import UsageError

FORMAT = RecordFormat("plad-fast test", 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "record.json"


def test_a_record_comes_back_and_is_of_this_version(path):
    FORMAT.write(path, settings={"a": 1}, version=7)
    assert FORMAT.read(path, settings=dict) == ({**FORMAT.header, "settings": {"a": 1}}, "")
    assert next(iter(json.loads(path.read_text()))) == "format"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "missing"),
        ("", "damaged"),
        ("\0" * 40, "damaged"),
        ("no JSON", "damaged"),
        ("[1]", "damaged"),
        ('{"settings": {}}', "damaged"),
        ('{"format": "another", "version": 2, "settings": {}}', "foreign"),
        ('{"format": "plad-fast test", "version": 2}', "damaged"),
        ('{"format": "plad-fast test", "version": 2, "settings": []}', "damaged"),
        ('{"format": "plad-fast test", "version": 1, "settings": {}}', "version"),
        ('{"format": "plad-fast test", "settings": {}}', "damaged"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_what_is_wrong_with_a_file(path, content, problem):
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    assert FORMAT.read(path, settings=dict).problem == problem


def test_every_part_that_a_power_cut_may_leave_is_known(path):
    FORMAT.write(path, settings={})
    line = json.dumps({**FORMAT.header, "settings": {}}).encode()
    for whole in (path.read_bytes(), line):
        assert all(FORMAT.begins(whole[:size]) for size in range(len(whole) + 1))
        assert FORMAT.begins(whole[:9] + b"\0" * 9)
    for other in (b"{}", b"thesis", b" ", b"\0\1", b'{"format": "plad-fast tests"}'):
        assert not FORMAT.begins(other)


def test_settings_are_compared_by_name_at_any_depth():
    before = {"model": "m", "sampling": {"temperature": 1.0, "seed": 0}, "empty": {}}
    now = {"model": "m", "sampling": {"temperature": 0.5, "seed": 0}, "new": None}
    assert changed_settings(before, now) == [
        "empty was {} and is 'not set'",
        "new was 'not set' and is None",
        "sampling.temperature was 1.0 and is 0.5",
    ]


def test_scores_are_computed_once_and_again_where_they_are_not_what_was_written(path):
    made = []

    def scores(fingerprint, **options):
        found = recorded_scores(
            path, fingerprint, lambda: made.append(1) or {"a": [1.5]}, **options
        )
        assert found == {"a": [1.5]}
        return len(made)

    assert scores({"model": ("m", 1)}) == 1
    assert scores({"model": ["m", 1]}) == 1
    whole = path.read_text()
    path.write_text(whole.replace("1.5", "2.5"))
    assert scores({"model": ["m", 1]}) == 2
    path.write_text(whole[:50])
    assert scores({"model": ["m", 1]}) == 3
    with pytest.raises(UsageError, match=r"model was \['m', 1\] and is 'n'"):
        scores({"model": "n"})
    assert scores({"model": "n"}, replace=True) == 4
    path.write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=r"record\.json does not hold scores"):
        scores({"model": "n"}, replace=True)


def test_a_digest_is_that_of_every_machine():
    assert digest({"b": [1, "ü"], "a": None}) == digest({"a": None, "b": (1, "ü")})
    assert digest("same") == "106c4202d3d02a3f"  # the id of a prompt without one
