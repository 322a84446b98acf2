"""`synthos data plan`: what a run will read, before it is queued."""

import dataclasses
from typing import Any

from launch.check import value_problems
from launch.compose import compose
from launch.survey import write_built_in
from synthos.data.check import list_data
from synthos.data.commands.index import index_first
from synthos.data.commands.screen import megabytes, print_json, print_table
from synthos.data.forecast import Forecast, forecast
from synthos.data.source import check_config
from synthos.data.store.files import Storage
from synthos.schema import RunConfig

USAGE = """usage: synthos data plan recipe=<name> [key=value] ... [--json]

Tell what a run with these overrides, which are those of `synthos submit`, will read: samples, batches and tail of an
epoch, mixture, buckets, and what a node fetches and caches. Indexes that are missing are built; nothing is started.
"""
Rows = list[tuple[Any, ...]]


def main(arguments: list[str]) -> int:
    """Print the forecast; ValueError for what can't be composed, and for data that can't be trained on."""
    from synthos.data.plan import last_step
    from synthos.recipes.base import recipe_class, recipe_config

    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    config = compose([argument for argument in arguments if argument != "--json"]).config
    recipe = recipe_class(config.recipe.get("name", ""))
    if config.data.streaming is not None:
        raise ValueError("data.streaming: what is read without an index can't be planned; expected null")
    problems = value_problems(config, recipe, recipe_config(config.recipe))
    if problems:
        raise ValueError("\n".join(problems))
    write_built_in(config)
    _index(config, quiet="--json" in arguments)
    found = forecast(config, recipe.inputs)
    steps = last_step(config, found.samples)
    epochs = steps * config.batch.size / found.samples
    if "--json" in arguments:
        print_json({**dataclasses.asdict(found), "steps": steps, "epochs": epochs, "notes": found.notes()})
        return 0
    print_table("An epoch", ["", "all", "a rank", "a node"], _epoch_rows(found, config.nodes))
    print_table("Sources", ["name", "samples", "held out", "faulty", "known bad", "shards", "bytes", "wanted", "share",
                            "epochs"], _source_rows(found))  # fmt: skip
    print_table("Buckets", ["height x width", "samples", "cropped", "enlarged", "epochs per batch"],
                _bucket_rows(found))  # fmt: skip
    print_table("A node, in an epoch", ["", "about"], _node_rows(found))
    print(f"{steps} steps = {epochs:.3g} epochs")
    print(*(f"note: {note}" for note in found.notes()), sep="\n", end="\n" if found.notes() else "")
    return 0


def _index(config: RunConfig, quiet: bool) -> None:
    """Build indexes that are missing, several at a time; ValueError for shards that are."""
    check_config(config.data)
    storage = Storage()
    places, missing = list_data(config.data, storage)
    if missing:
        raise ValueError("\n".join(missing))
    index_first(places, storage, quiet)


def _epoch_rows(found: Forecast, nodes: int) -> Rows:
    tail = {"carry": "opens the next epoch", "drop": "left out", "pad": "filled up, with weight 0"}[found.tail]
    rows: Rows = [
        ("samples", found.samples, f"{found.per_rank:,.6g}", f"{found.samples / nodes:,.6g}"),
        ("global batches", f"{found.batches:,.6g}", "", ""),
        ("samples of a batch", found.batch_size, found.batch_size // found.ranks, found.batch_size // nodes),
        (f"rest ({tail})", f"{found.left_over:,.6g}", "", ""),
    ]
    return [*rows, ("held out", found.held_out, "", "")]


def _source_rows(found: Forecast) -> Rows:
    rows: Rows = []
    for s in found.sources:
        wanted = ", ".join(f"{w:.1%}" + (f" from step {step}" if step else "") for step, w in s.weights.items())
        figures = s.samples, s.held_out, s.faulty, s.known_bad, s.shards, megabytes(s.bytes)
        rows.append((s.name, *figures, wanted, f"{s.share:.1%}", f"{s.epochs:.3g}"))
    return rows


def _bucket_rows(found: Forecast) -> Rows:
    return [
        (f"{b.height} x {b.width}", f"{b.samples:,.6g}", f"{b.cropped:.1%}", f"{b.enlarged:.1%}",
         "never" if b.epochs_per_batch is None else f"{b.epochs_per_batch:.3g}")
        for b in found.buckets
    ]  # fmt: skip


def _node_rows(found: Forecast) -> Rows:
    node, limit = found.node, found.cache_limit
    rows: Rows = [
        ("shards", node.shards),
        ("bytes", megabytes(node.bytes)),
        ("lanes", f"{node.lanes} of {found.lanes}"),
    ]
    if node.requests:
        rows.append(("requests, at most", node.requests))
    if node.cache_bytes:
        allowed = "no limit" if limit is None else megabytes(limit)
        rows.append(("cache of one window", f"{megabytes(node.cache_bytes)} ({allowed})"))
    return rows
