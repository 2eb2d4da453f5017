"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from meshwright.spec.errors import UserError


def write_text_atomically(path: str | Path, text: str) -> None:
    """Replace the file at `path` in one step: after a crash it holds the old text or the new, never a part."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it did
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(target.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def fsync(path: Path) -> None:
    """Bring a file, or the names in a directory (where a rename lives), to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
