"""Events that come in as callbacks, read by many streams of one context."""

from benchmarks import backends, load
from benchmarks.backends import Backend
from benchmarks.callbacks import stores
from benchmarks.figures import Delivery, Results
from benchmarks.rig import Rig


def measure(rig: Rig, results: Results) -> None:
    size, names = rig.options.size, rig.names
    with stores(rig) as found, backends.nchan(rig) as nchan:
        if not nchan:
            results.notes.append("nchan is not installed here, so streams are not compared with it.")
        for rate in size.stream_rates:
            for _ in rig.rounds(size.stream_rounds):
                for backend in (*found, *nchan):
                    context_id = f"{names.followed_context}1"
                    delivery = _delivered(rig, backend, context_id, rate)
                    results.deliveries[rate][backend.name].append(delivery)
                    rig.say(
                        f"streams, {rate} events a second: {backend.name} p50 {delivery.p50_ms:.1f} ms, "
                        f"p99 {delivery.p99_ms:.1f} ms, {delivery.delivered} of {delivery.expected} delivered, "
                        f"{delivery.errors} errors"
                    )


def _delivered(rig: Rig, backend: Backend, context_id: str, rate: int) -> Delivery:
    try:
        return load.deliver(rig, backend, context_id, rig.names.followed_run, rate)
    except load.LoadFailed as error:
        # The others are measured all the same.
        rig.say(f"{backend.name}: {error}")
        size = rig.options.size
        return Delivery(0, size.streams * size.stream_seconds * rate, 0, 0, errors=1)
