"""Python's garbage collector while a run trains."""

import gc


class Garbage:
    """Excludes what exists after the first step from garbage collections, until the run is over.

    Python's modules and the model have hundreds of thousands of objects, which stay. Collections
    that traverse them happen on each rank at another moment, and the other ranks wait each time.
    """

    def __init__(self) -> None:
        self._is_frozen = False
        self._has_stepped = False

    def after_step(self) -> None:
        """Freezes all objects after the first step, unless this process has frozen its modules
        before, as workers do."""
        if not self._has_stepped and gc.get_freeze_count() == 0:
            gc.collect()  # what is garbage by now would stay
            gc.freeze()
            self._is_frozen = True
        self._has_stepped = True

    def close(self) -> None:
        """Undoes what `after_step` did."""
        if self._is_frozen:
            gc.unfreeze()
            self._is_frozen = False
