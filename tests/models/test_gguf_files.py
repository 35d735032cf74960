"""GGUF files as transformers reads them, and as it should."""

from __future__ import annotations

import sys
import types

import pytest

from plad_fast.models.gguf_files import gguf_read_once
from plad_fast.models.loading import load_model


def test_a_gguf_header_is_read_once(monkeypatch):
    gguf = pytest.importorskip("gguf")
    read = []
    monkeypatch.setattr(gguf, "GGUFReader", read.append)
    reader = gguf.GGUFReader
    with gguf_read_once(), gguf_read_once():
        gguf.GGUFReader("a")
        gguf.GGUFReader("a")
    assert read == ["a"]
    assert gguf.GGUFReader is reader


def test_a_folder_of_the_name_gguf_is_no_library(monkeypatch, tiny_teacher):
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    with gguf_read_once():
        load_model(tiny_teacher)
