"""instrument/cache_folder.py: where rewritten images lie.

Invariants: both folders are this user's alone; a key names one file below them, and what is no key names none, wherever it came from.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from concordia.errors import EnvironmentRefused, ImageRefused
from concordia.instrument.cache import image_key, key_halves
from concordia.instrument.cache_folder import CacheFolder, check_key, is_key

KEY = "0123456789abcdef" * 2
WRONG = ("", "0", KEY[1:], KEY + "0", KEY.upper(), KEY[:-1] + "g", KEY[:-1] + "\n", KEY + "\n", "../" + KEY[3:], "\u0660" * 32, KEY[:16] + "/" + KEY[17:])


def test_file_lies_in_a_private_folder_when_its_key_is_one(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "images", "options")
    assert folder.file(KEY) == tmp_path / "images" / "options" / f"{KEY}.image"
    assert [path.stat().st_mode & 0o777 for path in (folder.root, folder.path)] == [0o700, 0o700]
    assert is_key(image_key(b"an image"))


@pytest.mark.parametrize("key", WRONG)
def test_key_is_refused_when_it_is_none(tmp_path: Path, key: str) -> None:
    folder = CacheFolder(tmp_path / "images", "options")
    assert not is_key(key)
    for wanted in (folder.file, check_key, key_halves):
        with pytest.raises(ImageRefused, match="is no key of an image"):
            wanted(key)


def test_refusal_is_short_when_what_is_no_key_is_long() -> None:
    with pytest.raises(ImageRefused) as refused:
        check_key("x" * 1_000_000)
    assert len(str(refused.value)) < 200


def test_folder_is_refused_when_others_may_enter(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(0o755)
    with pytest.raises(EnvironmentRefused, match="set CONCORDIA_CACHE to another"):
        CacheFolder(tmp_path / "images", "options")
