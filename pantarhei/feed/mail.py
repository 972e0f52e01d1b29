"""Messages: what they are made of, and how one is handed to a mail server.

A message is text and HTML (RFC 2046 multipart/alternative) without remote content. Nothing that a
person wrote can add a header: addresses are checked, and a line break in any header is an error of
:mod:`email` itself. Queueing and trying again are :mod:`.outbox`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import smtplib
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email.header import Header
from email.headerregistry import Address, HeaderRegistry, UnstructuredHeader
from email.message import EmailMessage
from email.policy import SMTP, EmailPolicy
from functools import cache
from typing import Any, Literal, Self, cast
from urllib.parse import quote, urlsplit

from pantarhei.errors import RequestError

_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
_SUBJECT = 160  # characters


def address(text: str) -> str:
    """Return an e-mail address in the one form that is kept: lower case, its domain in ASCII.

    RFC 5321's limits hold (64 octets before the @, 254 in all); forms that no provider gives to a
    person (quoted, with a bare IP address, without a dot in the domain) are refused, as is all
    that is no address. Raises :class:`RequestError`.

    >>> address(" Ada@Bücher.example ")
    'ada@xn--bcher-kva.example'
    """
    trimmed = text.strip()
    local, at, domain = trimmed.rpartition("@")
    try:
        # Python's own codec takes any full stop of Unicode for a dot, as browsers do
        domain = domain.encode("idna").decode("ascii").lower() if len(domain) < 254 else ""
    except UnicodeError:
        domain = ""
    labels = domain.split(".")
    good = (
        at
        and len(trimmed) <= 254
        and len(local) <= 64
        and len(local) + 1 + len(domain) <= 254
        and _LOCAL.fullmatch(local)
        and len(labels) > 1
        and all(_LABEL.fullmatch(label) for label in labels)
        and not labels[-1].isdigit()
    )
    if not good:
        raise RequestError(
            f"'{one_line(text, 80)}' is not an e-mail address: write it as name@example.org."
        )
    return f"{local.lower()}@{domain}"


def mailbox(email: str) -> str:
    """Return a short mark of the mailbox behind an address, the same for ``name+anything@``.

    Limits on how many messages somebody gets are counted by it.

    >>> mailbox("ada+list@example.org") == mailbox("ada@example.org")
    True
    """
    local, _, domain = address(email).partition("@")
    name = local.partition("+")[0] or local
    return hashlib.sha256(f"{name}@{domain}".encode()).hexdigest()[:20]


def one_line(text: str, limit: int) -> str:
    """Return ``text`` as one printable line of at most ``limit`` characters.

    >>> one_line("held \\r\\n  at last", 9)
    'held at …'
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


@dataclass(frozen=True)
class Settings:
    """The mail server, and who the mail is from.

    ``tls`` is ``starttls`` (begun in the clear and refused where the server does not offer it),
    ``tls`` from the first octet, or ``none``. Certificates are checked against the system's, or
    those of OpenSSL's ``SSL_CERT_FILE``.
    """

    host: str
    sender: str  # "Name <name@example.org>" or the bare address
    port: int = 0  # 587, 465 or 25, by ``tls``
    user: str = ""
    password: str = field(default="", repr=False)
    tls: Literal["starttls", "tls", "none"] = "starttls"
    timeout: float = 60.0  # seconds for each answer ...
    # ... and for the one that takes a message over: a client that hangs up earlier makes doubles
    # (RFC 5321, 4.5.3.2.6)
    patience: float = 600.0

    def __post_init__(self) -> None:
        correspondent(self.sender)
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", self.host):
            raise RequestError(f"'{one_line(self.host, 80)}' is not the name of a mail server.")
        if self.tls not in ("starttls", "tls", "none"):
            raise RequestError(
                f"PANTARHEI_SMTP_TLS '{one_line(self.tls, 40)}' is unknown: choose starttls, tls "
                "or none."
            )
        if not 0 <= self.port < 65536:
            raise RequestError(f"PANTARHEI_SMTP_PORT {self.port} is no port: 587 is usual.")
        if self.user and self.tls == "none" and not is_local(self.host):
            raise RequestError(
                "A password would be sent in the clear: set PANTARHEI_SMTP_TLS to starttls or tls."
            )
        standard = {"starttls": 587, "tls": 465, "none": 25}[self.tls]
        object.__setattr__(self, "port", self.port or standard)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self | None:
        """Read ``PANTARHEI_SMTP_HOST``, ``PORT``, ``USER``, ``PASSWORD``, ``FROM`` and ``TLS``.

        Returns None where no host is named; what cannot be meant raises :class:`RequestError`.
        """
        given = os.environ if environment is None else environment

        def of(name: str) -> str:
            return given.get(f"PANTARHEI_SMTP_{name}", "").strip()

        if not of("HOST"):
            return None
        if not of("FROM"):
            raise RequestError(
                "PANTARHEI_SMTP_FROM is not set: name the address that the mail comes from."
            )
        port = of("PORT") or "0"
        if not port.isdecimal():
            raise RequestError(f"PANTARHEI_SMTP_PORT '{one_line(port, 20)}' is not a number.")
        return cls(
            host=of("HOST"),
            sender=of("FROM"),
            port=int(port),
            user=of("USER"),
            password=given.get("PANTARHEI_SMTP_PASSWORD", ""),
            tls=cast(Any, of("TLS").lower() or "starttls"),
        )


def correspondent(text: str) -> Address:
    """Read ``Name <name@example.org>``; ``name@localhost`` is taken here as well."""
    named = re.fullmatch(r"([^<>\r\n]*)<([^<>\s]+)>", text.strip())
    name, bare = named.groups() if named else ("", text)
    checked = bare if re.fullmatch(r"[a-z0-9.-]+@localhost", bare) else address(bare)
    return Address(one_line(name.strip().strip('"'), 80), addr_spec=checked)


def is_local(host: str | None) -> bool:
    """Whether ``host`` is this machine by its usual names."""
    return host in ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Letterhead:
    """What all messages of one installation share.

    ``url`` is the page's public address, which links begin with; ``secret`` signs them
    (:attr:`.store.Store.secret`). ``sender`` is :attr:`Settings.sender`.
    """

    url: str
    secret: str = field(repr=False)
    sender: str = ""

    def __post_init__(self) -> None:
        url = self.url.rstrip("/")
        parts = urlsplit(url)
        whole = re.fullmatch(r"[!-~]+", url) and not re.search(r'[<>"\\]', url)
        if not whole or parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError(
                f"PANTARHEI_URL '{one_line(url, 80)}' is not an address: "
                "write https://papers.example.org."
            )
        object.__setattr__(self, "url", url)
        if not self.sender:
            named = "." in self.host and not self.host.replace(".", "").isdigit()
            host = self.host if named else "localhost"
            object.__setattr__(self, "sender", f"pantarhei <noreply@{host}>")
        correspondent(self.sender)

    @property
    def host(self) -> str:
        """The page's host, without a port."""
        return urlsplit(self.url).hostname or "localhost"

    def link(self, *parts: str, **query: str) -> str:
        """Return the address of a page.

        >>> Letterhead("https://papers.example.org/", "s").link("tags", "early exit")
        'https://papers.example.org/tags/early%20exit'
        """
        path = "/".join(quote(part, safe="") for part in parts)
        pairs = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        return f"{self.url}/{path}" + (f"?{pairs}" if pairs else "")


class _Verbatim(UnstructuredHeader):
    """A header in one piece: folding would write a long address as encoded words."""

    def fold(self, *, policy: Any) -> str:
        return f"{self.name}:{policy.linesep} {self}{policy.linesep}"  # type: ignore[attr-defined]


class _Words(UnstructuredHeader):
    """A header of words: email's own folding loses a space beside some characters."""

    def fold(self, *, policy: Any) -> str:
        name, text = self.name, str(self)  # type: ignore[attr-defined]
        charset = "us-ascii" if text.isascii() else "utf-8"
        header = Header(text, charset, 75, header_name=name)
        return f"{name}: {header.encode(linesep=policy.linesep)}{policy.linesep}"


def _policy() -> EmailPolicy[EmailMessage]:
    registry = HeaderRegistry()
    registry.map_to_type("subject", cast(Any, _Words))
    registry.map_to_type("list-unsubscribe", cast(Any, _Verbatim))
    return SMTP.clone(header_factory=registry, cte_type="7bit")


POLICY = _policy()


def message(
    head: Letterhead,
    recipient: str,
    subject: str,
    text: str,
    html: str,
    *,
    unsubscribe: str | None = None,
) -> EmailMessage:
    """Return a message of text and HTML, complete but for the ``Date`` and ``Message-ID``.

    Nobody's holiday notice answers it (RFC 3834). With ``unsubscribe``, the address of a page, it
    is bulk mail that one click ends (RFC 2369, 2919 and 8058). Raises :class:`RequestError` where
    ``recipient`` is no address.
    """
    made = EmailMessage(policy=POLICY)
    made["From"] = correspondent(head.sender)
    made["To"] = Address(addr_spec=address(recipient))
    # email decodes encoded words that it is given, line breaks among them: there are to be none
    made["Subject"] = one_line(subject, _SUBJECT).replace("=?", "= ?")
    made["Auto-Submitted"] = "auto-generated"
    made["X-Auto-Response-Suppress"] = "All"  # the same, for Exchange
    if unsubscribe is not None:
        made["List-Id"] = f"pantarhei <digest.{head.host}>"
        made["List-Unsubscribe"] = f"<{unsubscribe}>"
        made["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        made["Precedence"] = "bulk"
    made.set_content(text, cte="quoted-printable")
    made.add_alternative(html, subtype="html", cte="quoted-printable")
    return made


def render(name: str, **values: Any) -> tuple[str, str]:
    """Return the text and the HTML of a letter, from ``letters/<name>.txt`` and ``.html``."""
    letters = _letters()
    text, html = (letters.get_template(f"{name}.{kind}").render(values) for kind in ("txt", "html"))
    return text, html


@cache
def _letters() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "letters"),
        autoescape=lambda name: name is None or not name.endswith(".txt"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def note(
    head: Letterhead, recipient: str, subject: str, *, link: str, label: str, lines: Iterable[str]
) -> EmailMessage:
    """Return a short message around one link: ``lines`` stand below it, a paragraph each."""
    paragraphs = list(lines)
    values = {"subject": subject, "link": link, "label": label, "lines": paragraphs}
    return message(head, recipient, subject, *render("note", **values, head=head))


def login_message(head: Letterhead, email: str, link: str, *, minutes: int = 15) -> EmailMessage:
    """Return the message whose link logs somebody in; queue it with :meth:`.outbox.Outbox.put`."""
    return note(
        head,
        email,
        f"Your link to log in at {head.host}",
        link=link,
        label="Log in",
        lines=(
            f"The link works once and for {minutes} minutes.",
            "If you did not ask for it, somebody typed your address by mistake: nothing happens "
            "unless the link is used, so ignore this message.",
        ),
    )


class Deferred(Exception):
    """The message was not taken; another try may succeed."""


class Unavailable(Deferred):
    """No message can be sent at present: the server, or how it was set up, is the reason."""


class Refused(Exception):
    """The server will never take this message for this recipient (a 5xx answer)."""


class Lost(Exception):
    """The message is somebody else's to send by now."""


class Connection:
    """A conversation with the mail server, begun at the first message and kept for the next.

    What comes from :mod:`smtplib` leaves as :class:`Deferred`, :class:`Unavailable` or
    :class:`Refused`, with the server's own words.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._smtp: smtplib.SMTP | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._smtp is not None:
            with contextlib.suppress(OSError):
                self._smtp.quit()
        self._hang_up()

    @property
    def broken(self) -> bool:
        """Whether the conversation ended before its time; the next message begins another."""
        return self._smtp is None

    def send(self, recipient: str, content: bytes, ours: Callable[[], bool]) -> None:
        """Hand a message over; return once the server has answered 250 to the whole of it.

        ``ours`` is asked at the last moment before the content goes out: where it says no,
        :class:`Lost` is raised and nothing was sent.
        """
        smtp = self._ready()
        try:
            self._begin(smtp, recipient)
            if not ours():
                self._hang_up()
                raise Lost
            if smtp.sock is not None:
                smtp.sock.settimeout(self.settings.patience)
            _judge(*smtp.data(content))
            if smtp.sock is not None:
                smtp.sock.settimeout(self.settings.timeout)
        except smtplib.SMTPDataError as error:  # DATA itself was refused
            _judge(error.smtp_code, error.smtp_error)
            raise Deferred(str(error)) from error
        except OSError as error:  # smtplib's own errors are OSErrors as well
            self._hang_up()
            raise Deferred(_said(error)) from error

    def _begin(self, smtp: smtplib.SMTP, recipient: str) -> None:
        sender = correspondent(self.settings.sender).addr_spec
        code, said = smtp.mail(sender)
        if code != 250:  # about us, not about this message
            self._hang_up()
            raise Unavailable(_said((code, said)))
        code, said = smtp.rcpt(recipient)
        if code == 421:
            self._hang_up()
            raise Unavailable(_said((code, said)))
        _judge(code, said)

    def _ready(self) -> smtplib.SMTP:
        """Return a conversation in which a message may begin."""
        if self._smtp is not None:
            try:
                if self._smtp.rset()[0] == 250:
                    return self._smtp
            except OSError:
                pass  # it hung up while we were busy: begin another
            self._hang_up()
        try:
            self._smtp = self._connect()
        except (OSError, ValueError) as error:
            self._hang_up()
            where = f"{self.settings.host}:{self.settings.port}"
            raise Unavailable(f"{where}: {_said(error)}") from error
        return self._smtp

    def _connect(self) -> smtplib.SMTP:
        given = self.settings
        # Our own name in EHLO; smtplib would ask the DNS for it, which can take long.
        name = correspondent(given.sender).domain
        context = ssl.create_default_context()
        if given.tls == "tls":
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(
                given.host, given.port, name, timeout=given.timeout, context=context
            )
        else:
            smtp = smtplib.SMTP(given.host, given.port, name, timeout=given.timeout)
        self._smtp = smtp  # to be hung up on whatever happens from here
        smtp.ehlo_or_helo_if_needed()
        if given.tls == "starttls":
            if not smtp.has_extn("starttls"):
                raise smtplib.SMTPNotSupportedError(
                    "the server offers no STARTTLS, and nothing is sent in the clear unless "
                    "PANTARHEI_SMTP_TLS is none"
                )
            code, said = smtp.starttls(context=context)
            if code != 220:
                raise smtplib.SMTPResponseException(code, said)
            smtp.ehlo()
        if given.user:
            smtp.login(given.user, given.password)
        return smtp

    def _hang_up(self) -> None:
        if self._smtp is not None:
            self._smtp.close()
            self._smtp = None


def _judge(code: int, said: bytes | str) -> None:
    if 200 <= code < 300:
        return
    if 500 <= code < 600:
        raise Refused(_said((code, said)))
    raise Deferred(_said((code, said)))


def _said(answer: tuple[int, bytes | str] | BaseException) -> str:
    """Return the server's words, or what went wrong, as one line."""
    if isinstance(answer, smtplib.SMTPResponseException):
        answer = (answer.smtp_code, answer.smtp_error)
    if isinstance(answer, BaseException):
        return one_line(str(answer) or type(answer).__name__, 300)
    code, words = answer
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)
    return one_line(f"{code} {text}", 300)
