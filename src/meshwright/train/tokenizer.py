"""From text to token ids and back: bytes, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from meshwright.spec.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# What published tokenizers call the token that ends a document, most specific first. An end of turn
# (<|im_end|>, <|eot_id|>) is not one: a chat model would learn to stop at every document.
END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<EOS>",
    "[EOS]",
)


class Tokenizer(Protocol):
    """What training and inference need of a tokenizer.

    `vocab_size` is the largest id plus one, so every id (and `end_of_document`) is below it.
    `fingerprint` differs whenever the same text could become other ids: caches are keyed by it.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One 1-D unsigned integer array of ids per text, with no special token added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens and ids that the vocabulary lacks are left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are the ids 0..255; 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    fingerprint = "bytes-257"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        # A model samples byte by byte and may stop inside a character: show that, do not fail.
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library.

    Raises UserError if the file cannot be read or parsed, or names no end of document.
    """

    def __init__(self, path: Path) -> None:
        content = _read(path)
        self._tokenizer = _parse(content, path)
        # Files saved for an encoder cut or pad every text to its context length; a corpus must not lose its tail.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.name = str(path)
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have holes: the count is not enough
        self.end_of_document = _end_of_document(vocab, path)
        self.fingerprint = f"tokenizer.json-{hashlib.sha256(content).hexdigest()}-{self.end_of_document}"

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(ref: str | None) -> Tokenizer:
    """The tokenizer that `ref` names: None or "bytes", a `tokenizer.json`, or a directory that holds one.

    Raises UserError if there is no such file, it is not a tokenizer, or it has no end-of-document token.
    """
    if ref is None or ref == "bytes":
        return ByteTokenizer()
    path = Path(ref).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"no tokenizer at {ref!r}: give 'bytes', a tokenizer.json, or a directory that holds one")
    return HuggingFaceTokenizer(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from error


def _parse(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        from tokenizers import Tokenizer as Parser
    except ImportError as error:
        raise UserError(f"reading {path} needs the tokenizers library: pip install 'meshwright[run]'") from error
    try:
        return Parser.from_buffer(content)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error


def _end_of_document(vocab: dict[str, int], path: Path) -> int:
    for token in END_OF_DOCUMENT:
        if token in vocab:
            return vocab[token]
    raise UserError(
        f"{path} has no end-of-document token (looked for {' '.join(END_OF_DOCUMENT)}): add one with "
        "tokenizers.Tokenizer.add_special_tokens(['<|endoftext|>']) and save it, or use the tokenizer 'bytes'"
    )
