"""The processes of a bench."""

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Have this process end as soon as the one that started it is gone, even if that was killed.

    It is the initializer of a process pool: without it, the work of a killed program goes on unseen.
    """
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()
