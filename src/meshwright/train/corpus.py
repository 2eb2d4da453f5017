"""From files of text to one flat array of tokens on disk."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from meshwright.spec.errors import UserError
from meshwright.train.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")  # what a directory is searched for
COLUMN = "text"  # the key of a .jsonl record and the column of a .parquet file
# Not sources to learn from: other people's packages, and tests, some of which are broken on purpose.
STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

PIECE_BYTES = 1 << 20  # a longer text file is read and tokenised in pieces
GROUP_CHARS = 4 << 20  # characters handed to the tokenizer at once, so that its threads have work
GROUP_PIECES = 4096


class Piece(NamedTuple):
    """Some text of one document, never empty."""

    text: str
    last: bool  # the document ends here
    read: int  # bytes of the file behind us


def find_files(ref: str | None) -> list[Path]:
    """The files of a corpus, sorted.

    `ref` is None or "stdlib" (the sources of Python's own standard library), a file, a directory (searched for
    .txt .md .py .jsonl .parquet at any depth, without hidden files) or a glob pattern.
    Raises UserError if that names no file.
    """
    if ref is None or ref == "stdlib":
        files, what = _stdlib(), "Python's standard library has no sources here"
    else:
        path = Path(ref).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            files, what = _directory(path), f"no {' '.join(SUFFIXES)} file under {ref!r}"
        elif glob.has_magic(ref):
            files = [found for name in glob.glob(str(path), recursive=True) if (found := Path(name)).is_file()]
            what = f"no file matches {ref!r}"
        else:
            files, what = [], f"no file or directory at {ref!r}"
    if not files:
        raise UserError(f"{what}: give a file, a directory, a glob pattern, or 'stdlib'")
    return sorted(files)


def documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document that has text: a whole text file, a line of .jsonl (key "text") or a row of .parquet (column "text").

    Raises UserError, with the file and line, at what cannot be read.
    """
    parts: list[str] = []
    for path in files:
        for piece in _pieces(path):
            parts.append(piece.text)
            if piece.last:
                yield "".join(parts)
                parts = []


def pack(
    ref: str | None, tokenizer: Tokenizer, cache_dir: Path, *, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Tokenise the corpus `ref` into a file in `cache_dir`, or find it there; for one process to call.

    The file is a 1-D .npy array [tokens] for `np.load(mmap_mode="r")`, uint16 if the vocabulary fits, else uint32: all
    documents in order, each followed by the end-of-document id. Its name depends on the tokenizer and on each file's
    path, size and time of change. Memory stays bounded whatever the corpus: a text file longer than 1 MiB is
    tokenised in pieces, cut after a newline. `progress` is called with (bytes done, bytes in all).
    Raises UserError if the corpus has no files, no text, or something that cannot be read.
    """
    files = find_files(ref)
    stats = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    key = hashlib.sha256(repr((tokenizer.fingerprint, stats)).encode()).hexdigest()
    target = Path(cache_dir) / f"tokens-{key[:20]}.npy"
    if target.exists():
        return target

    total = sum(size for _, size, _ in stats)
    report = progress or (lambda done, total: None)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, because a rename is atomic only within one file system.
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("wb") as file:
            tokens = _write_tokens(file, files, tokenizer, lambda done: report(min(done, total), total))
            file.flush()
            os.fsync(file.fileno())
        if not tokens:
            raise UserError(f"the corpus {ref or 'stdlib'!r} has no text: files {len(files)}, bytes {total}, documents 0")
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    report(total, total)
    return target


def _stdlib() -> list[Path]:
    found = _walk(Path(sysconfig.get_path("stdlib")), lambda name: name in STDLIB_SKIPS)
    return [path for path in found if path.suffix == ".py" and _decodable(path)]


def _decodable(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _directory(root: Path) -> list[Path]:
    found = _walk(root, lambda name: name.startswith("."))
    return [path for path in found if path.suffix in SUFFIXES and path.is_file()]


def _walk(root: Path, skipped: Callable[[str], bool]) -> Iterator[Path]:
    """Files below `root`, in any order, without the files and whole directories whose name is `skipped`."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not skipped(name)]  # where os.walk will not go
        yield from (Path(folder, name) for name in names if not skipped(name))


def _pieces(path: Path) -> Iterator[Piece]:
    read = {".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix, _text)
    try:
        yield from read(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _text(path: Path) -> Iterator[Piece]:
    with path.open("rb") as file:
        lines = file.readlines(PIECE_BYTES)
        while lines:
            read, following = file.tell(), file.readlines(PIECE_BYTES)
            try:
                text = b"".join(lines).decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: convert it, or leave it out of the corpus") from error
            yield Piece(text, not following, read)
            lines = following


def _jsonl(path: Path) -> Iterator[Piece]:
    read = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            read += len(line)
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # broken JSON, or bytes that are not UTF-8
                raise UserError(f"{where}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object with the key {COLUMN!r}, found {type(record).__name__}")
            if COLUMN not in record:
                raise UserError(f"{where}: no key {COLUMN!r}; keys found: {', '.join(record) or 'none'}")
            if text := _checked(record[COLUMN], where):
                yield Piece(text, True, read)


def _parquet(path: Path) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'meshwright[run]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    with file:
        columns = file.schema_arrow.names
        if COLUMN not in columns:
            raise UserError(f"{path}: no column {COLUMN!r}; columns found: {', '.join(columns) or 'none'}")
        size, rows, row = path.stat().st_size, file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=1024, columns=[COLUMN]):
            for value in batch.column(COLUMN).to_pylist():
                row += 1
                if text := _checked(value, f"{path}, row {row}"):
                    yield Piece(text, True, size * row // rows)


def _checked(value: object, where: str) -> str:
    """The text of a record; a null is an empty document, which `_pieces` leaves out."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {COLUMN!r} must be a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise UserError(f"{where}: {COLUMN!r} is not valid Unicode: {error.reason}") from error
    return value


def _groups(files: list[Path]) -> Iterator[tuple[list[Piece], int]]:
    """Pieces, enough to keep a tokenizer busy and few enough for memory, and the bytes behind us after them."""
    group: list[Piece] = []
    chars = before = 0
    for path in files:
        for piece in _pieces(path):
            group.append(piece)
            chars += len(piece.text)
            if chars >= GROUP_CHARS or len(group) >= GROUP_PIECES:
                yield group, before + piece.read
                group, chars = [], 0
        before += path.stat().st_size
    if group:
        yield group, before


def _write_tokens(file: BinaryIO, files: list[Path], tokenizer: Tokenizer, report: Callable[[int], None]) -> int:
    """Write the .npy array; the number of tokens in it."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    end = np.array([tokenizer.end_of_document], dtype)
    tokens = 0
    header_bytes = _write_header(file, dtype, tokens)
    for group, done in _groups(files):
        encoded = tokenizer.encode_batch([piece.text for piece in group])
        parts: list[np.ndarray] = []
        for ids, piece in zip(encoded, group, strict=True):
            parts += [ids.astype(dtype), end] if piece.last else [ids.astype(dtype)]
        flat = np.concatenate(parts)
        file.write(flat.data)
        tokens += len(flat)
        report(done)
    file.seek(0)
    assert _write_header(file, dtype, tokens) == header_bytes
    return tokens


def _write_header(file: BinaryIO, dtype: np.dtype, tokens: int) -> int:
    """Write the header of a 1-D array; NumPy pads it so that its length (returned, bytes) is the same for any `tokens`."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()
