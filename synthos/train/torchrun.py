"""What this release of torchrun can be told about stopping."""

from torch.distributed.run import get_args_parser

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"


def torchrun_flags(patience_seconds: int) -> list[str]:
    """Flags that let every rank save before it ends.

    Without the first, SIGUSR2 kills torchrun and its ranks never hear of it; without the second, they get 30 s. Both
    are younger than the oldest torch that Synthos takes, so a release without one is started without it.
    """
    flags = {"--signals-to-handle": SIGNALS, "--shutdown-timeout": str(patience_seconds)}
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    return [f"{flag}={value}" for flag, value in flags.items() if flag in known]
