"""Taking part: logging in, votes, comments, tags, one's own list, and papers by mail.

Everything is a plain form that is posted and answered with a redirection, so that it works without
JavaScript and reloading a page repeats nothing. What the :class:`.security.Guard` has checked
(source, token, size) is not checked again here; who takes part, and how often, is.

``app.state`` holds ``store``, ``site`` and ``templates``; :func:`context` is a context processor of
the templates, :func:`part` gives a paper's page what ``_people.html`` shows there.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import quote, urlencode, urlsplit

import sqlalchemy as sa
from fastapi import APIRouter
from fastapi.templating import Jinja2Templates
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pantarhei.errors import RequestError
from pantarhei.feed import mail, outbox, papers, people, schema, subscriptions
from pantarhei.feed.store import Store
from pantarhei.feed.web import markdown
from pantarhei.feed.web.security import (
    SESSION_SECONDS,
    Asked,
    Site,
    local_path,
    set_cookie,
)
from pantarhei.papers import WINGS

router = APIRouter(include_in_schema=False)
COMMENTS = 100  # on one page
_LARGEST = 2**31 - 1  # of PostgreSQL's integers


@dataclass(frozen=True)
class Visitor:
    """Who looks at a page. ``token`` goes into its forms."""

    account: people.Account | None
    may_log_in: bool
    asked: Asked

    @property
    def token(self) -> str:
        """The token of this browser's forms."""
        return self.asked.token


@dataclass(frozen=True)
class Comment:
    """A comment as a page shows it."""

    id: int
    name: str
    html: Markup
    time: str  # ISO 8601
    day: str
    edited: bool
    mine: bool


@dataclass(frozen=True)
class Part:
    """What people made of a paper, as one of them sees it."""

    voted: bool
    saved: bool
    tags: list[tuple[str, int]]  # each with how many gave it
    my_tags: frozenset[str]
    comments: list[Comment]
    more: int | None  # the last of these comments, where there are later ones
    nonce: str  # of the next comment
    tag_length: int = people.TAG_LENGTH
    body_length: int = people.COMMENT_LENGTH


def visitor(request: Request) -> Visitor:
    """Return who asks: the owner of a local page, an account with a session, or nobody."""
    known = getattr(request.state, "visitor", None)
    if known is None:
        known = request.state.visitor = _identify(request)
    return cast(Visitor, known)


def _identify(request: Request) -> Visitor:
    site, asked, store = _site(request), cast(Asked, request.state.asked), _store(request)
    account = None
    if site.mode == "local":
        # The same on every page; looked up once.
        account = getattr(request.app.state, "owner", None)
        if account is None:
            with store.write() as c:
                account = request.app.state.owner = people.account(c, people.LOCAL)
    elif asked.session is not None:
        with store.read() as c:
            account = people.session(c, asked.session)
    return Visitor(account, site.mode == "shared", asked)


def context(request: Request) -> dict[str, Any]:
    """Give every template its ``visitor`` and the ``here`` that forms come back to."""
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    shown = request.method in ("GET", "HEAD")  # what answers a form cannot be come back to
    return {"visitor": visitor(request), "here": local_path(here) if shown else "/"}


def part(c: sa.Connection, visitor: Visitor, paper: papers.Paper, after: int = 0) -> Part:
    """Return what a paper's page shows of people; of many comments, those ``after`` one of them."""
    account = visitor.account
    mine, who, nonce = people.Mine(frozenset(), frozenset(), {}), None, ""
    if account is not None:
        mine, who = people.mine(c, account.id, [paper.id]), account.id
        nonce = _nonce(c, visitor, account.id, paper.id)
    found = people.comments(c, paper.id, after=after, limit=COMMENTS + 1)
    return Part(
        voted=paper.id in mine.votes,
        saved=paper.id in mine.saved,
        tags=people.tags(c, paper.id),
        my_tags=frozenset(mine.tags.get(paper.id, ())),
        comments=[_shown(comment, who) for comment in found[:COMMENTS]],
        more=found[COMMENTS - 1].id if len(found) > COMMENTS else None,
        nonce=nonce,
    )


def _shown(comment: people.Comment, account: int | None) -> Comment:
    when = datetime.fromtimestamp(comment.created, UTC)
    return Comment(
        comment.id,
        comment.name,
        markdown.render(comment.body),
        when.isoformat(timespec="seconds"),
        when.strftime("%-d %B %Y"),
        comment.changed is not None,
        comment.account == account,
    )


def _nonce(c: sa.Connection, visitor: Visitor, account: int, paper: int) -> str:
    """Name the comment that this person writes next on this paper.

    It stays the same until that comment is there, so that the page stays the same as well.
    """
    table = schema.comments
    query = sa.select(sa.func.count(), sa.func.max(table.c.id))
    written = c.execute(query.where(table.c.account == account, table.c.paper == paper)).one()
    text = f"comment {account} {paper} {tuple(written)}"
    return hmac.new(visitor.asked.site.secret, text.encode(), hashlib.sha256).hexdigest()[:32]


def _site(request: Request) -> Site:
    return cast(Site, request.app.state.site)


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


def _form(request: Request) -> dict[str, str]:
    return cast(Asked, request.state.asked).form


def _page(request: Request, name: str, status: int = 200, **values: Any) -> Response:
    templates = cast(Jinja2Templates, request.app.state.templates)
    return templates.TemplateResponse(request, name, values, status)


def _to(path: str) -> RedirectResponse:
    return RedirectResponse(path, 303)


def _paper_path(paper: papers.Paper, rest: str = "") -> str:
    return f"/paper/{quote(paper.key, safe='')}{rest}"


def _comment_path(paper: papers.Paper, id: int) -> str:
    """Lead to a comment, which may stand on a later page than the paper's own."""
    if paper.comments < COMMENTS:
        return _paper_path(paper, f"#comment-{id}")
    return _paper_path(paper, f"/comments?after={id - 1}#comment-{id}")


def _found(c: sa.Connection, key: str) -> papers.Paper:
    paper = papers.get(c, key)
    if paper is None:
        raise HTTPException(404, "There is no such paper here.")
    return paper


def _taking_part(request: Request, limit: str = "account") -> people.Account:
    """Return the account that writes; ask nobody to log in, and everybody not to overdo it."""
    who = visitor(request)
    if who.account is None:
        if not who.may_log_in:
            raise HTTPException(403, "This page can be read but not written to.")
        back = local_path(_form(request).get("next"), request.url.path)
        if back == request.url.path and request.method == "POST":
            back = back.rpartition("/")[0] or "/"
        location = f"/login?{urlencode({'next': back})}"
        if "hx-request" in request.headers:
            # Within the page a redirection would be followed; this one concerns the whole window.
            raise HTTPException(403, "Log in first.", {"HX-Redirect": location})
        raise HTTPException(303, "Log in first.", {"Location": location})
    _site(request).within(limit, str(who.account.id))
    return who.account


# ------------------------------------------------------------------------------------ logging in


@router.get("/login")
def login_page(request: Request, next: str = "/") -> Response:
    """Ask for an address."""
    who = visitor(request)
    if who.account is not None:
        return _to(local_path(next))
    if not who.may_log_in:
        raise HTTPException(404, "This page has no accounts.")
    return _page(request, "login.html", next=local_path(next), email="", problem="")


@router.post("/login")
def login(request: Request) -> Response:
    """Send a link, whoever asks: the answer does not tell whether there is an account."""
    if not visitor(request).may_log_in:
        raise HTTPException(404, "This page has no accounts.")
    form = _form(request)
    next, email = local_path(form.get("next")), form.get("email", "")
    head = _letterhead(request)
    try:
        address = mail.address(email)
    except RequestError as error:
        values = {"next": next, "email": email[:254], "problem": str(error)}
        return _page(request, "login.html", 400, **values)
    _mail_within(request, address)
    with _store(request).write() as c:
        token = people.login_token(c, address)
        link = head.link("login", token, **({} if next == "/" else {"next": next}))
        message = mail.login_message(head, address, link)
        mark = hashlib.sha256(token.encode()).hexdigest()[:20]
        key = outbox.key_to("login", address, mark)
        outbox.put(c, key, address, message, secret=head.secret)
    _wake(request)
    return _to("/login/sent")


@router.get("/login/sent")
def login_sent(request: Request) -> Response:
    """Say that a link is on its way."""
    lines = ["If the address was right, a message with a link is on its way to it.", _SPAM]
    return _notice(request, "Look into your mail", lines, "/login", "Ask again")


@router.get("/login/{token}")
def login_confirm(request: Request, token: str, next: str = "/") -> Response:
    """Ask once more: programs that look at mail follow links, but press no buttons."""
    if not visitor(request).may_log_in:
        raise HTTPException(404, "This page has no accounts.")
    with _store(request).read() as c:
        email = people.login_email(c, token)
    if email is None:
        return _spent(request)
    return _confirm(
        request,
        "Log in",
        [f"You are about to log in as {email}."],
        f"/login/{quote(token, safe='')}",
        "Log in",
        ("/", "Do not"),
        next=local_path(next),
    )


@router.post("/login/{token}")
def login_finish(request: Request, token: str) -> Response:
    """Use the link up, and begin a session whose name nobody knew before."""
    if not visitor(request).may_log_in:
        raise HTTPException(404, "This page has no accounts.")
    site, asked = _site(request), cast(Asked, request.state.asked)
    with _store(request).write() as c:
        begun = people.log_in(c, token)
        if begun is not None and asked.session is not None:
            people.log_out(c, asked.session)
    if begun is None:
        return _spent(request)
    _, session = begun
    response = _to(local_path(_form(request).get("next")))
    set_cookie(response.headers, site, site.session_cookie, session, SESSION_SECONDS)
    set_cookie(response.headers, site, site.form_cookie, "", 0)
    return response


def _spent(request: Request) -> Response:
    lines = ["A link to log in works once, and for a quarter of an hour."]
    return _notice(
        request, "This link does not work (any more)", lines, "/login", "Ask for another", 410
    )


@router.post("/logout")
def logout(request: Request) -> Response:
    """End the session, here and in the store."""
    site, asked = _site(request), cast(Asked, request.state.asked)
    response = _to("/")
    if asked.session is not None:
        with _store(request).write() as c:
            people.log_out(c, asked.session)
        set_cookie(response.headers, site, site.session_cookie, "", 0)
    return response


# ------------------------------------------------------------------ votes, tags, one's own list


@router.post("/paper/{key}/vote")
def vote(request: Request, key: str) -> Response:
    """Vote for a paper, or take the vote back."""
    return _toggle(request, key, "vote", people.vote)


@router.post("/paper/{key}/save")
def save(request: Request, key: str) -> Response:
    """Put a paper on one's own list, or take it off."""
    return _toggle(request, key, "save", people.save)


def _toggle(request: Request, key: str, what: str, act: Callable[..., Any]) -> Response:
    account = _taking_part(request)
    form = _form(request)
    on = _switch(form)
    with _store(request).write() as c:
        paper = _found(c, key)
        act(c, account.id, paper.id, on)
        paper = _found(c, key)
    here = local_path(form.get("next"), _paper_path(paper))
    if "hx-request" not in request.headers:
        return _to(here)
    templates = cast(Jinja2Templates, request.app.state.templates)
    button = getattr(templates.get_template("_people.html").module, what)
    return Response(button(visitor(request), paper, on, here), media_type="text/html")


@router.post("/paper/{key}/tag")
def tag(request: Request, key: str) -> Response:
    """Give a paper a tag, or take one's own away."""
    account = _taking_part(request)
    form = _form(request)
    with _store(request).write() as c:
        paper = _found(c, key)
        people.tag(c, account.id, paper.id, form.get("tag", ""), _switch(form))
    return _to(local_path(form.get("next"), _paper_path(paper)))


def _switch(form: dict[str, str]) -> bool:
    if form.get("on") not in ("0", "1"):
        raise HTTPException(400, "A form of this page says on=1 or on=0.")
    return form["on"] == "1"


@router.get("/list")
def own_list(request: Request, after: str | None = None) -> Response:
    """Show the papers one saved, newest first, and the tags one gave."""
    account = _taking_part(request)
    mine = schema.tags.c.account == account.id
    with _store(request).read() as c:
        listed = people.saved(c, account.id, after=after)
        tags = c.scalars(sa.select(schema.tags.c.tag).where(mine).distinct()).all()
    values: dict[str, Any] = {"papers": listed.papers, "next": listed.next, "my_tags": sorted(tags)}
    return _page(request, "list.html", section="list", **values)


@router.get("/account")
def account_page(request: Request) -> Response:
    """Show what one is called here, and what one gets by mail."""
    return _account(request, _taking_part(request), "")


@router.post("/account")
def rename(request: Request) -> Response:
    """Change the name beside one's comments."""
    account = _taking_part(request)
    try:
        with _store(request).write() as c:
            people.rename(c, account.id, _form(request).get("name", ""))
    except RequestError as error:
        return _account(request, account, str(error))
    request.app.state.owner = None
    return _to("/account")


def _account(request: Request, account: people.Account, problem: str) -> Response:
    head = getattr(request.app.state, "letterhead", None)
    mails = []
    if head is not None and account.email != people.LOCAL:
        with _store(request).read() as c:
            for one in subscriptions.of(c, account.email):
                path = urlsplit(subscriptions.unsubscribe_link(head, one)).path
                mails.append((f"{one.topic}, {one.period}", path))
    values: dict[str, Any] = {"problem": problem, "mails": mails, "length": people.NAME_LENGTH}
    return _page(request, "account.html", 400 if problem else 200, **values)


@router.get("/account/delete")
def forget_page(request: Request) -> Response:
    """Ask before an account is gone."""
    _taking_part(request)
    lines = ["Your votes, comments, tags, list and subscriptions will be gone, for good."]
    back = ("/account", "Keep it")
    return _confirm(
        request, "Delete your account?", lines, "/account/delete", "Delete it all", back
    )


@router.post("/account/delete")
def forget(request: Request) -> Response:
    """Delete an account and everything it gave."""
    account = _taking_part(request)
    site, response = _site(request), _to("/")
    with _store(request).write() as c:
        people.forget(c, account.id)
        if account.email != people.LOCAL:
            for one in subscriptions.of(c, account.email):
                subscriptions.end(c, one)
    request.app.state.owner = None
    set_cookie(response.headers, site, site.session_cookie, "", 0)
    return response


# -------------------------------------------------------------------------------------- comments


@router.post("/paper/{key}/comment")
def comment(request: Request, key: str) -> Response:
    """Add a comment, once however often the form is sent; or show what it would look like."""
    form = _form(request)
    body, nonce = form.get("body", ""), form.get("nonce", "")
    preview = form.get("do") == "preview"
    account = _taking_part(request, "account" if preview else "comment")
    store = _store(request)
    with store.read() as c:
        paper = _found(c, key)
    path = _paper_path(paper, "/comment")
    problem = ""
    if not preview:
        # Another text from another window, with the same nonce, is another comment.
        name = hashlib.sha256(f"{account.id} {nonce} {body}".encode()).hexdigest()
        try:
            with store.write() as c:
                made = people.comment(c, account.id, paper.id, body, name)
            return _to(_comment_path(paper, made.id))
        except RequestError as error:
            problem = str(error)
    return _writing(
        request, paper, "Write a comment", "Comment", path, body, problem, preview, nonce
    )


@router.get("/comment/{id}/edit")
def edit_page(request: Request, id: int) -> Response:
    """Show one's own comment to be written anew."""
    found, paper = _own(request, id)
    path = f"/comment/{found.id}/edit"
    return _writing(request, paper, "Edit your comment", "Save", path, found.body, "", False, "")


@router.post("/comment/{id}/edit")
def edit(request: Request, id: int) -> Response:
    """Change one's own comment; or show what it would look like."""
    form = _form(request)
    body, preview = form.get("body", ""), form.get("do") == "preview"
    found, paper = _own(request, id)
    problem = ""
    if not preview:
        try:
            with _store(request).write() as c:
                people.edit(c, found.account, found.id, body)
            return _to(_comment_path(paper, found.id))
        except RequestError as error:
            problem = str(error)
    path = f"/comment/{found.id}/edit"
    return _writing(request, paper, "Edit your comment", "Save", path, body, problem, preview, "")


@router.get("/comment/{id}/delete")
def delete_page(request: Request, id: int) -> Response:
    """Ask before a comment is gone."""
    found, paper = _own(request, id)
    back = (_comment_path(paper, found.id), "Keep it")
    lines = [
        f"It will be gone from “{paper.title}”. It begins:",
        mail.one_line(found.body, 80),
    ]
    return _confirm(
        request, "Delete your comment?", lines, f"/comment/{found.id}/delete", "Delete", back
    )


@router.post("/comment/{id}/delete")
def delete(request: Request, id: int) -> Response:
    """Delete one's own comment."""
    found, paper = _own(request, id)
    with _store(request).write() as c:
        people.delete(c, found.account, found.id)
    return _to(_paper_path(paper, "#comments"))


@router.get("/paper/{key}/comments")
def comments_page(request: Request, key: str, after: int = 0) -> Response:
    """Show a paper's comments, those after one of them."""
    who = visitor(request)
    with _store(request).read() as c:
        paper = _found(c, key)
        values: dict[str, Any] = {
            "paper": paper,
            "part": part(c, who, paper, min(max(after, 0), _LARGEST)),
        }
    return _page(request, "comments.html", **values)


def _own(request: Request, id: int) -> tuple[people.Comment, papers.Paper]:
    """Return a comment of whoever asks; somebody else's looks like none at all."""
    account = _taking_part(request)
    table = schema.comments
    mine = (table.c.id == min(max(id, 0), _LARGEST), table.c.account == account.id)
    with _store(request).read() as c:
        row = c.execute(sa.select(table).where(*mine)).first()
        if row is None:
            raise HTTPException(404, "You have no such comment.")
        [paper] = papers.by_id(c, [row.paper])
    found = people.Comment(
        row.id, row.paper, row.account, account.name, row.body, row.created, row.changed
    )
    return found, paper


def _writing(
    request: Request,
    paper: papers.Paper,
    heading: str,
    verb: str,
    action: str,
    body: str,
    problem: str,
    preview: bool,
    nonce: str,
) -> Response:
    return _page(
        request,
        "comment.html",
        400 if problem else 200,
        paper=paper,
        heading=heading,
        verb=verb,
        action=action,
        body=body,
        problem=problem,
        # What is too long to keep is too long to render.
        preview=markdown.render(body[: people.COMMENT_LENGTH]) if preview else None,
        nonce=nonce,
        body_length=people.COMMENT_LENGTH,
    )


# ---------------------------------------------------------------------------------- papers by mail

_SPAM = "It can take a minute. If nothing comes, look where your mail program puts spam."


@router.get("/subscribe")
def subscribe_page(
    request: Request, kind: str = "all", value: str = "", period: str = "daily"
) -> Response:
    """Ask what to send where; views of the page link here with their own ``kind`` and ``value``."""
    _letterhead(request)
    account = visitor(request).account
    email = "" if account is None or account.email == people.LOCAL else account.email
    given = {"email": email, "period": period, "kind": kind, kind: value[:200]}
    return _subscribing(request, given, "")


@router.post("/subscribe")
def subscribe(request: Request) -> Response:
    """Send a message that asks whether it was really them; nothing else comes before."""
    form = _form(request)
    head = _letterhead(request)
    kind = form.get("kind", "")
    try:
        address = mail.address(form.get("email", ""))
        with _store(request).write() as c:
            value = form.get(kind, "") if kind in ("wing", "tag", "search") else ""
            subscriptions.subscribe(c, head, address, form.get("period", ""), kind, value)
            _mail_within(request, address)  # too often undoes it
    except RequestError as error:
        return _subscribing(request, form, str(error))
    _wake(request)
    return _to("/subscribe/sent")


@router.get("/subscribe/sent")
def subscribe_sent(request: Request) -> Response:
    """Say that a message is on its way."""
    lines = [
        "A message is on its way that asks whether this was really you. "
        "The papers begin to come once you follow its link.",
        _SPAM,
    ]
    return _notice(request, "Look into your mail", lines, "/", "To the papers")


@router.get("/subscribe/confirm/{token}")
def subscribe_confirm_page(request: Request, token: str) -> Response:
    """Ask once more, as for logging in."""
    path = f"/subscribe/confirm/{quote(token, safe='')}"
    lines = ["Press the button, and the papers begin to come."]
    return _confirm(request, "Papers by mail", lines, path, "Yes, send them", ("/", "No"))


@router.post("/subscribe/confirm/{token}")
def subscribe_confirm(request: Request, token: str) -> Response:
    """Confirm a subscription; twice does no harm."""
    with _store(request).write() as c:
        begun = subscriptions.confirm(c, _store(request).secret, token)
    lines = [f"The next message comes when there is something new about {begun.topic}."]
    return _notice(request, "You are subscribed", lines, "/", "To the papers")


@router.get("/unsubscribe/{token}")
def unsubscribe_page(request: Request, token: str) -> Response:
    """Ask a person; looking at the link ends nothing."""
    path = f"/unsubscribe/{quote(token, safe='')}"
    lines = ["Press the button, and no more papers come by mail."]
    return _confirm(request, "End this subscription?", lines, path, "Unsubscribe", ("/", "Keep it"))


@router.post("/unsubscribe/{token}")
def unsubscribe(request: Request, token: str) -> Response:
    """End a subscription: a person's button, or one click in a mail program (RFC 8058).

    The guard lets this through without a token of a form: the signed one in the address says all.
    """
    with _store(request).write() as c:
        ended = subscriptions.unsubscribe(c, _store(request).secret, token)
    about = "" if ended is None else f" about {ended.topic}"
    lines = [f"No more messages come{about}."]
    return _notice(request, "You are unsubscribed", lines, "/", "To the papers")


def _subscribing(request: Request, given: dict[str, str], problem: str) -> Response:
    names = ("email", "period", "kind", "wing", "tag", "search")
    return _page(
        request,
        "subscribe.html",
        400 if problem else 200,
        given={name: given.get(name, "")[:254] for name in names},
        wings=WINGS,
        tag_length=people.TAG_LENGTH,
        problem=problem,
    )


def _letterhead(request: Request) -> mail.Letterhead:
    head = getattr(request.app.state, "letterhead", None)
    if head is None:
        raise HTTPException(
            503, "This page sends no mail: set PANTARHEI_SMTP_HOST where it is served."
        )
    return cast(mail.Letterhead, head)


def _mail_within(request: Request, address: str) -> None:
    """Count a message that somebody asks us to send: by who asks, and by who gets it."""
    asked = cast(Asked, request.state.asked)
    _site(request).within("mail", asked.address)
    _site(request).within("recipient", mail.mailbox(address))


def _wake(request: Request) -> None:
    sender = getattr(request.app.state, "sender", None)
    if sender is not None:
        sender.wake()


def _notice(
    request: Request, heading: str, lines: list[str], back: str, label: str, status: int = 200
) -> Response:
    values = {"heading": heading, "lines": lines, "back": back, "back_label": label}
    return _unkept(_page(request, "notice.html", status, **values))


def _confirm(
    request: Request,
    heading: str,
    lines: list[str],
    action: str,
    verb: str,
    back: tuple[str, str],
    **fields: str,
) -> Response:
    values: dict[str, Any] = {"heading": heading, "lines": lines, "action": action, "verb": verb}
    values |= {"fields": fields, "back": back[0], "back_label": back[1]}
    return _unkept(_page(request, "confirm.html", **values))


def _unkept(response: Response) -> Response:
    """Let nobody keep a page whose address may hold the token of a link."""
    response.headers["Cache-Control"] = "no-store"
    return response
