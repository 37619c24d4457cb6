"""What logistic regression loses, as a function of logits: over classes that exclude each other, or class by class.

A loss is separable where its objective is a sum of problems that share nothing, as that of one-vs-rest is: one a class.
"""

from typing import NamedTuple, Protocol

import torch


class Loss(Protocol):
    """Of n rows and C classes."""

    num_classes: int
    """C."""
    num_parts: int
    """Of how many problems that share nothing the objective is the sum: 1, or C."""
    halves: int
    """By what C is divided, and the objective multiplied, to be scikit-learn's; see `logistic`."""

    def row_weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Factors [n] of the losses of rows; None for ones."""
        ...

    def evaluate(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over rows, float64 [num_parts], and the derivatives [n, C]; `logits` [n, C] may be overwritten."""
        ...

    def curvature(self, device: torch.device) -> torch.Tensor:
        """Second derivative [1] or [C], for each unit of weight of a row, where a descent begins."""
        ...

    def start(self, device: torch.device) -> torch.Tensor:
        """Intercepts [C] to begin at, with weights of zero."""
        ...


class Multinomial:
    """Classes exclude each other: the cross entropy of a softmax.

    Args:
        num_classes: C, at least 2.
        class_weights: Float32 [C], factors of the losses of each class; ones by default.
    """

    num_parts = 1

    def __init__(self, num_classes: int, class_weights: torch.Tensor | None = None) -> None:
        assert num_classes >= 2
        self.num_classes = num_classes
        self.halves = 2 if num_classes == 2 else 1
        self._class_weights = class_weights

    def row_weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """As in `Loss`; labels are class ids [n], as below."""
        return None if self._class_weights is None else self._class_weights[labels]

    def evaluate(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `Loss`."""
        normaliser = torch.logsumexp(logits, 1)
        losses = normaliser - logits.gather(1, labels[:, None])[:, 0]
        residual = logits.sub_(normaliser[:, None]).exp_()
        residual.scatter_add_(1, labels[:, None], -torch.ones_like(residual[:, :1]))
        weights = self.row_weights(labels)
        if weights is not None:
            losses = losses * weights
            residual *= weights[:, None]
        return losses.sum(0, keepdim=True, dtype=torch.float64), residual

    def curvature(self, device: torch.device) -> torch.Tensor:
        """As in `Loss`: where all classes are equally probable, in the space where rows sum up to zero."""
        return torch.full((1,), 1 / self.num_classes, device=device)

    def start(self, device: torch.device) -> torch.Tensor:
        """As in `Loss`."""
        return torch.zeros(self.num_classes, device=device)


class ClassLists(NamedTuple):
    """Lists of classes of N rows, one after the other."""

    ends: torch.Tensor
    """Int64 [N + 1]; row i has the entries from ends[i] to ends[i + 1]."""
    classes: torch.Tensor
    """Class id of each entry, int64."""

    def entries(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the lists of some rows [n], one after the other: which of the n rows, and the class."""
        begins = self.ends[rows]
        lengths = self.ends[rows + 1] - begins
        places = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
        within = torch.arange(len(places), device=rows.device) - (lengths.cumsum(0) - lengths)[places]
        return places, self.classes[begins[places] + within]

    def counts(self, rows: torch.Tensor, num_classes: int) -> torch.Tensor:
        """In how many of some rows each class is, int64 [C]."""
        return torch.bincount(self.entries(rows)[1], minlength=num_classes)

    def keep(self, kept: torch.Tensor) -> "ClassLists":
        """The lists without the classes that are not `kept`, bool [C]; those that are, are numbered anew."""
        is_in = kept[self.classes]
        before = torch.cat([is_in.new_zeros(1, dtype=torch.int64), is_in.cumsum(0)])
        return ClassLists(before[self.ends], (kept.cumsum(0) - 1)[self.classes[is_in]])

    def to(self, device: torch.device) -> "ClassLists":
        """The same on a device."""
        return ClassLists(self.ends.to(device), self.classes.to(device))


class OneVsRest:
    """A row has any number of classes: for each class a logistic loss of its own. Labels are rows of `lists`.

    Args:
        lists: Of all rows.
        counts: In how many of the rows to learn from each class is [C]; in some of them, and not in all.
        num_rows: How many there are.
        balanced: Whether, in each class's problem, rows with it and rows without it have one total weight, as with
            scikit-learn's class_weight='balanced'.
    """

    halves = 1

    def __init__(self, lists: ClassLists, counts: torch.Tensor, num_rows: int, *, balanced: bool = False) -> None:
        assert bool(((counts > 0) & (counts < num_rows)).all())
        self.num_classes = self.num_parts = len(counts)
        self._lists = lists
        self._balanced = balanced
        self._shares = counts.double() / num_rows

    def row_weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """As in `Loss`: in each class they sum up to the number of rows, whether balanced or not."""
        return None

    def evaluate(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `Loss`."""
        places, classes = self._lists.entries(labels)
        sign = torch.ones_like(logits)
        sign[places, classes] = -1
        # Of the wrong answer's logit, from which nothing cancels however sure the right one is.
        logits = logits.mul_(sign)
        losses = torch.nn.functional.softplus(logits)
        residual = logits.sigmoid_().mul_(sign)
        if self._balanced:
            shares = self._shares.float()
            weights = torch.where(sign < 0, 0.5 / shares, 0.5 / (1 - shares))
            losses, residual = losses * weights, residual * weights
        return losses.sum(0, dtype=torch.float64), residual

    def curvature(self, device: torch.device) -> torch.Tensor:
        """As in `Loss`: p (1 - p) where each class is as probable as it is frequent."""
        shares = torch.full_like(self._shares, 0.5) if self._balanced else self._shares
        return (shares * (1 - shares)).float().to(device)

    def start(self, device: torch.device) -> torch.Tensor:
        """As in `Loss`: the logits of these probabilities."""
        return (torch.zeros_like(self._shares) if self._balanced else self._shares.logit()).float().to(device)
