"""``restore STORE``: a store begins anew, with all that the journal still has; for a loss, or a new backend.

Nothing is stored here. What the store has is put away, and it is registered where the journal begins; when
the aggregator runs again, the store follows from there as it always does, beside the others and the intake;
``status`` and the log tell how far it is. So it is exact: each retained row once, and a mark for each stream
that says what is older. An end in between does no harm: call it again.
"""

from __future__ import annotations

from edgedaq.errors import ConfigError, StoreError, nearest
from edgedaq.registry import load_class
from edgedaq.runtime_dir import InstanceLock, remove
from edgedaq.segment_file import list_segments
from edgedaq.segment_pool import take_directory
from edgedaq.storage import OsStorage
from edgedaq.units import format_bytes

from edgedaq_aggregator.app import Aggregator
from edgedaq_aggregator.journal_registry import StoreRegistry
from edgedaq_aggregator.stores.base import DAQJobStore
from edgedaq_aggregator.stores.reader import StorePlace

__all__ = ["restore"]


def restore(aggregator: Aggregator, store: str) -> str:
    """Let a store begin anew; return what was done, in words.

    Raises:
        ConfigError: There is no such store in the directory, or the aggregator runs.
        StoreError: The store cannot be restored in its place, or the disk does not take it.
    """
    place = aggregator.place
    stores = {file.unique_id: file for file in aggregator.files if file.is_store}
    if store not in stores:
        known = ", ".join(sorted(stores)) or "none"
        message = f"{place.config_dir}: has no store {store!r}{nearest(store, stores)}; there are: {known}"
        raise ConfigError(message)
    kind = load_class(stores[store].target, place.config_dir)
    if not issubclass(kind, DAQJobStore):
        message = f"{stores[store].path}: {kind.__name__} follows no journal"
        raise ConfigError(message)
    storage, journal_dir = OsStorage(), place.state_dir / "journal"
    with InstanceLock(place.runtime_dir):
        try:
            lock = take_directory(storage, journal_dir)
            try:
                firsts = list_segments(storage, journal_dir)
                if not firsts:
                    message = f"{journal_dir}: holds nothing to store again"
                    raise StoreError(message)
                registry = StoreRegistry(journal_dir, storage=storage)
                registry.positions[store] = firsts[0]
                registry.save()
                own = StorePlace(store, place.state_dir / "stores" / store, place.out_dir)
                moved = kind.put_away(own)
            finally:
                storage.close(lock)
        finally:
            remove(place.runtime_dir)
    held = sum((journal_dir / name).stat().st_size for name in storage.names(journal_dir) if ".seg" in name)
    lines = [f"{path}: put away" for path in moved]
    lines.append(
        f"{store}: stores again what the journal has (at most {format_bytes(held)}, of all stores together) "
        f"as soon as the aggregator runs; status tells how far it is"
    )
    return "\n".join(lines)
