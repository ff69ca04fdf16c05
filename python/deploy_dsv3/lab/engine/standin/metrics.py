"""LMDeploy's Prometheus metrics under their names, with what the stand-in can fill in."""

from __future__ import annotations

from typing import Any

import prometheus_client

_LABELS = ["model_name", "engine"]
# lmdeploy.messages.ResponseType
_REASONS = [
    "SUCCESS",
    "FINISH",
    "ENGINE_STOP_ERROR",
    "SESSION_REPEAT",
    "SESSION_NOT_EXIST",
    "HANDLER_NOT_EXIST",
    "INPUT_LENGTH_ERROR",
    "INTERNAL_ENGINE_ERROR",
    "CANCEL",
    "PREFIX_CACHE_CONFLICT",
    "NO_QUEUE",
    "NOT_SUPPORTED",
    "OUT_OF_MEMORY",
]

_GAUGES = {
    "num_requests_succeeded": "Number of current succeeded requests.",
    "num_requests_failed": "Number of current failed requests.",
    "num_api_requests_routed": "Number of requests routed to request handles.",
    "num_api_requests_waiting": "Number of requests waiting for free request handles.",
    "num_requests_running": "Number of requests in model execution batches.",
    "num_requests_waiting": "Number of requests waiting to be processed.",
    "gpu_cache_usage_perc": "GPU KV-cache usage. 1 means 100 percent usage.",
    "prefix_cache_hit_rate": "Prefix-cache hit rate. 1 means 100 percent of queried prefix tokens hit.",
    "spec_decode_mean_accept_rate": ("Mean speculative decoding acceptance rate. 1 means 100 percent accepted."),
    "spec_decode_mean_accept_length": ("Mean speculative decoding acceptance length, including the bonus token."),
}
_COUNTERS = {
    "prompt_tokens_total": "Number of prefill tokens processed.",
    "generation_tokens_total": "Number of generation tokens processed.",
    "cached_tokens_total": "Total prefix-cached input tokens served.",
    "spec_decode_num_drafts_total": "Number of speculative decoding drafts.",
    "spec_decode_num_draft_tokens_total": "Number of speculative decoding draft tokens.",
    "spec_decode_num_accepted_tokens_total": "Number of speculative decoding accepted tokens.",
}
_SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000]
_RATIOS = [tenth / 10 for tenth in range(11)]
_STEPS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
_FIRST = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0 160.0 640.0 2560.0"
_TOKEN = "0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
_REQUEST = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0 960.0 1920.0 7680.0"
_HISTOGRAMS: dict[str, tuple[str, list[Any]]] = {
    "request_prompt_tokens": ("Number of prefill tokens processed.", _SIZES),
    "request_generation_tokens": ("Number of generation tokens processed.", _SIZES),
    "request_cached_tokens": ("Number of prefix-cached input tokens per request.", _SIZES),
    "request_cache_hit_ratio": (
        "Prefix cache hit ratio (cached_tokens / prompt_tokens) per request.",
        _RATIOS,
    ),
    "iteration_tokens_total": ("Histogram of number of tokens per engine_step.", _STEPS),
    "time_to_first_token_seconds": ("Histogram of time to first token in seconds.", _FIRST.split()),
    "time_per_output_token_seconds": ("Histogram of time per output token in seconds.", _TOKEN.split()),
    "iter_token_latency": ("Histogram of inter-token latency", _TOKEN.split()),
    "e2e_request_latency_seconds": ("Histogram of e2e request latency in seconds.", _REQUEST.split()),
    "request_queue_time_seconds": ("Histogram of time spent in WAITING phase for request.", _REQUEST.split()),
    "request_inference_time_seconds": (
        "Histogram of time spent in RUNNING phase for request.",
        _REQUEST.split(),
    ),
    "request_prefill_time_seconds": (
        "Histogram of time spent in PREFILL phase for request.",
        _REQUEST.split(),
    ),
    "request_decode_time_seconds": ("Histogram of time spent in DECODE phase for request.", _REQUEST.split()),
}


class Metrics:
    """All series of one engine, in a registry."""

    def __init__(self, model_name: str, registry: prometheus_client.CollectorRegistry) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        values = (model_name, "0")
        prometheus_client.Info("lmdeploy:backend_config", "information of backend_config", registry=registry)
        self._gauge = {
            name: prometheus_client.Gauge(f"lmdeploy:{name}", text, _LABELS, registry=registry).labels(*values)
            for name, text in _GAUGES.items()
        }
        self._counter = {
            name: prometheus_client.Counter(f"lmdeploy:{name}", text, _LABELS, registry=registry).labels(*values)
            for name, text in _COUNTERS.items()
        }
        self._histogram = {
            name: prometheus_client.Histogram(
                f"lmdeploy:{name}", text, _LABELS, buckets=[float(edge) for edge in edges], registry=registry
            ).labels(*values)
            for name, (text, edges) in _HISTOGRAMS.items()
        }
        for kind, name, text in (
            (
                prometheus_client.Counter,
                "spec_decode_num_accepted_tokens_per_pos_total",
                "Number of accepted speculative decoding tokens per draft position.",
            ),
            (
                prometheus_client.Gauge,
                "spec_decode_per_position_accept_rate",
                "Speculative decoding acceptance rate per draft position. 1 means 100 percent accepted.",
            ),
        ):
            kind(f"lmdeploy:{name}", text, [*_LABELS, "position"], registry=registry)
        success = prometheus_client.Counter(
            "lmdeploy:request_success_total",
            "Count of successfully processed requests.",
            [*_LABELS, "finished_reason"],
            registry=registry,
        )
        self._success = {reason: success.labels(*values, f"ResponseType.{reason}") for reason in _REASONS}

    def schedule(self, *, running: int, waiting: int) -> None:
        self._gauge["num_requests_running"].set(running)
        self._gauge["num_requests_waiting"].set(waiting)

    def iteration(self, *, prompt_tokens: int, since_arrival: float | None, since_last: float | None) -> None:
        """One token of one request came out; times in seconds."""
        self._counter["prompt_tokens_total"].inc(prompt_tokens)
        self._counter["generation_tokens_total"].inc()
        self._histogram["iteration_tokens_total"].observe(prompt_tokens + 1)
        if since_arrival is not None:
            self._histogram["time_to_first_token_seconds"].observe(since_arrival)
        if since_last is not None:
            self._histogram["time_per_output_token_seconds"].observe(since_last)
            self._histogram["iter_token_latency"].observe(since_last)

    def finish(self, *, prompt_tokens: int, generated: int, queued_s: float, prefill_s: float, total_s: float) -> None:
        """One request is done."""
        self._success["FINISH"].inc()
        self._gauge["num_requests_succeeded"].inc()
        for name, value in {
            "e2e_request_latency_seconds": total_s,
            "request_queue_time_seconds": queued_s,
            "request_prefill_time_seconds": prefill_s,
            "request_inference_time_seconds": total_s - queued_s,
            "request_decode_time_seconds": total_s - queued_s - prefill_s,
            "request_prompt_tokens": prompt_tokens,
            "request_generation_tokens": generated,
            "request_cached_tokens": 0,
            "request_cache_hit_ratio": 0,
        }.items():
            self._histogram[name].observe(value)
