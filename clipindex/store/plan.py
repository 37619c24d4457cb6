"""What is left to do: the shards that a run was given, beside those that are published."""

from collections.abc import Sequence
from dataclasses import dataclass

from clipindex.errors import FingerprintError
from clipindex.store.dataset import Dataset, ShardRecord
from clipindex.types import Shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Shards of a run, sorted by what is to be done with them."""

    todo: Sequence[Shard]
    done: Sequence[Shard]
    """Published before."""
    changed: Sequence[Shard]
    """Published before from a source that has changed since; run again only on `refresh`."""


def plan_shards(shards: Sequence[Shard], published: dict[str, ShardRecord], dataset: Dataset, *, refresh: bool) -> Plan:
    """Sort shards by whether they are published, and from what they are now.

    Raises:
        FingerprintError: One was published by another model than the directory's.
    """
    todo: list[Shard] = []
    done: list[Shard] = []
    changed: list[Shard] = []
    for shard in shards:
        record = published.get(shard.name)
        if record is None:
            todo.append(shard)
            continue
        if record.fingerprint != dataset.model.fingerprint:
            raise FingerprintError(
                f"embeddings/{shard.name}.parquet is of another model ({record.fingerprint[:12]}) than its directory"
                f" ({dataset.model.fingerprint[:12]}); delete it and run again"
            )
        if (record.size, record.version) == (shard.size, shard.version):
            done.append(shard)
        else:
            (todo if refresh else changed).append(shard)
    return Plan(todo=todo, done=done, changed=changed)
