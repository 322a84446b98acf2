"""What this release of torchrun can be told about stopping."""

from importlib.util import find_spec
from pathlib import Path

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"


def torchrun_flags(patience_seconds: int) -> list[str]:
    """Flags that let every rank save before it ends.

    Without the first, SIGUSR2 kills torchrun and its ranks never hear of it; without the second, they get 30 s. Both
    are younger than the oldest torch that Synthos takes, so a release without one is started without it. It is asked
    by its source: to import it costs an agent seconds.
    """
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    source = Path(torch.origin).with_name("distributed").joinpath("run.py").read_text()
    flags = {"--signals-to-handle": SIGNALS, "--shutdown-timeout": str(patience_seconds)}
    return [f"{flag}={value}" for flag, value in flags.items() if f'"{flag}"' in source]
