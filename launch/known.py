"""What was found out for one run and holds for others that are planned or started with it."""

from collections.abc import Callable
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class Known:
    """Answers by question and by all that they depend on; of a hundred points of a sweep most are the same."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], Any] = {}
        self._refusals: dict[tuple[str, str], ValueError] = {}

    def ask(self, question: str, of: object, answer: Callable[[], Answer]) -> Answer:
        """The answer to a question about `of`, plain values or dataclasses of such, which is found but once.

        Raises the ValueError that the answer was.
        """
        key = (question, repr(of))
        if key in self._refusals:
            raise self._refusals[key]
        if key not in self._answers:
            try:
                self._answers[key] = answer()
            except ValueError as error:
                self._refusals[key] = error
                raise
        found: Answer = self._answers[key]
        return found
