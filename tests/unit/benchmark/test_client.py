"""The load generator against a real server, well and badly behaved."""

from __future__ import annotations

import asyncio
import resource
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from counterpart import Server

from deploy_dsv3.benchmark.client import Client, Endpoint, RowRun, Timeline, check_open_files
from deploy_dsv3.benchmark.figures import row_figures
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.workload import make_workload
from deploy_dsv3.errors import UnreachableError, UsageError

Serve = Callable[..., Server]


def measure(
    server: Server,
    *,
    api_key: str = "",
    ca_file: str = "",
    concurrency: int = 0,
    range_ratio: float = 0.0,
    **row: int,
) -> RowRun:
    shape = {"num_prompts": 24, "input_len": 16, "output_len": 12, **row}
    wanted = Row(**shape)  # type: ignore[arg-type]
    plan = Plan(profile="custom", rows=(wanted,), range_ratio=range_ratio)

    async def go() -> RowRun:
        async with Client(Endpoint(base_url=server.url, api_key=api_key, ca_file=ca_file)) as client:
            model = await client.find_model()
            return await client.run(model, make_workload(plan, wanted, None, None), concurrency=concurrency)

    return asyncio.run(asyncio.wait_for(go(), 60))


def ask_for_model(endpoint: Endpoint) -> str:
    async def go() -> str:
        async with Client(endpoint) as client:
            return await client.find_model()

    return asyncio.run(asyncio.wait_for(go(), 40))


def test_requests_are_upstreams(serve: Serve) -> None:
    server = serve(api_key="sk-one")
    run = measure(server, api_key="sk-one")
    assert not run.failures
    body = server.seen.bodies[0]
    assert {key: body[key] for key in ("model", "temperature", "stream", "ignore_eos")} == {
        "model": "dsv3",
        "temperature": 0.0,
        "stream": True,
        "ignore_eos": True,
    }
    assert len(body["prompt"].split()) <= 16
    assert server.seen.authorization == {"Bearer sk-one"}
    asked = sorted(body["max_tokens"] for body in server.seen.bodies)
    assert asked == sorted(outcome.asked_len for outcome in run.outcomes)


def test_times_are_what_the_server_takes(serve: Serve) -> None:
    # One token every 40 ms, for all streams at once.
    run = measure(serve(step_s=0.04), num_prompts=6, output_len=20)
    figures = row_figures(run)
    assert figures.itl_ms and figures.tpot_ms and figures.ttft_ms
    assert figures.itl_ms.p50 == pytest.approx(40, rel=0.25)
    assert figures.tpot_ms.p50 == pytest.approx(40, rel=0.25)
    assert figures.itl_ms.count == figures.total_output_tokens - 6
    longest = max(outcome.asked_len for outcome in run.outcomes)
    assert figures.duration == pytest.approx(0.04 * longest, rel=0.3)
    assert figures.counted_output_tokens == figures.total_output_tokens
    assert sum(run.timeline.events) == figures.total_output_tokens


def test_all_requests_go_at_once_or_as_many_as_allowed(serve: Serve) -> None:
    free = serve(step_s=0.02)
    assert max(measure(free, num_prompts=60).timeline.open) == 60
    held = serve(step_s=0.005)
    run = measure(held, num_prompts=60, concurrency=7)
    assert len(run.outcomes) == 60
    assert not run.failures
    # The probe for the model has a connection too.
    assert held.seen.most_open <= 8


def test_half_of_the_requests_fail_and_none_of_them_is_averaged_in(serve: Serve) -> None:
    run = measure(serve(fail_every=2), num_prompts=200)
    figures = row_figures(run)
    assert (figures.completed, figures.failed) == (100, 100)
    assert dict(run.failures) == {"HTTP 500 engine error": 100}
    good = [outcome for outcome in run.outcomes if not outcome.error]
    assert figures.total_output_tokens == sum(outcome.asked_len for outcome in good)
    assert figures.e2e_ms is not None
    assert figures.e2e_ms.count == 100
    assert not run.gone


def test_requests_that_are_refused_at_once_do_not_end_a_row_that_is_served(serve: Serve) -> None:
    """Hundreds of failures before the first success ends: the service is asked, and goes on being measured."""
    # Range ratio 1: every answer takes the 20 steps, so none of them can end among the refusals.
    run = measure(serve(fail_every=2, step_s=0.1), num_prompts=400, output_len=20, range_ratio=1.0)
    assert not run.gone
    first_success = next(place for place, outcome in enumerate(run.outcomes) if not outcome.error)
    assert first_success > 64
    assert (row_figures(run).completed, row_figures(run).failed) == (200, 200)


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ({"break_every": 3}, "the connection broke while the answer streamed"),
        ({"error_event_every": 3}, "the stream broke off: out of memory"),
    ],
)
def test_streams_that_end_badly_are_failures(serve: Serve, behaviour: dict[str, int], told: str) -> None:
    run = measure(serve(**behaviour), num_prompts=30, output_len=40)
    assert dict(run.failures) == {told: 10}
    figures = row_figures(run)
    assert figures.completed == 20
    assert figures.itl_ms is not None
    assert figures.itl_ms.count == figures.total_output_tokens - 20  # no interval of a failed request


def test_a_row_whose_endpoint_vanishes_stops(serve: Serve) -> None:
    run = measure(serve(step_s=0.002, vanish_after=40), num_prompts=3000, concurrency=16)
    assert "64 requests in a row failed (cannot connect (Connect" in run.gone
    assert "and then http://127.0.0.1" in run.gone
    assert len(run.outcomes) < 400
    assert sum(1 for outcome in run.outcomes if not outcome.error) > 0


def test_fewer_tokens_than_asked_for_show_in_the_servers_count(serve: Serve) -> None:
    figures = row_figures(measure(serve(uncounted=1), num_prompts=10))
    assert figures.counted_output_tokens == figures.total_output_tokens - 10


def test_a_missing_and_a_wrong_key_are_told_apart(serve: Serve) -> None:
    server = serve(api_key="sk-right")
    with pytest.raises(UsageError, match="HTTP 401, the API key is wrong") as wrong:
        ask_for_model(Endpoint(base_url=server.url, api_key="sk-wrong"))
    assert "sk-wrong" not in str(wrong.value) + wrong.value.remedy
    assert "--api-key-file" in wrong.value.remedy
    with pytest.raises(UsageError, match="the API key is missing"):
        ask_for_model(Endpoint(base_url=server.url))


def test_nobody_there_loading_and_something_else_are_told_apart(serve: Serve) -> None:
    with pytest.raises(UnreachableError, match=r"/v1/models: cannot connect \(Connect"):
        ask_for_model(Endpoint(base_url="http://127.0.0.1:9"))
    with pytest.raises(UnreachableError, match="HTTP 503 loading weights"):
        ask_for_model(Endpoint(base_url=serve(loading=True).url))
    with pytest.raises(UnreachableError, match="HTTP 404"):
        ask_for_model(Endpoint(base_url=serve().url + "/somewhere"))


def test_a_model_that_is_not_served_is_refused(serve: Serve) -> None:
    server = serve()
    assert ask_for_model(Endpoint(base_url=server.url)) == "dsv3"
    with pytest.raises(UsageError, match="model 'other' is not served; served: dsv3"):
        ask_for_model(Endpoint(base_url=server.url, model="other"))


def test_a_warm_up_that_fails_is_told(serve: Serve) -> None:
    server = serve(fail_every=1)
    row = Row(num_prompts=1, input_len=4, output_len=4)
    request = make_workload(Plan(profile="custom", rows=(row,)), row, None, None).requests[0]

    async def go() -> None:
        async with Client(Endpoint(base_url=server.url)) as client:
            await client.warm_up("dsv3", request)

    with pytest.raises(UnreachableError, match="the warm-up request failed: HTTP 500 engine error"):
        asyncio.run(go())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {cert} "
        "-days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    return cert, key


def test_tls_is_verified_with_the_ca_that_was_given(
    serve: Serve, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = serve(tls=context)
    assert not measure(server, ca_file=str(certificate[0])).failures
    with pytest.raises(UsageError, match="the certificate is not trusted") as refused:
        ask_for_model(Endpoint(base_url=server.url))
    assert "--ca-file" in refused.value.remedy
    with pytest.raises(UsageError, match=r"CA file .*: No such file"):
        ask_for_model(Endpoint(base_url=server.url, ca_file=str(tmp_path / "absent.pem")))


def test_more_connections_than_files_are_refused_before_any_is_opened() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        check_open_files(1_000_000)
        return
    with pytest.raises(UsageError, match=f"this process may open {hard} files") as refused:
        check_open_files(hard)
    assert "ulimit -n" in refused.value.remedy
    check_open_files(100)


def test_a_timeline_keeps_its_size_and_its_sums() -> None:
    timeline = Timeline(most=8, bin_s=1.0)
    for second in range(100):
        timeline.opened(second)
        timeline.received(second, 3)
        if second % 2:
            timeline.ended(second, failed=second % 10 == 9)
    assert timeline.bin_s == 16.0
    assert timeline.events == [48] * 6 + [12]
    assert (sum(timeline.completed), sum(timeline.failed), timeline.in_flight) == (40, 10, 50)
    # Before second 15 ends its request, 9 are open, and so on by 8 for each bin of 16 s.
    assert timeline.open == [9, 17, 25, 33, 41, 49, 51]
