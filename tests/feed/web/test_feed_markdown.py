"""Comments are shown safely: a corpus of attacks, read from the HTML by a parser of its own."""

from __future__ import annotations

import string
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pantarhei.feed.web import markdown
from pantarhei.feed.web.markdown import render

ATTACKS = [
    # elements and handlers
    "<script>alert(1)</script>",
    "<ScRiPt src=//evil.example/x.js></sCrIpT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<script\x0c>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img/src=`x`onerror=alert(1)>",
    "<body onload=alert(1)>",
    "<a href=# onclick=alert(1)>x</a>",
    "<details open ontoggle=alert(1)>x</details>",
    "<input autofocus onfocus=alert(1)>",
    "<video><source onerror=alert(1)></video>",
    "<marquee onstart=alert(1)>x</marquee>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<object data=javascript:alert(1)></object>",
    "<embed src=javascript:alert(1)>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<style>@import 'javascript:alert(1)';</style>",
    "<div style='background:url(javascript:alert(1))'>x</div>",
    "<form action=javascript:alert(1)><button>x</button></form>",
    "<form id=x></form><button form=x formaction=javascript:alert(1)>x</button>",
    "<isindex action=javascript:alert(1)>",
    "<template><script>alert(1)</script></template>",
    "<dialog open onclose=alert(1)></dialog>",
    "<x hx-get=/logout hx-trigger=load>x</x>",
    "<div data-hx-post='/paper/rbqe/vote' hx-on:click=alert(1)>x</div>",
    # addresses
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](java&#10;script:alert(1))",
    "[x](java&Tab;script:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](&#x6A;avascript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](javascript&#58;alert(1))",
    "[x](javascript%3Aalert(1))",
    "[x](\x01javascript:alert(1))",
    "[x]( javascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](<java\nscript:alert(1)>)",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](data:image/svg+xml,<svg onload=alert(1)>)",
    "[x](blob:https://x/1)",
    "[x](file:///etc/passwd)",
    "[x](feed:javascript:alert(1))",
    "[x](view-source:javascript:alert(1))",
    "<javascript:alert(1)>",
    "<data:text/html,x>",
    "[x][r]\n\n[r]: javascript:alert(1)",
    "[r]\n\n[r]: <javascript:alert(1)> 'title'",
    "![x](javascript:alert(1))",
    "![x](https://evil.example/pixel.gif)",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMSk+)",
    "[![x](javascript:alert(1))](javascript:alert(2))",
    # out of the attribute, out of the code
    "[x](https://e.org/\"onmouseover=alert(1)//)",
    "[x](https://e.org/ '\"onmouseover=alert(1) x=\"')",
    "[x](https://e.org \"a\" onmouseover=alert(1))",
    "<https://e.org/\"onmouseover=\"alert(1)>",
    "```\"><script>alert(1)</script>\nx\n```",
    "```js onload=alert(1)\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    "    </pre><script>alert(1)</script>",
    "| a |\n|:-:|\n| <script>alert(1)</script> |",
    # nested Markdown
    "> - > <img src=x onerror=alert(1)>\n>   1. [x](javascript:alert(1))",
    "**[*`x`*](javascript:alert(1))**",
    "[a](x[b](javascript:alert(1)))",
    "<a href=\"[x](javascript:alert(1))\">",
    "[<img src=x onerror=alert(1)>](https://e.org)",
    "*<b onclick=alert(1)>*x*</b>*",
    # comments, declarations
    "<!--><script>alert(1)</script>-->",
    "<!-- --!><img src=x onerror=alert(1)>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml-stylesheet href='javascript:alert(1)'?>",
    "<!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]>&y;",
    # SVG and MathML
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><a xlink:href=javascript:alert(1)><text y=9>x</text></a></svg>",
    "<svg><animate attributeName=href values=javascript:alert(1) /></svg>",
    "<svg><use href='data:image/svg+xml,<svg id=x onload=alert(1)>#x'/></svg>",
    "<svg><foreignObject><iframe onload=alert(1)></foreignObject></svg>",
    "<math href=javascript:alert(1)>x</math>",
    "<math><maction actiontype=statusline xlink:href=javascript:alert(1)>x</maction></math>",
    # mutation: what a parser that reads the HTML again makes of it
    "<noscript><p title=\"</noscript><img src=x onerror=alert(1)>\">",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=x "
    "onerror=alert(1)&gt;\">",
    "<svg></p><style><a id=\"</style><img src=x onerror=alert(1)>\">",
    "<form><math><mtext></form><form><mglyph><style></math><img src=x onerror=alert(1)>",
    "<listing>&lt;img src=x onerror=alert(1)&gt;</listing>",
    "<xmp><p title=\"</xmp><img src=x onerror=alert(1)>\">",
    "<textarea><p title=\"</textarea><img src=x onerror=alert(1)>\">",
    "<title><a title=\"</title><img src=x onerror=alert(1)>\">",
    "<select><style></select><img src=x onerror=alert(1)></style>",
    "&lt;img src=x onerror=alert(1)&gt;",
    "&amp;lt;script&amp;gt;alert(1)&amp;lt;/script&amp;gt;",
    "\\<script>alert(1)\\</script>",
    # clobbering, disguise, templates
    "<form name=body><input name=firstChild></form>",
    "<a id=htmx name=cookie>x</a>",
    "{{7*7}} {% import os %} ${alert(1)} #{1}",
    "\u202ealert\u202c \u2028<script\u2029>alert(1)</script>",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "\ufeff<script>alert(1)</script>",
    "<\u017fcript>alert(1)</\u017fcript>",
    "＜script＞alert(1)＜/script＞",
]  # fmt: skip

ELEMENTS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "a"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}


class Reader(HTMLParser):
    """What a page holds, as Python's own parser reads it: neither of the two that wrote it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.other: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.other.append(data)

    def handle_decl(self, decl: str) -> None:
        self.other.append(decl)

    def handle_pi(self, data: str) -> None:
        self.other.append(data)

    unknown_decl = handle_decl


def assert_inert(html: str) -> None:
    read = Reader(html)
    assert not read.other
    for name, attributes in read.elements:
        assert name in ELEMENTS, html
        allowed = {"a": {"href", "rel"}, "ol": {"start"}}.get(name, set())
        assert set(attributes) <= allowed, html
        target = attributes.get("href")
        if target is not None:
            squeezed = "".join(c for c in target if c > " ").lower()
            scheme, colon, _ = squeezed.partition(":")
            name_like = set(scheme) <= set(string.ascii_lowercase + string.digits + "+.-")
            assert not (colon and name_like) or scheme in ("http", "https", "mailto"), html
            assert attributes["rel"] == "nofollow ugc noopener noreferrer"


@pytest.mark.parametrize("text", ATTACKS)
def test_attacks_are_inert(text: str) -> None:
    for nested in (text, f"> {text}", f"- {text}", f"**{text}**", f"[{text}](https://e.org)"):
        assert_inert(str(render(nested)))


@pytest.mark.parametrize("text", ATTACKS)
def test_the_sanitiser_does_not_lean_on_the_renderer(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markdown, "_MARKDOWN", MarkdownIt("commonmark", {"html": True}))
    markdown.render.cache_clear()
    try:
        html = str(render(text))
    finally:
        markdown.render.cache_clear()
    assert_inert(html)


@given(st.text(st.sampled_from("<>/\"'`=&;:#[]()!*_\\ \n\tabjsvgonx-|~"), max_size=80))
def test_whatever_is_written_is_inert(text: str) -> None:
    assert_inert(str(render(text)))


@given(st.lists(st.sampled_from(ATTACKS), min_size=2, max_size=4))
def test_attacks_together_are_inert(texts: list[str]) -> None:
    assert_inert(str(render("".join(texts))))


def test_what_people_write_is_shown() -> None:
    html = str(render("*a* **b** ~~c~~ `d`\n\n> e\n\n1. f\n\n```py\ng < h\n```\n\n|i|\n|-|\n|j|"))
    for part in ("<em>a</em>", "<strong>b</strong>", "<s>c</s>", "<code>d</code>", "<blockquote>"):
        assert part in html
    assert "<pre><code>g &lt; h\n</code></pre>" in html and "<td>j</td>" in html
    assert 'href="https://e.org/?a=1&amp;b=2"' in render("[x](https://e.org/?a=1&b=2)")
    assert 'href="/paper/rbqe"' in render("[x](/paper/rbqe)")
    assert 'href="mailto:a@e.org"' in render("<a@e.org>")
    assert render("one\ntwo") == "<p>one<br>\ntwo</p>\n"


def test_headings_and_pictures_stay_text() -> None:
    assert "<h1" not in render("# not a title") and "# not a title" in render("# not a title")
    assert "<h2" not in render("not a title\n---")
    assert "<img" not in render("![x](https://e.org/x.png)")


def test_nesting_ends() -> None:
    assert_inert(str(render(">" * 5000 + "x")))
    assert_inert(str(render("[" * 5000)))
    assert_inert(str(render("*a" * 3000)))
