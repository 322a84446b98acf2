"""The `synthos` command: a table from verb to function, imported when it is called."""

import importlib
import json
import os
import sys
from collections.abc import Callable

from launch.tell import Undone
from synthos.data.store.retry import MissingFile, StorageError
from synthos.files import DamagedFile
from synthos.strict import unknown

VERBS = {  # verb -> ("module:function", what it does)
    "submit": ("launch.commands.submit:main", "train a recipe, once or as a sweep; the same command again continues"),
    "status": ("launch.commands.status:main", "how runs are at this moment"),
    "ls": ("launch.commands.status:ls", "list all runs, or those of a group"),
    "logs": ("launch.commands.logs:main", "what a run printed, the rank that failed first on top"),
    "stop": ("launch.commands.stop:main", "ask runs to save and end"),
    "cancel": ("launch.commands.stop:cancel", "end runs now, also those that still wait"),
    "resume": ("launch.commands.resume:main", "go on with a run, on other machines if asked"),
    "retry": ("launch.commands.retry:main", "start failed runs again"),
    "diff": ("launch.commands.diff:main", "how two runs differ: config, code, packages, data"),
    "explain": ("launch.commands.explain:main", "why a job waits, and what will happen at its limit"),
    "doctor": ("launch.commands.doctor:main", "what this cluster does to jobs, and a page of configs/cluster for it"),
    "gc": ("launch.commands.gc:main", "what may be deleted; --yes deletes it"),
    "wandb sync": ("launch.commands.wandb:main", "send what was logged offline to W&B"),
    "generate": ("launch.commands.generate:main", "make pictures with trained weights"),
    "requests detailmaster": ("launch.commands.detailmaster:main", "write the prompts of DetailMaster as requests"),
    "weights export": ("launch.commands.weights:main", "write a trained projector in the original Wan2.1 naming"),
    "data write": ("synthos.data.commands.write:main", "write pictures and captions as shards"),
    "data index": ("synthos.data.commands.index:main", "index shards, here or elsewhere, and write their manifest"),
    "data validate": ("synthos.data.commands.validate:main", "read every byte of some shards, and list what is wrong"),
    "data stats": ("synthos.data.commands.stats:main", "tell what a data set is made of"),
    "data filter": ("synthos.data.commands.filter:main", "keep the samples within limits of size, aspect and caption"),
    "data reshard": ("synthos.data.commands.reshard:main", "the same samples in shards of another size"),
    "data plan": ("launch.commands.data_plan:main", "tell what a run will read, before it is queued"),
    "data audit": ("launch.commands.audit:main", "prove that a run consumed every sample exactly once"),
    "data quarantine": (
        "synthos.data.commands.quarantine:main",
        "list a run's bad samples, and leave them out of another",
    ),
    "data preview": ("synthos.data.commands.preview:main", "a contact sheet of a data set"),
}

Command = Callable[[list[str]], int | Callable[[], int]]


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return its exit code; what the user wrote wrongly is one message and exit code 2.

    A file elsewhere that is not there is that too; a store or a disk that fails is one message and exit code 1, and
    so is a file that may not be read or written, or a run folder's own that is damaged.

    With --json the message is a document as well, {"error": ...}.

    A verb takes its arguments and returns its exit code, or else the work that remains when all input is known to be
    good: a ValueError of that work is a fault of the code, so it keeps its traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    try:
        verb, rest = split_verb(arguments)
        result = find(verb)(rest)
    except (ValueError, StorageError, Undone) as error:
        _tell(str(error), arguments)
        wrong_input = isinstance(error, (ValueError, MissingFile)) and not isinstance(error, DamagedFile)
        return 2 if wrong_input else 1
    except BrokenPipeError:  # as of `| head`; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _tell(told, arguments)
        return 1
    try:
        return result() if callable(result) else result
    except DamagedFile as error:
        _tell(str(error), arguments)
        return 1


def _tell(message: str, arguments: list[str]) -> None:
    print(f"error: {message}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": message}))


def usage() -> str:
    """The help page: every verb in one line."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join(["usage: synthos VERB ...", "", *lines, "", "`synthos VERB --help` says more."])


def split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and what follows it; ValueError lists the verbs."""
    for length in (2, 1):
        verb = " ".join(arguments[:length])
        if verb in VERBS:
            return verb, arguments[length:]
    raise ValueError(f"synthos has no verb {arguments[0]!r}; {unknown(arguments[0], list(VERBS))}")


def find(verb: str) -> Command:
    module, function = VERBS[verb][0].split(":")
    command: Command = getattr(importlib.import_module(module), function)
    return command


if __name__ == "__main__":
    sys.exit(main())
