"""A folder's list of files tells it whole from damaged."""

from __future__ import annotations

import json

from plad_fast.data.file_states import damage, write_manifest


def test_a_list_is_of_all_files_at_any_depth(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("x")
    write_manifest(tmp_path, step=3)
    assert damage(tmp_path, step=3) is None
    assert damage(tmp_path, step=4) == "files.json is of another folder"
    (tmp_path / "more").write_text("a file of somebody")
    assert damage(tmp_path, step=3) is None
    (tmp_path / "deep" / "file").write_text("y")
    assert damage(tmp_path, step=3) == "deep/file is not as it was written"
    states = [3, None, [1], "x", {}, {"bytes": 1}, {"rows": 1}, {"rows": 1, "digests": 1}]
    for state in states:
        record = json.loads((tmp_path / "files.json").read_text())
        record["files"] = {"deep/file": state}
        (tmp_path / "files.json").write_text(json.dumps(record))
        assert damage(tmp_path, step=3) == "files.json is damaged", state
    for content in ("[]", '{"files": []}', "nothing", ""):
        (tmp_path / "files.json").write_text(content)
        assert damage(tmp_path, step=3) == "files.json is damaged"
