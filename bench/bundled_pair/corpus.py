"""The corpus: the Python standard library's own source, split by file, and the byte-level BPE over it.

Knows which files are taken, which are held out, how the tokenizer is trained and how documents
are laid out as token arrays. Knows nothing of models or of training.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
HELD_OUT_PER_MILLE = 40
MIN_CHARS, MAX_CHARS = 200, 400_000

SKIPPED_DIRS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings", "pydoc_data"}
)
SKIPPED_PATHS = re.compile(
    r"(^|/)(config-[^/]*|tests?/data)/|(^|/)_sysconfigdata|(^|/)(bad_?syntax|badsyntax)"
)
TEST_PATHS = re.compile(r"(^|/)(tests?|idle_test)/")
# Newlines and indentation are pieces of their own, so that a prompt may end after either.
PIECES = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|[^\S\n]+"
TOP_LEVEL_START = re.compile(r"^(?:def |class |async def |import |from |@)", re.MULTILINE)


@dataclass(frozen=True)
class SourceFile:
    """One module: its path relative to the library's root, with forward slashes, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class TokenArchive:
    """Documents as one token array: each ends with the end-of-text token.

    `docs` holds each document's first index, with the array's length at its end; `starts` holds
    the indices at which a top-level statement (def, class, import, decorator) begins.
    """

    tokens: npt.NDArray[np.uint16]
    docs: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    n_bytes: int

    def document(self, index: int) -> npt.NDArray[np.uint16]:
        """The tokens of one document, its end-of-text token included."""
        return self.tokens[self.docs[index] : self.docs[index + 1]]


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(path: str) -> bool:
    """Whether the file is held out: decided by a hash of its relative path alone."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def is_test(path: str) -> bool:
    """Whether the file belongs to the library's test modules."""
    return TEST_PATHS.search(path) is not None


def is_table(text: str) -> bool:
    """Whether the text is mostly data: digits, other alphabets, or one long assignment.

    Text that does not parse as Python counts as data too.
    """
    digits = sum(char.isdigit() for char in text)
    if digits > 0.15 * len(text) or len(text.encode()) > 1.05 * len(text):
        return True
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return True
    nodes = (inner for node in body for inner in ast.walk(node) if isinstance(inner, ast.Assign))
    longest = max(((node.end_lineno or 0) - node.lineno for node in nodes), default=0)
    return longest > 0.4 * text.count("\n")


def source_files(
    root: Path, include_tests: bool, wanted: Callable[[str], bool] = bool
) -> Iterator[SourceFile]:
    """The library's modules in sorted order, without tables, generated files and bad syntax.

    Paths that are not `wanted` are not opened.
    """
    for full in sorted(root.rglob("*.py")):
        relative = full.relative_to(root)
        path = relative.as_posix()
        if SKIPPED_DIRS & set(relative.parts) or SKIPPED_PATHS.search(path):
            continue
        if (is_test(path) and not include_tests) or not wanted(path):
            continue
        try:
            text = full.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if MIN_CHARS <= len(text) <= MAX_CHARS and "\r" not in text and not is_table(text):
            yield SourceFile(path, text)


def split(files: Iterable[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """The files to train on and the files held out."""
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    for file in files:
        (held_out if is_held_out(file.path) else train).append(file)
    return train, held_out


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of exactly VOCAB_SIZE entries that adds no token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE or tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise ValueError("the tokenizer did not come out with the expected vocabulary")
    return tokenizer


def archive(tokenizer: Tokenizer, files: Iterable[SourceFile]) -> TokenArchive:
    """The files as token documents, with the places where top-level statements begin."""
    pieces: list[npt.NDArray[np.uint16]] = []
    docs, starts, n_bytes = [0], [], 0
    for file in files:
        encoding = tokenizer.encode(file.text)
        token_at = {begin: index for index, (begin, _) in enumerate(encoding.offsets)}
        first = docs[-1]
        starts += [
            first + token_at[match.start()]
            for match in TOP_LEVEL_START.finditer(file.text)
            if match.start() in token_at
        ]
        pieces.append(np.array([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16))
        docs.append(first + len(encoding.ids) + 1)
        n_bytes += len(file.text.encode())
    return TokenArchive(np.concatenate(pieces), np.array(docs), np.array(starts), n_bytes)


def save_archive(folder: Path, name: str, data: TokenArchive) -> None:
    """Writes one archive as plain .npy files and a small .json."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.tokens.npy", data.tokens)
    np.save(folder / f"{name}.docs.npy", data.docs)
    np.save(folder / f"{name}.starts.npy", data.starts)
    (folder / f"{name}.json").write_text(json.dumps({"bytes": data.n_bytes}) + "\n")


def load_archive(folder: Path, name: str) -> TokenArchive:
    """Reads what `save_archive` wrote."""
    tokens, docs, starts = (np.load(folder / f"{name}.{part}.npy") for part in ("tokens", "docs", "starts"))
    return TokenArchive(tokens, docs, starts, json.loads((folder / f"{name}.json").read_text())["bytes"])


def build(folder: Path, include_tests: bool = True) -> None:
    """Writes the tokenizer, the split's lists and the archives `train` and `heldout`.

    Modules of the library proper and test modules are held out alike; `heldout` holds the
    former and `heldout_tests` the latter, so that both choices of corpus compare on one text.
    """
    train, held = split(source_files(standard_library(), include_tests))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(file.text for file in train)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, part in (("train", train), ("heldout", held)):
        (folder / f"{name}.txt").write_text("".join(f"{file.path}\n" for file in part))
    save_archive(folder, "train", archive(tokenizer, train))
    save_archive(folder, "heldout", archive(tokenizer, [file for file in held if not is_test(file.path)]))
    if include_tests:
        tests = [file for file in held if is_test(file.path)]
        save_archive(folder, "heldout_tests", archive(tokenizer, tests))
