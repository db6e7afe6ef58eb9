"""Python's garbage collector while a run trains."""

import gc


class Garbage:
    """Excludes what exists after the first step from garbage collections, until the run is over.

    Those are hundreds of thousands, of Python's modules and the model, and they stay. To look
    through them all takes time at another moment on each rank, for which the others wait.
    """

    def __init__(self) -> None:
        self._is_frozen = False
        self._has_stepped = False

    def after_step(self) -> None:
        """Freezes after the first step, unless this process has already frozen its modules, as
        workers do."""
        if not self._has_stepped and gc.get_freeze_count() == 0:
            gc.collect()  # what is garbage by now would stay
            gc.freeze()
            self._is_frozen = True
        self._has_stepped = True

    def close(self) -> None:
        """Collections are as before."""
        if self._is_frozen:
            gc.unfreeze()
            self._is_frozen = False
