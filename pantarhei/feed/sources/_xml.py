"""Reading XML that a stranger wrote."""

from __future__ import annotations

from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from pantarhei.feed.sources.fetch import Unreadable


def parse(data: bytes, root: str) -> Element:
    """Parse a document whose root element is ``root``.

    No document type is accepted at all, so that no entity can expand or reach outside. Raises
    :class:`Unreadable` for whatever is not well-formed, or something else.
    """
    try:
        found: Element = fromstring(data, forbid_dtd=True)
    except DefusedXmlException as error:
        raise Unreadable("its XML declares a document type, which is not accepted") from error
    except (ParseError, ValueError, LookupError) as error:  # an unknown encoding is a LookupError
        raise Unreadable("its XML is damaged or breaks off") from error
    if found.tag != root:
        raise Unreadable("its XML is of another kind than was asked for")
    return found


def text(parent: Element, path: str) -> str:
    """Return the text of the first element at ``path``, or ``""``."""
    return parent.findtext(path) or ""
