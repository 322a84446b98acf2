"""`synthos data quarantine`: the bad samples that a run met, whether they still are, and a list to leave them out."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from synthos.data.commands.screen import new_parser, print_json, print_list, print_table, shown
from synthos.data.quarantine import Bad, Recheck, by_shard, known_bad_lines, read_quarantine
from synthos.schema import RunConfig, read_job


def main(argv: list[str]) -> int:
    """List them; ValueError for what is no run, and for an --out that exists."""
    args = parser().parse_args(argv)
    config = read_job(args.run / "config.yaml")
    if not isinstance(config, RunConfig):
        raise ValueError(
            f"{args.run}: its stage is {config.stage!r}, which trains on no samples; expected a training run"
        )
    if args.out is not None and args.out.exists():
        raise ValueError(f"--out: {args.out} exists; it is never overwritten: choose another name")
    found = read_quarantine(args.run)
    if args.recheck:
        recheck = Recheck(config.data)
        for bad in shown(found, "looking again", len(found), args.json):
            bad.now = recheck.look(bad)
    listed = [bad for bad in found if bad.now != ""]
    if args.out is not None:
        args.out.write_text("".join(f"{line}\n" for line in known_bad_lines(listed)))
    if args.json:
        print_json(_as_json(args, found))
    else:
        _print(args, found, listed)
    return 0


def parser() -> argparse.ArgumentParser:
    made = new_parser("quarantine", __doc__, shards=False)
    made.add_argument("run", type=Path, help="the run folder")
    made.add_argument("--recheck", action="store_true", help="read each sample again; --out then names those still bad")
    made.add_argument("--out", type=Path, help="file to write for data.known_bad")
    return made


def _as_json(args: argparse.Namespace, found: list[Bad]) -> dict[str, Any]:
    still = sum(bool(bad.now) for bad in found) if args.recheck else None
    samples = [dataclasses.asdict(bad) for bad in found]
    return {"bad": len(found), "still_bad": still, "out": args.out and str(args.out), "samples": samples}


def _print(args: argparse.Namespace, found: list[Bad], listed: list[Bad]) -> None:
    print(f"{args.run}: {len(found):,} bad samples, met {sum(bad.times for bad in found):,} times")
    if found:
        print_table("By shard", ["source", "shard", "reason", "samples"], by_shard(found))
        now = ["now"] if args.recheck else []
        rows = [(b.shard, b.key, b.error, *([b.now or "good"] if args.recheck else [])) for b in found]
        print_list("Samples", ["shard", "key", "what", *now], rows)
    if args.recheck:
        print(f"{len(listed):,} are still bad")
    if args.out is not None:
        print(f"{args.out}: {len(listed):,} samples, for data.known_bad")
