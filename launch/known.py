"""What was found out for one run and holds for others that are planned or started with it."""

from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Known:
    """Answers by question and by all that they depend on; of a hundred points of a sweep most are the same."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], Any] = {}

    def ask(self, question: str, of: object, answer: Callable[[], Answer]) -> Answer:
        """The answer to a question about `of`, plain values or dataclasses of such, which is found but once."""
        key = (question, repr(of))
        if key not in self._answers:
            self._answers[key] = answer()
        found: Answer = self._answers[key]
        return found
