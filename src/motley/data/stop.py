"""Cut a text that arrives in pieces at a stop text."""

from collections.abc import Sequence


class StopAtText:
    """Passes text on up to the first of some stop texts (the one that is complete first), wherever the pieces are cut.

    Text that may begin a stop text is held back until the next piece decides. `rest` is the text after the stop text in
    the piece that completed it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = self.rest = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop text; nothing once one was found."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.stopped, self.rest = True, self._held[end:]
            return self._take(at)
        return self._take(len(self._held) - self._begun())

    def finish(self) -> str:
        """Text that was held back and did not become a stop text."""
        return self._take(len(self._held))

    def _begun(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _take(self, count: int) -> str:
        taken = self._held[:count]
        self._held = "" if self.stopped else self._held[count:]
        return taken
