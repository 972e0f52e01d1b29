"""Papers as BibTeX, its LaTeX decoded.

A paper needs a title, authors (or editors) and a year. An arXiv identifier is found in ``eprint``,
or where Google Scholar and DBLP put it: in ``journal``, ``volume`` or ``url``.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping

import bibtexparser
from bibtexparser.library import Library
from bibtexparser.middlewares.names import (
    InvalidNameError,
    parse_single_name_into_parts,
    split_multiple_persons_names,
)
from bibtexparser.model import DuplicateBlockKeyBlock, DuplicateFieldKeyBlock
from bibtexparser.model import Entry as Block
from pylatexenc.latex2text import (
    LatexNodes2Text,
    MacroTextSpec,
    get_default_latex_context_db,
)

from pantarhei.errors import RequestError
from pantarhei.feed.sources.entry import Entry, arxiv_identifier, line, withdrawn

# Both say what they find amiss through logging, which would reach the user's screen.
for _name in ("bibtexparser", "pylatexenc"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

_MAX_FIELD = 60_000  # characters of LaTeX: decoding takes a second at most
_TITLE, _YEAR, _AUTHORS = ("title",), ("date", "year"), ("author", "editor")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_LATEX = re.compile(r"[\\{}$~]|--|``|''|[?!]`")
_ELSEWHERE = re.compile(r"(?:arxiv:\s*|arxiv\.org/(?:abs|pdf)/|^abs/)([\w./-]+)", re.IGNORECASE)


def read(text: str, name: str) -> list[Entry]:
    """Read every entry of the file ``name``.

    Raises :class:`RequestError`, naming the entry, where one is not as it should be.
    """
    try:
        library = bibtexparser.parse_string(text.replace("\r\n", "\n"))
    except (RecursionError, ValueError, IndexError, KeyError) as error:
        raise RequestError(f"'{name}' is not readable as BibTeX.") from error
    _check(library, name)
    if not library.entries:
        raise RequestError(f"'{name}' holds no BibTeX entries.")
    return [_entry(block, name) for block in library.entries]


def _check(library: Library, name: str) -> None:
    """Refuse what the parser could not read; the same entry twice is only one."""
    for block in library.failed_blocks:
        at = (block.start_line or 0) + 1
        if isinstance(block, DuplicateBlockKeyBlock):
            if _bare(block.ignore_error_block) == _bare(block.previous_block):
                continue
            key = line(str(block.key))[:60]
            raise RequestError(f"'{name}' has two different entries '{key}': rename one.")
        if isinstance(block, DuplicateFieldKeyBlock):
            entry = block.ignore_error_block
            key = line(entry.key)[:60] if isinstance(entry, Block) else "?"
            fields = ", ".join(sorted(block.duplicate_keys))[:60]
            raise RequestError(f"Entry '{key}' in '{name}' has the field {fields} twice.")
        raise RequestError(f"'{name}' is not readable as BibTeX from line {at} on: see its braces.")


def _fields(block: object) -> dict[str, str]:
    fields = block.fields if isinstance(block, Block) else []
    return {field.key.lower(): str(field.value) for field in fields}


def _bare(block: object) -> dict[str, str]:
    """Return the fields without their outermost quotes or braces, which the parser may leave."""
    return {key: value.strip('{}"') for key, value in _fields(block).items()}


def _entry(block: Block, name: str) -> Entry:
    which = f"Entry '{line(block.key)[:60]}' in '{name}'"
    fields = {key: value for key, value in _fields(block).items() if value.strip()}
    needed = {"title": _TITLE, "author": _AUTHORS, "year": _YEAR}
    missing = [word for word, keys in needed.items() if not any(k in fields for k in keys)]
    if missing:
        raise RequestError(f"{which} has no {' and no '.join(missing)}.")
    for field in block.fields:
        if field.enclosing == "no-enclosing" and "#" in str(field.value) and field.key != "month":
            raise RequestError(f"{which} puts its {field.key} together with '#': write it out.")
    try:
        return Entry.of(
            "bibtex",
            key=block.key,
            title=_decoded(fields, "title"),
            date=_date(fields),
            authors=_authors(fields),
            summary=withdrawn(_decoded(fields, "abstract"), _decoded(fields, "note")),
            arxiv=_arxiv(fields),
            doi=_decoded(fields, "doi"),
            code=_decoded(fields, "code"),
            categories=fields.get("primaryclass", "").split(),
        )
    except ValueError as error:
        raise RequestError(f"{which} {error}.") from error


def _decoded(fields: Mapping[str, str], key: str) -> str:
    return decode(fields.get(key, ""), key)


def decode(latex: str, what: str = "text") -> str:
    r"""Return LaTeX as plain text; formulas stay as they are.

    >>> decode(r"{\'E}tude of {G\"odel}'s $\alpha$ -- 50\% done")
    "Étude of Gödel's $\\alpha$ – 50% done"

    Raises ``ValueError`` for what cannot be read.
    """
    if len(latex) > _MAX_FIELD:
        raise ValueError(f"has a field {what} of over {_MAX_FIELD} characters")
    if not _LATEX.search(latex):  # most abstracts: decoding is slow
        return latex.replace("\xa0", " ")
    # BibTeX knows no comments, and abstracts say "50% of" and "R&D" as any text does.
    literal = re.sub(r"(?<!\\)([%&])", r"\\\1", latex)
    literal = re.sub(r"\\href\s*\{[^{}]*\}", "", literal)  # what it links to is not its text
    try:
        return str(_decoder().latex_to_text(literal)).replace("\xa0", " ")
    except Exception as error:  # the decoder's own: IndexError, KeyError, RecursionError, ...
        raise ValueError(f"has a field {what} whose LaTeX cannot be read") from error


@functools.cache
def _decoder() -> LatexNodes2Text:
    context = get_default_latex_context_db()
    macros = [
        MacroTextSpec("url", simplify_repl="%s"),
        MacroTextSpec("footnote", discard=True),
        MacroTextSpec("textbraceleft", simplify_repl="{"),
        MacroTextSpec("textbraceright", simplify_repl="}"),
        MacroTextSpec("textasciicircum", simplify_repl="^"),
    ]
    context.add_context_category("pantarhei", macros=macros, prepend=True)
    return LatexNodes2Text(latex_context=context, math_mode="verbatim")


def _authors(fields: Mapping[str, str]) -> list[str]:
    """Return the names, first name first; "and others" is nobody."""
    key = "author" if "author" in fields else "editor"
    if len(fields[key]) > 10 * _MAX_FIELD:
        raise ValueError(f"has a field {key} that is too long")
    names = []
    for name in split_multiple_persons_names(" ".join(fields[key].split())):
        if name.strip().lower() == "others":
            continue
        try:
            parts = parse_single_name_into_parts(name, strict=False)
        except (InvalidNameError, ValueError, IndexError) as error:
            raise ValueError(f"has the author '{line(name)[:60]}', which is no name") from error
        whole = " ".join((*parts.first, *parts.von, *parts.last, *parts.jr))
        names.append(decode(whole, key))
    return names


def _date(fields: Mapping[str, str]) -> str:
    """Return the date as ISO 8601, as far as it is known."""
    if "date" in fields:  # biblatex; of a period, its beginning
        return fields["date"].partition("/")[0]
    year = decode(fields["year"], "year").strip()
    if not re.fullmatch(r"\d{4}", year, re.ASCII):
        raise ValueError(f"has the year '{line(year)[:40]}', which is not like 2026")
    said = re.sub(r"[^a-z0-9]", " ", fields.get("month", "").lower()).split()
    word = said[0] if said else ""
    if word.isdecimal() and 1 <= int(word[:4]) <= 12:
        month = int(word)
    elif word[:3] in _MONTHS:
        month = _MONTHS.index(word[:3]) + 1
    else:
        return year
    day = fields.get("day", "").strip()
    return (
        f"{year}-{month:02}-{int(day):02}" if re.fullmatch(r"\d\d?", day) else f"{year}-{month:02}"
    )


def _arxiv(fields: Mapping[str, str]) -> str | None:
    kind = (fields.get("archiveprefix") or fields.get("eprinttype") or "arxiv").strip().lower()
    if kind == "arxiv" and "eprint" in fields:
        return fields["eprint"]
    for key in ("journal", "volume", "howpublished", "url"):
        if found := _ELSEWHERE.search(fields.get(key, "").strip()):
            try:
                return arxiv_identifier(found[1].rstrip("."))[0]
            except ValueError:
                continue
    return None
