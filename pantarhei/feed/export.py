"""Papers as BibTeX and CSV, piece by piece, however many there are.

What is written was taken from strangers: it may not run as LaTeX, break out of its field, or be
taken for a formula by a spreadsheet.
"""

from __future__ import annotations

import csv as _csv
import io
import re
from collections.abc import Iterable, Iterator
from datetime import date
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pantarhei.feed.papers import Paper

COLUMNS = (
    "key", "title", "date", "authors", "authors_count", "arxiv", "doi", "code", "categories",
    "wing", "status", "badge", "claims_held", "claims_measured", "votes", "comments", "summary",
)  # fmt: skip

_LATEX = {
    "\\": r"\textbackslash{}",
    # BibTeX counts braces even where LaTeX would see an escaped one
    "{": r"\textbraceleft{}",
    "}": r"\textbraceright{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_"},
}
_ESCAPE = str.maketrans(_LATEX)
# A formula is kept where every command in it only prints a symbol or an accent.
_SYMBOL = re.compile(
    r"alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|"
    r"nu|xi|pi|rho|sigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|"
    r"Sigma|Upsilon|Phi|Psi|Omega|ell|infty|partial|nabla|times|cdot|cdots|ldots|dots|pm|mp|"
    r"leq|le|geq|ge|neq|ne|ll|gg|sim|simeq|approx|equiv|propto|in|notin|subset|cup|cap|to|"
    r"rightarrow|leftarrow|mapsto|Rightarrow|forall|exists|sum|prod|int|sqrt|frac|log|exp|sin|"
    r"cos|tan|min|max|sup|inf|lim|mathbb|mathcal|mathbf|mathrm|mathit|mathsf|boldsymbol|text|"
    r"hat|bar|tilde|vec|dot|star|ast|circ|prime|dagger|otimes|oplus|perp|langle|rangle|left|"
    r"right|quad"
)
_FORMULA = re.compile(
    r"\$(?! )((?:[\w\s+\-*/=<>()\[\]|.,:;!'^{}]|\\[,;!|]|\\[A-Za-z]++)++)(?<! )\$", re.ASCII
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# Also what a spreadsheet takes for the same character.
_FORMULA_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "＝", "＋", "－", "＠")


def bibtex(papers: Iterable[Paper]) -> Iterator[str]:
    """Yield an entry for each paper, in UTF-8.

    Authors are left out where only their number is known.
    """
    for paper in papers:
        published = date.fromisoformat(paper.date)
        fields = {
            # doubly braced: styles leave its capitals alone
            "title": f"{{{{{latex(paper.title)}}}}}",
            "author": _braced(" and ".join(map(_name, paper.authors))),
            "year": _braced(str(published.year)),
            "month": _MONTHS[published.month - 1],
            "day": _braced(str(published.day)),
            "doi": _braced(latex(paper.doi or "")),
            "code": _braced(latex(paper.code or "")),
        }
        if paper.arxiv:
            fields |= {
                "eprint": _braced(paper.arxiv),
                "archiveprefix": _braced("arXiv"),
                "primaryclass": _braced(latex(paper.categories.partition(" ")[0])),
                "url": _braced(f"https://arxiv.org/abs/{paper.arxiv}"),
            }
        lines = "".join(f"  {name} = {value},\n" for name, value in fields.items() if value)
        key = re.sub(r"[^\w.:/+-]", "-", paper.key, flags=re.ASCII)
        yield f"@misc{{{key},\n{lines}}}\n\n"


def csv(papers: Iterable[Paper]) -> Iterator[str]:
    """Yield a header and a line for each paper (RFC 4180, UTF-8); authors are parted by ``;``.

    A cell that a spreadsheet would take for a formula begins with ``'``.
    """
    yield _line(COLUMNS)
    for paper in papers:
        yield _line(
            (
                *(cell(text or "") for text in (paper.key, paper.title, paper.date)),
                "; ".join(map(cell, paper.authors)),
                paper.authors_count,
                *(cell(t or "") for t in (paper.arxiv, paper.doi, paper.code, paper.categories)),
                *(cell(text or "") for text in (paper.wing, paper.status, paper.badge)),
                *(paper.held, paper.measured, paper.votes, paper.comments),
                cell(paper.summary),
            )
        )


def latex(text: str) -> str:
    r"""Write plain text as LaTeX that prints it and does nothing else; formulas are kept.

    >>> print(latex(r"50% of R&D, $O(n^2)$, $5 \input{x}"))
    50\% of R\&D, $O(n^2)$, \$5 \textbackslash{}input\textbraceleft{}x\textbraceright{}
    """
    parts, end = [], 0
    for found in _FORMULA.finditer(text):
        if _is_harmless(found[1]):
            parts += [_escaped(text[end : found.start()]), found[0]]
            end = found.end()
    return "".join([*parts, _escaped(text[end:])])


def cell(text: str) -> str:
    r"""Return ``text`` on one line, so that no spreadsheet takes it for a formula.

    >>> cell('=HYPERLINK("http://evil.example")'), cell("a - b")
    ('\'=HYPERLINK("http://evil.example")', 'a - b')
    """
    text = " ".join(text.split())
    # Where lists are parted by semicolons, a spreadsheet may begin a cell after one.
    text = re.sub(r"(;[\s\"']*)(?=[=+@＝＋＠-])", r"\1'", text)
    return f"'{text}" if text.startswith(_FORMULA_BEGINNINGS) else text


def _escaped(text: str) -> str:
    # "--" and "``" would print as other characters.
    return re.sub(r"([-`'?!])(?=[-`'])", r"\1{}", text.translate(_ESCAPE))


def _is_harmless(formula: str) -> bool:
    if "^^" in formula:  # TeX reads ^^5c as a backslash
        return False
    depth = 0
    for character in re.sub(r"\\.", "", formula):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0 and all(map(_SYMBOL.fullmatch, re.findall(r"\\([A-Za-z]+)", formula)))


def _name(name: str) -> str:
    """Write an author; a name with a comma, or an "and" in it, is a group's and stays whole."""
    whole = "," in name or {"and", "others"} & set(name.lower().split())
    return f"{{{latex(name)}}}" if whole else latex(name)


def _braced(value: str) -> str:
    return f"{{{value}}}" if value else ""


def _line(values: Iterable[object]) -> str:
    buffer = io.StringIO()
    _csv.writer(buffer).writerow(values)
    return buffer.getvalue()
