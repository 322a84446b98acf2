"""`synthos data audit`: proof that a run consumed every sample of its plan exactly once."""

import argparse
import dataclasses
from pathlib import Path

from launch.audit import Auditor, Findings, Wrong
from launch.runs import find_one
from synthos.data.commands.screen import SHOWN, new_parser, print_json, print_list, print_table, shown
from synthos.schema import RunConfig, read_job


def main(arguments: list[str]) -> int:
    """Audit a run; 1 where a sample is lost, repeated or unplanned; ValueError for what is no run."""
    from synthos.recipes.base import recipe_class

    args = parser().parse_args(arguments)
    run = find_one(args.run)
    config = read_job(run / "config.yaml")
    if not isinstance(config, RunConfig):
        raise ValueError(f"{run}: its stage is {config.stage!r}, which consumes no samples; expected a training run")
    auditor = Auditor(run, config, recipe_class(config.recipe["name"]).inputs)
    found = auditor.findings
    for _ in shown(auditor.run(), "auditing", found.steps, args.json):
        pass
    if args.json:
        print_json(_as_json(found))
    else:
        _print(found, run)
    return 0 if found.clean else 1


def parser() -> argparse.ArgumentParser:
    made = new_parser("audit", __doc__, shards=False)
    made.add_argument("run", help="by its name, signature or folder")
    return made


def _as_json(found: Findings) -> dict[str, object]:
    told = dataclasses.asdict(found)
    return {**told, **found.counts, "clean": found.clean}


def _print(found: Findings, run: Path) -> None:
    counts = found.counts
    print(f"{run}: {found.steps:,} steps, {found.samples:,} samples consumed as planned: "
          + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))  # fmt: skip
    if found.substituted:
        print(f"{found.substituted:,} of them were bad, and another one stood for each (data/quarantine.jsonl)")
    if found.padding:
        print(f"{found.padding:,} more rows only filled up their batch")
    if found.beyond:
        print(f"{found.beyond:,} rows of later steps, which not every rank has done yet, are left out")
    rows = [(c.source, c.epoch, c.consumed, c.samples, "complete" if c.consumed == c.samples else "partial")
            for c in found.coverage]  # fmt: skip
    if rows:
        shortened = rows if len(rows) <= SHOWN else [*rows[: SHOWN - 2], *rows[-2:]]
        print_table("Epochs", ["source", "epoch", "consumed", "of", ""], shortened)
    if found.other_order:
        print(f"{len(found.other_order):,} steps, the first is {found.other_order[0]}, were trained on other batches "
              "than the plan has now: data, seed or settings have changed")  # fmt: skip
    if found.wrong:
        print_list(
            "Wrong", ["step", "what", "source", "shard", "key", "epoch", "rows by rank"], [*map(_cells, found.wrong)]
        )


def _cells(wrong: Wrong) -> tuple[object, ...]:
    by_rank = ", ".join(f"{rank}: {count}" for rank, count in wrong.rows_by_rank.items()) or "none"
    key = wrong.key or f"id {wrong.id:016x}, of no sample of this run"
    return wrong.step, wrong.kind, wrong.source, wrong.shard, key, wrong.epoch, by_rank
