"""What a run will read, told before it is queued: from indexes and the plan's own arithmetic, never from pixels."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synthos.batch import Input
from synthos.data.buckets import BucketFill, bucket_sizes, fills
from synthos.data.index import open_index
from synthos.data.mixture import weight_schedule
from synthos.data.plan import Planner
from synthos.data.selection import choose, sized_input
from synthos.data.shelf import Shelf
from synthos.data.source import Source, open_split
from synthos.data.store.files import RANGE_BYTES, Storage
from synthos.data.store.location import is_remote
from synthos.data.stream import build_planner
from synthos.schema import RunConfig


@dataclass(frozen=True)
class SourceForecast:
    name: str
    samples: int  # trained on
    held_out: int
    faulty: int  # can't be used
    known_bad: int  # left out because data.known_bad, or img2dataset's own table, names them
    shards: int
    bytes: int  # of its tars
    weights: dict[int, float]  # wanted share of the samples, from which step on
    share: float  # of the first epoch of the run
    epochs: float  # of its own, in that one


@dataclass(frozen=True)
class BucketForecast:
    height: int  # pixels
    width: int
    samples: float  # expected in an epoch of the run
    cropped: float  # mean share of a picture's area that is cut off
    enlarged: float  # share of its pictures that are smaller than it
    epochs_per_batch: float | None  # until it fills a global batch; None where it never does


@dataclass(frozen=True)
class NodeForecast:
    """What one node of the run reads in an epoch, about."""

    samples: float
    shards: int
    bytes: int  # over the network or from disk
    requests: int  # GETs of remote shards, at most
    lanes: int
    cache_bytes: int  # that the shards of one window of its lanes take; 0 where none is cached


@dataclass(frozen=True)
class Forecast:
    samples: int  # an epoch of the run
    held_out: int  # of all sources, or in data.validation
    batches: float  # an epoch
    batch_size: int
    ranks: int
    per_rank: float  # samples of an epoch
    lanes: int
    tail: str
    left_over: float  # samples of an epoch that fill no batch; with buckets of each bucket
    sources: list[SourceForecast]
    buckets: list[BucketForecast]  # none where a recipe reads no picture
    node: NodeForecast
    cache_limit: int | None  # bytes

    def notes(self) -> list[str]:
        """What is better known before a job waits in a queue."""
        notes = []
        for bucket in self.buckets:
            if bucket.epochs_per_batch is not None and bucket.epochs_per_batch > 1:
                when = f"after {bucket.epochs_per_batch:.3g} epochs"
                notes.append(f"bucket {bucket.height} x {bucket.width} starves: it fills its first batch {when}")
        empty = [f"{bucket.height} x {bucket.width}" for bucket in self.buckets if bucket.epochs_per_batch is None]
        if empty:
            notes.append(f"no picture is nearest to {', '.join(empty)}")
        if self.tail == "drop" and self.left_over:
            notes.append(f"data.tail=drop leaves {self.left_over:,.0f} of {self.samples:,} samples out of each epoch")
        if self.cache_limit is not None and self.cache_limit < 2 * self.node.cache_bytes:
            notes.append(
                f"data.cache_gb {self.cache_limit / 1e9:g} is below the {2 * self.node.cache_bytes / 1e9:.3g} of two "
                "windows: shards may be fetched more than once in an epoch, or read by ranges"
            )
        return notes


@dataclass
class _Measured:
    """What is trained on of one source."""

    bytes: int  # of the members that are read
    widths: NDArray[np.int32]  # of the picture that decides the bucket, [N]
    heights: NDArray[np.int32]


def forecast(config: RunConfig, inputs: Mapping[str, Input], storage: Storage | None = None) -> Forecast:
    """Plan as a run would; indexes that are missing are built. ValueError as `open_split` and `build_planner`."""
    storage = storage or Storage()
    training, held_out = open_split(config.data, inputs, storage)
    planner = build_planner(config.data, training, config.batch.size, config.seed)
    counts = planner.mixture.counts(planner.num_samples)  # of the first epoch
    measured = [_measure(source, inputs, storage) for source in training]
    buckets = _buckets(config, inputs, training, measured, counts)
    in_buckets = [bucket.samples for bucket in buckets] or [float(planner.num_samples)]
    batches, left_over = _batches(planner, in_buckets)
    return Forecast(
        samples=planner.num_samples,
        held_out=sum(map(len, held_out)),
        batches=batches,
        batch_size=config.batch.size,
        ranks=config.ranks,
        per_rank=planner.num_samples / config.ranks,
        lanes=planner.orders[0].lanes,
        tail=planner.tail,
        left_over=left_over,
        sources=_sources(config, training, counts),
        buckets=buckets,
        node=_node(config, training, measured, counts, planner),
        cache_limit=None if config.data.cache_gb is None else int(config.data.cache_gb * 1e9),
    )


def _measure(source: Source, inputs: Mapping[str, Input], storage: Storage) -> _Measured:
    sized = sized_input(inputs) if any(item.kind == "image" for item in inputs.values()) else None
    size, widths, heights = 0, [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    bounds = itertools.pairwise([0, *source.sizes.cumsum().tolist()])
    for place, (start, stop) in zip(source.places, bounds, strict=True):
        index = open_index(place, storage)
        rows = source.find(np.arange(start, stop))[1]
        read = {name: index.members[rows, choose(index, item)[rows]] for name, item in inputs.items()}
        size += sum(int(members["size"].sum()) for members in read.values())
        if sized is not None:
            widths.append(read[sized]["width"])
            heights.append(read[sized]["height"])
    return _Measured(size, np.concatenate(widths), np.concatenate(heights))


def _buckets(
    config: RunConfig,
    inputs: Mapping[str, Input],
    training: list[Source],
    measured: list[_Measured],
    counts: list[int],
) -> list[BucketForecast]:
    if not any(item.kind == "image" for item in inputs.values()):
        return []
    sizes = bucket_sizes(config.data)
    given = [source.selection.buckets for source in training]
    numbers = [np.zeros(len(s), np.uint8) if b is None else b for s, b in zip(training, given, strict=True)]
    widths, heights = (np.concatenate([getattr(m, edge) for m in measured]) for edge in ("widths", "heights"))
    expected = sum(
        np.bincount(n, minlength=len(sizes)) * (count / len(source))
        for source, n, count in zip(training, numbers, counts, strict=True)
    )
    found = fills(widths, heights, np.concatenate(numbers), sizes)
    return [_bucket(fill, float(each), config) for fill, each in zip(found, np.asarray(expected), strict=True)]


def _bucket(fill: BucketFill, samples: float, config: RunConfig) -> BucketForecast:
    enlarged = fill.enlarged / fill.samples if fill.samples else 0.0
    per_batch = config.batch.size / samples if samples else None
    return BucketForecast(fill.height, fill.width, samples, fill.cropped, enlarged, per_batch)


def _batches(planner: Planner, in_buckets: list[float]) -> tuple[float, float]:
    """Global batches of an epoch, and the samples left when all that are full have been taken."""
    size = planner.batch_size
    left_over = sum(samples % size for samples in in_buckets)
    if planner.tail == "carry":
        return planner.num_samples / size, left_over
    full = sum(int(samples // size) for samples in in_buckets)
    return full + (sum(samples % size > 0 for samples in in_buckets) if planner.tail == "pad" else 0), left_over


def _sources(config: RunConfig, training: list[Source], counts: list[int]) -> list[SourceForecast]:
    schedule = weight_schedule(config.data.mix, [len(source) for source in training])
    found = []
    for number, source in enumerate(training):
        selection = source.selection
        faulty = len({(fault.shard, fault.key) for fault in selection.faults})
        found.append(
            SourceForecast(
                name=source.name,
                samples=len(source),
                held_out=len(selection.held_out),
                faulty=faulty,
                known_bad=len(selection.left_out) - len(selection.held_out) - faulty,
                shards=len(source.places),
                bytes=sum(line.bytes for line in source.lines),
                weights={step: weights[number] / sum(weights) for step, weights in schedule.items()},
                share=counts[number] / sum(counts),
                epochs=counts[number] / len(source),
            )
        )
    return found


def _node(
    config: RunConfig, training: list[Source], measured: list[_Measured], counts: list[int], planner: Planner
) -> NodeForecast:
    """Lanes are dealt to nodes in turn, and a lane reads consecutive shards: a node reads its part of each source."""
    shelf = Shelf(config.data)
    lanes = -(-planner.orders[0].lanes // config.nodes)
    shards = size = requests = cached = 0
    for source, read, count in zip(training, measured, counts, strict=True):
        epochs = count / len(source)
        total = sum(line.bytes for line in source.lines)
        url = source.places[0].url
        own = min(len(source.places), -(-len(source.places) // config.nodes) + (config.nodes > 1))
        shards += own
        if shelf.whole(url):
            mean = total / len(source.places)
            size += int(own * mean * max(epochs, 1))
            requests += int(
                own * (-(-mean // RANGE_BYTES) + 2) * max(epochs, 1)
            )  # parts, and what it is before and after
            window = min(config.data.window, -(-len(source.places) // planner.orders[0].lanes) + 1)
            cached += int(min(lanes * window, own) * mean)
        else:
            size += int(read.bytes * epochs / config.nodes)
            requests += int(count / config.nodes) if is_remote(url) else 0
    shelf.close()
    return NodeForecast(planner.num_samples / config.nodes, shards, size, requests, lanes, cached)
