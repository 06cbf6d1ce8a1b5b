"""A twin written with nothing but the protos and grpcio, as one in another language would be.

Two reservoirs fill with their inflow and spill what they can't hold. Run it with
`python tests/rawtwin.py --port 0`; it says on stderr where it listens.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

from federation.v1 import error_pb2, twin_pb2, twin_pb2_grpc

HOUR_NS = 3_600_000_000_000
CAPACITY_M3 = 100.0

DESCRIPTION = twin_pb2.Description(
    model="raw-reservoirs",
    version="1",
    domain="water",
    entities=[twin_pb2.Entity(id="R1", kind="tank"), twin_pb2.Entity(id="R2", kind="tank")],
    variables=[
        twin_pb2.Variable(
            name="inflow", kind="tank", unit="m^3/h", causality=twin_pb2.Variable.CAUSALITY_INPUT
        ),
        twin_pb2.Variable(
            name="volume", kind="tank", unit="m^3", causality=twin_pb2.Variable.CAUSALITY_OUTPUT
        ),
    ],
    time=twin_pb2.TimePolicy(period_ns=HOUR_NS),
    parameters=[
        twin_pb2.Parameter(name="start_m3", unit="m^3", default_value=10.0),
        twin_pb2.Parameter(name="think_s", unit="s", default_value=0.0, doc="real time per step"),
    ],
)


class Reservoirs:
    """One session. The answer to the last frame is kept, in case it is asked for again."""

    def __init__(self) -> None:
        self.frame = 0
        self.epoch = 0
        self.answer = twin_pb2.SessionResponse()
        self.member = ""
        self.think_s = 0.0
        self.time_ns = 0
        self.serial = 0
        self.inflow = [0.0, 0.0]
        self.causes: dict[int, list[str]] = {}
        self.volume = [0.0, 0.0]

    def handle(self, request: twin_pb2.SessionRequest) -> twin_pb2.SessionResponse:
        if request.frame == self.frame and request.epoch >= self.epoch:
            return self.answer
        if request.frame != self.frame + 1 or request.epoch < self.epoch:
            stale = request.epoch < self.epoch
            return _failed(
                request,
                "STALE_EPOCH" if stale else "INVALID_FRAME",
                "not now",
                expected_frame=str(self.frame + 1),
            )
        answer = twin_pb2.SessionResponse(session=request.session, frame=request.frame)
        match request.WhichOneof("command"):
            case "open":
                self.open(request.open)
                answer.opened.SetInParent()
            case "advance":
                answer.advanced.results.extend(self.step(s) for s in request.advance.steps)
            case "close":
                answer.closed.SetInParent()
            case command:
                answer = _failed(request, "UNSUPPORTED", f"a raw twin has no {command}")
        self.frame, self.epoch, self.answer = request.frame, request.epoch, answer
        return answer

    def open(self, given: twin_pb2.SessionRequest.Open) -> None:
        values = {p.name: p.default_value for p in DESCRIPTION.parameters}
        values.update(given.parameters)
        self.member = given.member
        self.time_ns = given.start_ns
        self.think_s = values["think_s"]
        self.volume = [values["start_m3"]] * 2

    def step(self, step: twin_pb2.StepInput) -> twin_pb2.StepResult:
        time.sleep(self.think_s)
        hours = (step.time_ns - self.time_ns) / HOUR_NS
        self.time_ns = step.time_ns
        result = twin_pb2.StepResult(time_ns=step.time_ns, micro=step.micro)
        for causes in step.causes:
            for index in causes.indices:
                self.causes[index] = []
            for index, cause in zip(causes.indices, causes.events, strict=True):
                if cause:
                    self.causes[index].append(cause)
        for tank in range(2):
            before = self.volume[tank]
            self.volume[tank] = min(before + self.inflow[tank] * hours, CAPACITY_M3)
            if before < CAPACITY_M3 <= self.volume[tank]:
                self.serial += 1
                event = result.events.add(
                    id=f"{self.member}/{self.serial}",
                    time_ns=step.time_ns,
                    kind="reservoir_full",
                    entity=f"R{tank + 1}",
                    text=f"R{tank + 1} spills.",
                    causes=self.causes.get(tank, []),
                )
                result.causes.add(variable="volume", indices=[tank], events=[event.id])
        for values in step.inputs:
            self.inflow = list(struct.unpack("<2d", values.values))
        result.outputs.add(variable="volume", values=struct.pack("<2d", *self.volume))
        return result


def _failed(
    request: twin_pb2.SessionRequest, reason: str, message: str, **metadata: str
) -> twin_pb2.SessionResponse:
    return twin_pb2.SessionResponse(
        session=request.session,
        frame=request.frame,
        error=error_pb2.Error(reason=reason, message=message, metadata=metadata),
    )


class RawTwin(twin_pb2_grpc.TwinServicer):
    """Of the first contract: it does not know ReadClock, and gRPC answers UNIMPLEMENTED for it."""

    def __init__(self) -> None:
        self.sessions: dict[str, Reservoirs] = {}

    def Describe(  # noqa: N802
        self, request: twin_pb2.DescribeRequest, context: grpc.ServicerContext
    ) -> twin_pb2.DescribeResponse:
        return twin_pb2.DescribeResponse(description=DESCRIPTION)

    def Session(  # noqa: N802
        self, request_iterator: Iterator[twin_pb2.SessionRequest], context: grpc.ServicerContext
    ) -> Iterator[twin_pb2.SessionResponse]:
        for request in request_iterator:
            yield self.sessions.setdefault(request.session, Reservoirs()).handle(request)

    def Flexibility(  # noqa: N802
        self, request: twin_pb2.FlexibilityRequest, context: grpc.ServicerContext
    ) -> twin_pb2.FlexibilityResponse:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "a raw twin has nothing to offer")
        raise AssertionError("abort raises")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    twin_pb2_grpc.add_TwinServicer_to_server(RawTwin(), server)  # type: ignore[abstract]
    port = server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    server.start()
    print(f"serving raw at 127.0.0.1:{port}", file=sys.stderr, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
