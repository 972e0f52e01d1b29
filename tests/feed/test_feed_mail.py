"""Messages: addresses, headers that nobody else can write, settings, what HTML may hold."""

from __future__ import annotations

import email
import re
from email import policy
from email.message import EmailMessage

import pytest

pytest.importorskip("sqlalchemy", reason="needs `pip install 'pantarhei[feed]'`")

from hypothesis import given
from hypothesis import strategies as st

from pantarhei.errors import RequestError
from pantarhei.feed import mail
from pantarhei.feed.mail import Letterhead, Settings

HEAD = Letterhead("https://papers.example.org/", "secret")
LINK = "https://papers.some-long-institution.example.org/unsubscribe/" + "A1_-" * 40


def read(message: EmailMessage) -> EmailMessage:
    """Send a message through its octets, as a server and a mail program see it."""
    return email.message_from_bytes(message.as_bytes(), policy=policy.default)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("ada@example.org", "ada@example.org"),
        (" Ada.L+news@Example.ORG\n", "ada.l+news@example.org"),
        ("o'neil/x=y@a-b.example", "o'neil/x=y@a-b.example"),
        ("ada@bücher.example", "ada@xn--bcher-kva.example"),
        ("a" * 64 + "@" + "b" * 63 + ".org", "a" * 64 + "@" + "b" * 63 + ".org"),
    ],
)
def test_an_address_is_kept_in_one_form(given, kept):
    assert mail.address(given) == kept


@pytest.mark.parametrize(
    "given",
    [
        "",
        "@",
        "ada",
        "ada@",
        "@example.org",
        "ada@localhost",
        "ada@example..org",
        "ada@.example.org",
        "ada@example.org.",
        "ada@-x.example",
        "ada@x_y.example",
        "a..b@example.org",
        ".a@example.org",
        "a b@example.org",
        '"a b"@example.org',
        "ada@ben@example.org",
        "ada@[192.0.2.1]",
        "ada@192.0.2.1",
        "Ada <ada@example.org>",
        "ada@example.org, ben@example.org",
        "ada@example.org\r\nBcc: ben@example.org",
        "ada\r\nBcc:ben@example.org",
        "ada@exam\nple.org",
        "ada@example.org\0",
        "ada@example.org>\r\nDATA",
        "ä@example.org",
        "a" * 65 + "@example.org",
        "a@" + "b" * 64 + ".org",
        "a@" + "b." * 130 + "org",
        "a" * 10**6,
    ],
)
def test_what_is_no_address_is_refused_in_one_line(given):
    with pytest.raises(RequestError) as refused:
        mail.address(given)
    said = str(refused.value)
    assert said.isprintable() and len(said) < 200


@given(st.text(max_size=300))
def test_any_text_is_an_address_or_refused(text):
    try:
        kept = mail.address(text)
    except RequestError:
        return
    assert mail.address(kept) == kept and kept.isascii() and kept.isprintable() and " " not in kept


@given(st.text(max_size=300))
def test_no_subject_adds_a_header(text):
    made = mail.message(HEAD, "ada@example.org", text, "t", "h", unsubscribe=LINK)
    content = made.as_bytes()
    names = re.findall(rb"^([A-Za-z-]+):", content.partition(b"\r\n\r\n")[0], re.MULTILINE)
    assert names == [name.encode() for name in made]
    assert max(map(len, content.split(b"\r\n"))) <= 998 and content.isascii()
    assert (read(made)["subject"] or "") == mail.one_line(text, 160).replace("=?", "= ?")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\r\nBcc: x@example.org", "a Bcc: x@example.org"),
        ("=?utf-8?q?a=0D=0ABcc=3A_x=40example=2Eorg?=", None),
        ("x =?utf-8?b?YQ0KQmNjOiB4QGV4YW1wbGUub3Jn?= y", None),
        ("Käse " * 60, "Käse " * 31 + "Käse…"),
    ],
)
def test_these_subjects_either(text, kept):
    found = read(mail.message(HEAD, "ada@example.org", text, "t", "h"))
    assert found["bcc"] is None
    assert found["subject"] == (kept or text.replace("=?", "= ?"))


def test_a_recipient_or_sender_adds_no_header():
    with pytest.raises(RequestError):
        mail.message(HEAD, "ada@example.org\r\nBcc: ben@example.org", "s", "t", "h")
    with pytest.raises(RequestError):
        Letterhead("https://papers.example.org", "s", "me <me@example.org>\r\nBcc: x@example.org")
    with pytest.raises(RequestError):
        Letterhead("https://papers.example.org/\r\nBcc: x@example.org", "s")


def test_bulk_mail_says_so_and_is_ended_by_one_click():
    made = mail.message(HEAD, "ada@example.org", "s", "t", "h", unsubscribe=LINK)
    found = read(made)
    assert found["list-unsubscribe"].strip() == f"<{LINK}>"
    assert f"\r\n <{LINK}>\r\n".encode() in made.as_bytes(), "as it is, not as encoded words"
    assert found["list-unsubscribe-post"] == "List-Unsubscribe=One-Click"
    assert found["list-id"] == "pantarhei <digest.papers.example.org>"
    assert found["precedence"] == "bulk" and found["auto-submitted"] == "auto-generated"


def test_what_a_person_asked_for_is_not_bulk():
    found = read(mail.login_message(HEAD, "ada@example.org", "https://papers.example.org/login/x"))
    assert not {"precedence", "list-id", "list-unsubscribe"} & {k.lower() for k in found}
    assert found["auto-submitted"] == "auto-generated"
    for kind in ("plain", "html"):
        content = found.get_body((kind,)).get_content()
        assert "https://papers.example.org/login/x" in content and "15 minutes" in content


def test_text_in_html_is_text():
    link = "https://papers.example.org/login/x?next=%2F&a=<b>"
    made = mail.note(HEAD, "ada@example.org", "<b>s</b>", link=link, label="l", lines=["<i>&"])
    html = read(made).get_body(("html",)).get_content()
    assert "&lt;b&gt;s" in html and "&lt;i&gt;&amp;" in html and "<b>" not in html
    text = read(made).get_body(("plain",)).get_content()
    assert "<b>s</b>" in text and link in text


def test_html_asks_for_nothing_from_elsewhere():
    html = read(mail.login_message(HEAD, "ada@example.org", LINK)).get_body(("html",)).get_content()
    assert not re.search(r"<(img|script|link|iframe|object|form)|src=|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize(
    "sender", ["Päpers, and more <p@example.org>", "p@example.org", '"P" <p@localhost>']
)
def test_senders(sender):
    head = Letterhead("http://127.0.0.1:8000", "s", sender)
    found = read(mail.message(head, "ada@example.org", "s", "t", "h"))["from"].addresses[0]
    assert found.addr_spec in ("p@example.org", "p@localhost")
    assert found.display_name in ("Päpers, and more", "", "P")


@pytest.mark.parametrize(
    "url", ["papers.example.org", "ftp://x.example", "https://", "https://x/<a>", "javascript:x"]
)
def test_a_public_address_is_one(url):
    with pytest.raises(RequestError, match="PANTARHEI_URL"):
        Letterhead(url, "s")


GIVEN = {"PANTARHEI_SMTP_HOST": "mail.example.org", "PANTARHEI_SMTP_FROM": "me@example.org"}


class TestSettings:
    def of(self, **changes: str) -> Settings | None:
        more = {f"PANTARHEI_SMTP_{name}": value for name, value in changes.items()}
        return Settings.from_environment(GIVEN | more)

    def test_none_without_a_host(self):
        assert Settings.from_environment({"PANTARHEI_SMTP_FROM": "me@example.org"}) is None

    @pytest.mark.parametrize(
        ("tls", "port"), [("", 587), ("starttls", 587), ("tls", 465), ("none", 25)]
    )
    def test_ports(self, tls, port):
        assert self.of(TLS=tls).port == port
        assert self.of(TLS=tls, PORT="2525").port == 2525

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"FROM": ""}, "FROM is not set"),
            ({"FROM": "nobody"}, "not an e-mail address"),
            ({"PORT": "smtp"}, "not a number"),
            ({"PORT": "65536"}, "no port"),
            ({"TLS": "ssl"}, "choose starttls, tls or none"),
            ({"HOST": "mail example"}, "not the name of a mail server"),
            ({"TLS": "none", "USER": "me", "PASSWORD": "x"}, "in the clear"),
        ],
    )
    def test_what_cannot_be_meant_is_said(self, changes, said):
        with pytest.raises(RequestError, match=said):
            self.of(**changes)

    def test_the_password_is_not_shown(self):
        assert "hunter2" not in repr(self.of(USER="me", PASSWORD="hunter2"))
