"""The text of the embedded model: what Python says about itself, in a fixed order.

    pydoc_data.topics     the language reference by topic: one Document a topic, and one a headed section
    standard library      docstrings, read with `ast` (nothing is imported or run)
    C modules             docstrings of the names in COMPILED, read from the interpreter
      → documents()       each text once, sorted by name
      → split()           training and held-out documents, by a hash of the name

All of it is under the PSF licence: a source file that states a copyright or a licence of its own is left out whole.
"""

import ast
import hashlib
import importlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from pydoc_data.topics import topics

LEFT_OUT = frozenset({"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"})
COMPILED = (
    "_bisect", "_collections", "_csv", "_datetime", "_functools", "_heapq", "_io", "_operator", "_random", "_struct", "_thread", "_weakref",
    "array", "builtins", "gc", "itertools", "math", "select", "sys", "time", "zlib",
)  # fmt: skip
OWN_TERMS = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
HEADING = re.compile(r"^(?P<title>\S.{2,70})\n(?P<rule>[*=\-]{4,})$", re.MULTILINE)
MIN_CHARS = 40
HELD_OUT_ONE_IN = 20


class Kind(Enum):
    TOPIC = "topic"
    SECTION = "section"
    DOCSTRING = "docstring"


@dataclass(frozen=True, slots=True)
class Document:
    name: str  # unique, e.g. "section/for/The "for" statement" or "docstring/heapq.merge": decides order and split
    kind: Kind
    subject: str  # what a reader would ask about: 'The "for" statement', "heapq.merge"
    text: str


def documents() -> list[Document]:
    """Every document of this Python, each text once, sorted by name."""
    found = sorted([*_topics(), *_docstrings(), *_compiled_docstrings()], key=lambda document: document.name)
    first_with_text = {document.text: document for document in reversed(found) if len(document.text) >= MIN_CHARS}
    return sorted(first_with_text.values(), key=lambda document: document.name)


def split(found: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held out). A held-out document keeps only paragraphs that no training document has: topics quote one another."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in found:
        (held_out if _is_held_out(document.name) else training).append(document)
    known = {key for document in training for key in map(_paragraph_key, _paragraphs(document.text))}
    unseen = [_without(document, known) for document in held_out if document.kind is not Kind.SECTION]
    return training, [document for document in unseen if len(document.text) >= MIN_CHARS]


def fingerprint(found: Iterable[Document]) -> str:
    """sha256 over names and texts: says whether another Python has the same corpus."""
    digest = hashlib.sha256()
    for document in found:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def _topics() -> Iterator[Document]:
    for topic, text in topics.items():
        yield Document(f"topic/{topic}", Kind.TOPIC, topic, text.strip())
        for title, body in _sections(text):
            yield Document(f"section/{topic}/{title}", Kind.SECTION, title, body)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    headings = list(HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=True):
        yield heading["title"], text[heading.end() : end].strip()


def _docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        source = "" if LEFT_OUT & set(inside.parts) else path.read_text(encoding="utf-8", errors="replace")
        if source and not OWN_TERMS.search(source):
            module = ".".join(part for part in inside.with_suffix("").parts if part != "__init__").lstrip("_")
            yield from _owners(ast.parse(source), module)


def _owners(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Document]:
    if text := ast.get_docstring(node):
        yield Document(f"docstring/{name}", Kind.DOCSTRING, name, text.strip())
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _owners(child, f"{name}.{child.name}")


def _compiled_docstrings() -> Iterator[Document]:
    for module_name in COMPILED:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else module_name.lstrip("_") + "."
        for name, member in sorted(vars(module).items()):
            yield from _compiled_docstring(prefix + name, member)
            if isinstance(member, type):
                for attribute, inner in sorted(vars(member).items()):
                    yield from _compiled_docstring(f"{prefix}{name}.{attribute}", inner)


def _compiled_docstring(name: str, member: object) -> Iterator[Document]:
    text = member.__doc__ if callable(member) else None
    if isinstance(text, str) and not name.rpartition(".")[2].startswith("_"):
        yield Document(f"docstring/{name}", Kind.DOCSTRING, name, text.strip())


def _is_held_out(name: str) -> bool:
    topic = "/".join(name.split("/")[:2])  # a section goes where its topic goes
    return int.from_bytes(hashlib.sha256(topic.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _paragraph_key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _without(document: Document, known: set[str]) -> Document:
    kept = [paragraph for paragraph in _paragraphs(document.text) if _paragraph_key(paragraph) not in known]
    return replace(document, text="\n\n".join(kept))
