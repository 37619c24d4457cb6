"""Which rows hang together, as pairs of them come in from several threads."""

import threading

import numpy as np

from clipindex.types import IntArray


class Groups:
    """Ids in groups, each named by its least id: union-find, whose parents are never larger than their children."""

    def __init__(self, parents: IntArray) -> None:
        self._parents = parents
        self._lock = threading.Lock()

    def names(self, ids: IntArray) -> IntArray:
        """The group [n] of each id, as far as pairs have come in: what is one group now stays one."""
        while True:
            above = self._parents[ids]
            if (above == ids).all():
                return above
            ids = above

    def join(self, ones: IntArray, others: IntArray) -> None:
        """Make one of the groups of each pair."""
        with self._lock:
            while len(ones):
                left, right = self.names(ones), self.names(others)
                self._parents[ones], self._parents[others] = left, right
                apart = left != right
                ones, others = left[apart], right[apart]
                np.minimum.at(self._parents, np.maximum(ones, others), np.minimum(ones, others))
