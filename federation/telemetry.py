"""Traces and metrics by OpenTelemetry: named here, sent only where somebody asked for them.

Nothing is needed to run. `OTEL_EXPORTER_OTLP_ENDPOINT` sends traces and metrics to a
collector; `MULTITWIN_TRACE_FILE` and `MULTITWIN_METRICS_FILE` append them to a file as JSON
lines, which several processes may share.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from opentelemetry import metrics, trace

from federation.core.critical import CriticalPath
from federation.errors import Reason, ScenarioError

tracer = trace.get_tracer("multitwin")
_meter = metrics.get_meter("multitwin")

step_duration = _meter.create_histogram(
    "multitwin.step.duration", unit="s", description="From a grant to its answer, per frame"
)
run_lag = _meter.create_histogram(
    "multitwin.run.lag",
    unit="s",
    description="Simulated time between the foremost member and the settled time",
)
pace_lag = _meter.create_histogram(
    "multitwin.pace.lag", unit="s", description="How late a grant was by the wall clock of its run"
)
clock_offset = _meter.create_gauge(
    "multitwin.member.clock.offset", unit="s", description="A member's clock less the broker's"
)
round_trip = _meter.create_gauge(
    "multitwin.member.round_trip", unit="s", description="To a member's process and back"
)
solve_duration = _meter.create_histogram(
    "multitwin.plan.solve.duration", unit="s", description="One solve of the joint model"
)


def path_attributes(path: CriticalPath) -> dict[str, float | list[str]]:
    """A run's critical path as attributes of its span: seconds, and the longest frames in words."""
    name = "multitwin.critical_path"
    found: dict[str, float | list[str]] = {
        f"{name}.{part}_s": getattr(path, f"{part}_s")
        for part in ("coordinator", "store", "pace", "opening", "closing")
    }
    found |= {f"{name}.member.{share.member}_s": share.seconds for share in path.members}
    found[f"{name}.holds"] = [
        f"{h.holder} held back {h.held} {h.frames} times, {h.seconds:.6f} s" for h in path.holds
    ]
    found[f"{name}.longest"] = [
        f"{f.holder} at {f.time_ns} ns, {f.seconds:.6f} s" for f in path.longest
    ]
    return found


def is_tracing() -> bool:
    """Whether this process has a provider of traces; without one, spans are not worth making."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def configure(service: str) -> None:
    """Start exporting for this process, if the environment asks for it.

    `service` becomes `service.name`. Raises MISSING_EXTRA when it asks for what is not
    installed.
    """
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    trace_file = os.environ.get("MULTITWIN_TRACE_FILE")
    metrics_file = os.environ.get("MULTITWIN_METRICS_FILE")
    if not (endpoint or trace_file or metrics_file):
        return
    try:
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import (
            ConsoleMetricExporter,
            MetricReader,
            PeriodicExportingMetricReader,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
    except ImportError:
        raise ScenarioError(
            Reason.MISSING_EXTRA, "exporting traces needs multitwin[telemetry]"
        ) from None
    resource = Resource.create({"service.name": service, "process.pid": os.getpid()})
    traces = TracerProvider(resource=resource)
    readers: list[MetricReader] = []
    if endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        readers.append(PeriodicExportingMetricReader(OTLPMetricExporter()))
    if trace_file:
        exporter = ConsoleSpanExporter(out=_lines(trace_file), formatter=_one_line)
        traces.add_span_processor(BatchSpanProcessor(exporter))
    if metrics_file:
        sink = ConsoleMetricExporter(out=_lines(metrics_file), formatter=_one_line)
        readers.append(PeriodicExportingMetricReader(sink))
    trace.set_tracer_provider(traces)
    if readers:
        metrics.set_meter_provider(MeterProvider(readers, resource))


def flush() -> None:
    """Send what is still held back; call before a process ends."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        shutdown = getattr(provider, "shutdown", None)
        if shutdown is not None:
            try:
                shutdown()
            except Exception as error:
                print(f"telemetry was not sent: {error}", file=sys.stderr)


def _lines(path: str) -> Any:
    return open(path, "a", buffering=1, encoding="utf-8")


def _one_line(item: Any) -> str:
    text: str = item.to_json(indent=None)
    return text + "\n"
