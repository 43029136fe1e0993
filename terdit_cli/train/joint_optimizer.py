"""Optimizers of different parameters as one, with one state to save and to load."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch


class Together(torch.optim.Optimizer):
    """Has the groups and the state of all its parts, and steps them one after the other."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts

    def step(self, closure: Any = None) -> Any:
        """Step every part; `closure` is there for torch's sake alone."""
        groups = iter(self.param_groups)
        for part in self._parts:
            # Loading a state puts new objects in place of the old: the parts get what is here now.
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()
