"""Whether the next step of a server drafts. Pure, and on the thread of the engine that schedules steps."""

UNTRAINED = "updraft_untrained"
"""The key in the config.json of a draft that nobody has trained."""


class Drafting:
    """The switch of a server. `is_untrained`: nobody has trained the draft that the server started with, which is version 0."""

    def __init__(self, *, is_untrained: bool) -> None:
        self._is_untrained = is_untrained
        self._version = 0

    @property
    def is_useless(self) -> bool:
        """The draft knows nothing, so that it need not even keep up with the text."""
        return self._is_untrained and self._version == 0

    def serve(self, version: int) -> None:
        """This draft is in place from now on."""
        self._version = version

    def allows(self, batch_size: int) -> bool:
        """Whether the next step, of so many requests, may draft."""
        return not self.is_useless
