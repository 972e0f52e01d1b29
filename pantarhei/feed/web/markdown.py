"""Comments: Markdown as people write it, HTML that is safe to show.

Two libraries, each enough by itself: markdown-it-py writes the HTML and takes none (what looks
like a tag is text), and nh3 (ammonia) lets nothing through but the elements below. Images are not
shown (a picture from elsewhere tells its owner who reads the page), headings are left as text (the
page has an outline of its own).
"""

from __future__ import annotations

import functools

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup

_ELEMENTS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "a"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable(["image", "heading", "lheading", "html_block", "html_inline"])
)


@functools.lru_cache(maxsize=2048)
def render(text: str) -> Markup:
    """Return ``text``, Markdown, as HTML that holds no script, style, picture, name or handler.

    Links lead to http, https and mailto addresses or to this page, and carry ``rel="nofollow"``.

    >>> render("*fast* [code](https://example.org) <b>")
    Markup('<p><em>fast</em> <a href="https://example.org" \
rel="nofollow ugc noopener noreferrer">code</a> &lt;b&gt;</p>\\n')
    >>> "<script" in render("<script>alert(1)</script>")
    False
    """
    html = nh3.clean(
        _MARKDOWN.render(text),
        tags=_ELEMENTS,
        attributes={"*": set(), "a": {"href"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="nofollow ugc noopener noreferrer",
        generic_attribute_prefixes=set(),
    )
    return Markup(html)
