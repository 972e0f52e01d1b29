"""Schemathesis over the API's own description: nothing breaks it, and it says what it does."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from _reading import client, filled

from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from schemathesis import checks  # noqa: E402
from schemathesis.specs.openapi import checks as said  # noqa: E402


@pytest.fixture(scope="module")
def described(tmp_path_factory) -> Any:
    with Store(tmp_path_factory.mktemp("openapi") / "feed.sqlite") as store:
        searcher = Searcher(filled(store))
        searcher.refresh()
        app = client(store, "reading", searcher=searcher).app
        here = {"host": "localhost"}
        yield schemathesis.openapi.from_asgi("/api/openapi.json", app, headers=here)
        searcher.close()


def test_no_request_breaks_it(described):
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 11
    for operation in operations:
        _fuzz(operation)


def _fuzz(operation: Any) -> None:
    @hypothesis.given(case=operation.as_strategy())
    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def fuzz(case: Any) -> None:
        case.headers = {**(case.headers or {}), "host": "localhost"}
        case.call_and_validate(
            checks=[
                checks.not_a_server_error,
                said.status_code_conformance,
                said.content_type_conformance,
                said.response_schema_conformance,
            ]
        )

    fuzz()
