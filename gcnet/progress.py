"""A bar with the time left, in a notebook that somebody has open; headless runs show none."""

from __future__ import annotations

import os
import sys
from typing import Any


def is_open() -> bool:
    """Whether this runs in a notebook that somebody has open: a Jupyter kernel not started by `python -m gcnet run`."""
    interactive = sys.modules.get("IPython")  # a kernel has imported it; nothing else needs it
    shell = interactive.get_ipython() if interactive else None
    return type(shell).__name__ == "ZMQInteractiveShell" and not os.environ.get("GCNET_HEADLESS")


def bar(total: int, text: str) -> Any:
    """A tqdm bar of so many tasks, as a widget in an open notebook; elsewhere one that shows nothing."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=text, leave=False, disable=not is_open() or not total)
