"""Every input that fuzzing began with or found is still read or refused, with one line, whatever it is read as."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("fuzz")
CORPUS = sorted((FOLDER / "corpus").iterdir())

_spec = importlib.util.spec_from_file_location("readers", FOLDER / "readers.py")
assert _spec is not None
assert _spec.loader is not None
readers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(readers)


def test_there_is_a_corpus() -> None:
    assert len(CORPUS) > 50
    assert sum(file.stat().st_size for file in CORPUS) < 200_000


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_an_input_is_read_or_refused_as_every_kind_of_file(file: Path, tmp_path: Path) -> None:
    refused = readers.read_all(file.read_bytes(), tmp_path)

    assert all(reason and "\n" not in reason.strip() for reason in refused.values())
    assert not list(tmp_path.iterdir())
