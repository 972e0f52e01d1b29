"""Subscriptions: double opt-in, links that are signed, and nobody's mailbox filled."""

from __future__ import annotations

import re
from email import message_from_bytes, policy

import pytest

sa = pytest.importorskip("sqlalchemy", reason="needs `pip install 'pantarhei[feed]'`")

from pantarhei.errors import RequestError  # noqa: E402
from pantarhei.feed import outbox, schema, subscriptions  # noqa: E402
from pantarhei.feed.mail import Letterhead  # noqa: E402

NOW = 1_770_000_000.0


@pytest.fixture
def head(store) -> Letterhead:
    return Letterhead("https://papers.example.org", store.secret)


@pytest.fixture
def ask(store, head):
    def call(email="ada@example.org", period="daily", kind="all", value="", now=NOW):
        with store.write() as c:
            return subscriptions.subscribe(c, head, email, period, kind, value, now=now)

    return call


def queued(store) -> list:
    with store.read() as c:
        return c.execute(sa.select(schema.outbox).order_by(schema.outbox.c.id)).all()


def token_of(row) -> str:
    text = message_from_bytes(row.message, policy=policy.default).get_body(("plain",))
    return re.search(r"/subscribe/confirm/(\S+)", text.get_content()).group(1)


def confirm(store, token, now=NOW + 60):
    with store.write() as c:
        return subscriptions.confirm(c, store.secret, token, now=now)


def leave(store, head, subscription, now=NOW + 120):
    token = subscriptions.unsubscribe_link(head, subscription).rpartition("/")[2]
    with store.write() as c:
        return subscriptions.unsubscribe(c, store.secret, token, now=now)


def active(store):
    with store.read() as c:
        return subscriptions.active(c)


def test_asked_confirmed_ended(store, head, ask):
    assert ask(email=" Ada@Example.org ", kind="tag", value="Early exit")
    [row] = queued(store)
    assert row.recipient == "ada@example.org" and active(store) == []
    begun = confirm(store, token_of(row))
    assert (begun.kind, begun.value, begun.period) == ("tag", "early-exit", "daily")
    assert begun.active and begun.confirmed == begun.covered == NOW + 60
    assert confirm(store, token_of(row), now=NOW + 90) == begun, "twice is once"
    assert active(store) == [begun]
    ended = leave(store, head, begun)
    assert ended.ended == NOW + 120 and active(store) == []
    assert leave(store, head, begun, now=NOW + 999) == ended, "twice is once"


def test_an_old_confirmation_does_not_undo_the_end(store, head, ask):
    ask()
    token = token_of(queued(store)[0])
    leave(store, head, confirm(store, token))
    with pytest.raises(RequestError, match="spent"):
        confirm(store, token, now=NOW + 180)
    assert active(store) == []


def test_begun_anew(store, head, ask):
    ask()
    first = confirm(store, token_of(queued(store)[0]))
    leave(store, head, first)
    assert ask(now=NOW + 3600) and active(store) == []
    old, new = map(token_of, queued(store))
    with pytest.raises(RequestError):
        confirm(store, old, now=NOW + 3601)
    again = confirm(store, new, now=NOW + 3601)
    assert again.id == first.id and again.covered == NOW + 3601
    assert leave(store, head, first).ended, "a link in an old digest ends it still"


def test_a_link_lasts_a_week(store, ask):
    ask()
    token = token_of(queued(store)[0])
    with pytest.raises(RequestError):
        confirm(store, token, now=NOW + 7 * 86400 + 1)
    assert confirm(store, token, now=NOW + 7 * 86400).active


def test_links_that_are_not_ours_do_nothing(store, head, ask):
    ask()
    token = token_of(queued(store)[0])
    foreign = subscriptions._confirming("another secret").dumps([1, NOW])
    ending = subscriptions._ending(store.secret).dumps([1, "x"])
    for wrong in ("", "x", token[:-1], token[1:], foreign, ending, "é" * 9, "a" * 10**5, "\0"):
        with pytest.raises(RequestError):
            confirm(store, wrong)
    with pytest.raises(RequestError), store.write() as c:
        subscriptions.unsubscribe(c, store.secret, token)  # signed for something else
    with store.write() as c:  # signed by us, for somebody whose row is another's by now
        assert subscriptions.unsubscribe(c, store.secret, ending) is None
    assert not active(store)
    assert confirm(store, token).active


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"email": "ada"}, "not an e-mail address"),
        ({"email": "ada@example.org\r\nBcc: ben@example.org"}, "not an e-mail address"),
        ({"period": "weekl"}, "Did you mean 'weekly'"),
        ({"kind": "everything\r\n"}, "Unknown kind"),
        ({"kind": "wing", "value": "computer"}, "Did you mean 'compute'"),
        ({"kind": "tag", "value": "a\r\nb: c"}, "is not a tag"),
        ({"kind": "tag", "value": ""}, "is not a tag"),
        ({"kind": "search", "value": " \r\n "}, "1 to 200 characters"),
        ({"kind": "search", "value": "x" * 201}, "1 to 200 characters"),
    ],
)
def test_what_cannot_be_subscribed_to(store, ask, given, said):
    with pytest.raises(RequestError, match=said):
        ask(**given)
    assert queued(store) == []
    with store.read() as c:
        assert c.execute(sa.select(schema.subscriptions)).all() == []


def test_a_query_is_one_line(store, ask):
    ask(kind="search", value="early\r\nBcc: ben@example.org\0\tÜbung")
    [row] = queued(store)
    message = message_from_bytes(row.message, policy=policy.default)
    assert message["bcc"] is None and message["to"] == "ada@example.org"
    assert "“early Bcc: ben@example.org Übung”" in message["subject"]
    assert confirm(store, token_of(row)).value == "early Bcc: ben@example.org Übung"


def test_asking_again_soon_sends_nothing(store, ask):
    assert ask() and not ask(now=NOW + 599)
    assert ask(now=NOW + 601)
    first, second = queued(store)
    assert token_of(first) == token_of(second), "whichever message is opened works"


def test_who_has_it_is_not_asked_again(store, ask):
    ask()
    confirm(store, token_of(queued(store)[0]))
    assert not ask(now=NOW + 10**6) and len(queued(store)) == 1


def test_nobodys_mailbox_is_filled(store, ask):
    for number in range(subscriptions.PER_DAY):
        assert ask(email=f"ada+{number}@example.org", kind="tag", value=f"t{number}")
    with pytest.raises(RequestError, match="tomorrow"):
        ask(email="Ada+more@example.org")
    assert len(queued(store)) == subscriptions.PER_DAY
    assert ask(email="ben@example.org"), "others are not concerned"
    assert ask(email="ada@example.org", now=NOW + 86401)


def test_what_waits_for_an_ended_subscription_is_not_sent(store, head, ask):
    ask()
    begun = confirm(store, token_of(queued(store)[0]))
    with store.write() as c:
        other = head.link("x")
        for key in (f"digest/{begun.id}/2026-02-02", f"digest/{begun.id}1/2026-02-02"):
            made = outbox_message(head, other)
            outbox.put(c, key, begun.email, made, secret=head.secret, now=NOW)
    leave(store, head, begun)
    keys = [row.key for row in queued(store)][1:]
    assert keys == [f"digest/{begun.id}1/2026-02-02"]


def outbox_message(head, link):
    from pantarhei.feed import mail

    return mail.message(head, "ada@example.org", "s", "t", "h", unsubscribe=link)


def test_a_strangers_address_is_forgotten(store, head, ask):
    ask()
    ask(email="ben@example.org", now=NOW + 86400)
    confirm(store, token_of(queued(store)[1]), now=NOW + 86401)
    with store.write() as c:
        subscriptions.forget(c, now=NOW + 8 * 86400)
        emails = c.scalars(sa.select(schema.subscriptions.c.email)).all()
    assert emails == ["ben@example.org"]


def test_those_of_an_address(store, ask):
    ask()
    ask(period="weekly")
    confirm(store, token_of(queued(store)[1]))
    with store.read() as c:
        assert [s.period for s in subscriptions.of(c, "ADA@example.org")] == ["weekly"]
        assert subscriptions.of(c, "ben@example.org") == []
