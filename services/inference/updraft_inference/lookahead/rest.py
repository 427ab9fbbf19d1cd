"""Whether requests begin without the draft model: what it reads, in case it drafts, is a cost too."""

AWAY = 16
"""Steps in a row that the draft model could have served and was not the choice of, after which it rests."""
ONE_IN = 16
"""Of the requests that begin while it rests, one is read by it all the same, to be tried on."""


class Rest:
    """Of a draft model beside lookups. A step counts where lookups had a weak guess or none, and nothing was forced."""

    def __init__(self) -> None:
        self._passed = 0
        self._begun = 0
        """Requests, while it rests."""

    def begin_anew(self) -> None:
        """The draft model is another one, or the choice."""
        self._passed = 0

    def pass_over(self) -> None:
        """It was not the choice of a step."""
        self._passed += 1

    def admits(self) -> bool:
        """Whether the draft model reads the request that begins now."""
        if self._passed <= AWAY:
            return True
        self._begun += 1
        return self._begun % ONE_IN == 0
