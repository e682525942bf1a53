"""Errors that name the thing, the value, what is allowed and the nearest right name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The ValueError to raise for a name that is in no registry, with the nearest name that is."""
    names = sorted(map(str, known))
    lower = {n.lower(): n for n in names}
    wanted = str(name).lower()
    near = [n for n in lower if wanted and n.startswith(wanted)] or get_close_matches(wanted, lower, n=1, cutoff=0.5)
    hint = f" did you mean '{lower[near[0]]}'?" if near else ""
    return ValueError(f"unknown {kind} '{name}';{hint} known: {', '.join(names)}")
