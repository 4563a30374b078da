"""Generated requests: what is served is what /openapi.json says, and nothing else."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings

from mic_supervisor.http.access import Access
from tests.unit.http import views_of
from tests.unit.http.ask import Site

TOKEN = "0123456789abcdef"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
QUICK = settings(max_examples=10, suppress_health_check=list(HealthCheck))

# 501 and 503 are described; the check for a defect's 500 takes them for one.
UNAVAILABLE = [schemathesis.checks.not_a_server_error]

good = schemathesis.openapi.from_asgi("/openapi.json", Site(views_of.good()).app)
bad = schemathesis.openapi.from_asgi("/openapi.json", Site(views_of.bad()).app)
early = schemathesis.openapi.from_asgi("/openapi.json", Site(views_of.published(None)).app)
guarded = schemathesis.openapi.from_asgi(
    "/openapi.json",
    Site(views_of.good(), access=Access(TOKEN.encode())).app,
    headers=AUTHORIZATION,
)


@good.parametrize()
@QUICK
def test_a_machine_as_it_should_be(case: schemathesis.Case) -> None:
    case.call_and_validate()


@bad.parametrize()
@QUICK
def test_a_machine_with_much_wrong(case: schemathesis.Case) -> None:
    case.call_and_validate(excluded_checks=UNAVAILABLE)


@early.parametrize()
@QUICK
def test_before_the_first_round(case: schemathesis.Case) -> None:
    case.call_and_validate(excluded_checks=UNAVAILABLE)


@guarded.parametrize()
@QUICK
def test_with_a_token(case: schemathesis.Case) -> None:
    case.call_and_validate(headers=AUTHORIZATION)
