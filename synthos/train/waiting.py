"""What a step waited for its data for, and what would help."""

SHARE = 0.05  # of a step, above which waiting is worth a word
ADVICE = {
    "fetch": "the network: data.read=shards, data.cache on a fast local disk, nearer shards, or more data.workers",
    "read": "the disk: larger shards, a smaller data.window, or the shards on a faster disk",
    "decode": "decoding: more data.workers (and cores), or pictures stored nearer to the size they are read in",
    "transform": "cropping and scaling: more data.workers (and cores), or pictures stored in the size they are read in",
    "transfer": "moving batches to the device: a smaller batch.micro",
}


def waits(waited: float, moved: float, seconds: float, readers: dict[str, float]) -> dict[str, float]:
    """Metrics of one step: its wait in seconds and as a share of the step, split by what readers spent their time on.

    Args:
        waited: seconds until the batch was there.
        moved: seconds that moving it to the device took.
        seconds: of the whole step.
        readers: seconds that the reader of this batch spent, by kind; they overlap with training and each other.
    """
    total = sum(readers.values())
    split = {kind: waited * spent / total if total else 0.0 for kind, spent in readers.items()}
    parts = {f"data/wait_{kind}_s": value for kind, value in {**split, "transfer": moved}.items()}
    return {"data/wait_s": waited + moved, "data/wait": (waited + moved) / seconds, **parts}


def advise(share: float, parts: dict[str, float]) -> str:
    """One line where steps wait for more than `SHARE` of their time; else nothing.

    Args:
        share: of the time that is spent waiting.
        parts: the metrics `data/wait_*_s`, in seconds.
    """
    if share <= SHARE or not any(parts.values()):
        return ""
    most = max(parts, key=lambda name: parts[name]).removeprefix("data/wait_").removesuffix("_s")
    return f"{share:.0%} of the time is spent waiting for data, mostly for {ADVICE[most]}"
