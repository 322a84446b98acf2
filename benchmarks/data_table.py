"""What `benchmarks.data` found, held against the goals and as a table."""

import statistics
from typing import Any

SHOWN = {
    "bare": "bare decoding: simplejpeg, OpenCV INTER_AREA",
    "ours": "**Synthos**",
    "webdataset": "webdataset, Pillow BICUBIC",
    "mosaicml": "MosaicML streaming, Pillow BICUBIC",
    "datasets": "Hugging Face datasets, Pillow BICUBIC",
}
RIVALS = ("webdataset", "mosaicml", "datasets")


def ratios(case: dict[str, Any], name: str) -> list[float]:
    """How many times as fast as `name` Synthos was, round by round."""
    rates = case["images_per_s"]
    return [ours / theirs for ours, theirs in zip(rates["ours"], rates[name], strict=True)]


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with its figure and whether it is met: null where nothing was measured."""
    large, same = record["cases"]
    present = [name for name in RIVALS if name in same["images_per_s"]]
    best = max(present, key=lambda name: statistics.median(same["images_per_s"][name]), default=None)
    found = [
        ("times webdataset + Pillow BICUBIC, pictures resized", ">=", 3.2, _ratio(large, "webdataset")),
        ("times the best rival with its default decoder, pictures of the size", ">=", 1.3, _ratio(same, best)),
        ("of bare decoding, pictures resized", ">=", 0.85, _ratio(large, "bare")),
        ("of bare decoding, pictures of the size", ">=", 0.92, _ratio(same, "bare")),
        ("indexed random reads/s", ">=", 50_000, record["reads"]["reads_per_s"]),
        ("ms for a planned batch of 2,048", "<=", 0.5, record["plan"]["mean_batch_ms"]),
        ("s to go on late in an epoch, planning", "<=", 2.0, record["plan"]["resume_s"]),
        ("s to go on late in an epoch, with the first batch", "<=", 2.0, record["resume"]["resume_s"]),
        ("bytes moved over bytes used, http", "<=", 1.2, record["http"]["moved_over_used"]),
    ]
    return [
        {"goal": goal, "bound": f"{sign} {bound:g}", "figure": figure, "met": _met(figure, sign, bound)}
        for goal, sign, bound, figure in found
    ]


def markdown(record: dict[str, Any]) -> str:
    """Tables for a README, with versions and spread."""
    lines = [f"{record['device']}, Python {record['python']}, one core, {record['rounds']} rounds.", ""]
    for case in record["cases"]:
        title = f"{case['width']} x {case['height']} to {case['edge']} x {case['edge']}"
        lines += [f"| {title} | versions | images/s | spread | Synthos is |", "| --- | --- | ---: | ---: | ---: |"]
        lines += [_line(case, name) for name in SHOWN if name in case["images_per_s"]] + [""]
    plan = record["plan"]
    lines += [
        f"Planning {plan['samples']:,} samples: first batch {plan['first_batch_s']:.2f} s, later ones "
        f"{plan['mean_batch_ms']:.2f} ms (median {plan['median_batch_ms']:.2f}), {plan['memory_mb']:.0f} MB.",
        "",
        "| goal | bound | figure | met |",
        "| --- | ---: | ---: | --- |",
    ]
    lines += [_goal(goal) for goal in record["goals"]]
    lines += [f"\n{name} was left out: {why}." for name, why in record["left_out"].items()]
    return "\n".join(lines)


def _line(case: dict[str, Any], name: str) -> str:
    rates, times = case["images_per_s"][name], ratios(case, name)
    versions = ", ".join(f"{package} {version}" for package, version in case["versions"][name].items())
    compared = "" if name == "ours" else f"{statistics.median(times):.2f} x ({min(times):.2f} to {max(times):.2f})"
    spread = f"{min(rates):.0f} to {max(rates):.0f}"
    return f"| {SHOWN[name]} | {versions} | {statistics.median(rates):.0f} | {spread} | {compared} |"


def _goal(goal: dict[str, Any]) -> str:
    figure = "not measured" if goal["figure"] is None else f"{goal['figure']:,.4g}"
    met = {True: "yes", False: "**no**", None: ""}[goal["met"]]
    return f"| {goal['goal']} | {goal['bound']} | {figure} | {met} |"


def _ratio(case: dict[str, Any], name: str | None) -> float | None:
    return statistics.median(ratios(case, name)) if name in case["images_per_s"] and name is not None else None


def _met(figure: float | None, sign: str, bound: float) -> bool | None:
    if figure is None:
        return None
    return figure >= bound if sign == ">=" else figure <= bound
