"""Logistic regression: scikit-learn's objective, minimised in a tenth of the passes over the data.

Minimised over weights W [C, D] and intercepts b [C] is what sklearn.linear_model.LogisticRegression(C=c) minimises,

    c * sum over rows of w[label] * (logsumexp(W x + b) - (W x + b)[label])  +  0.5 * ||W||^2,

whose intercepts are not penalised. Two classes are the exception: there scikit-learn has one vector of weights v with
the penalty 0.5 * ||v||^2. The shortest pair with that difference is (-v/2, v/2), whose penalty is half of it, so that
minimising with c / 2 gives the same classifier, and half the objective.

The objective is convex, and hard for a plain L-BFGS only because features are badly scaled: CLIP's have a mean far
longer than what tells images apart, and a decaying spectrum. Both are taken out. Rows are centred, which the free
intercepts make up for; and L-BFGS starts from the inverse of ``X'X * c / C + 1`` in each class and of ``c * n / C``
for the intercepts: the inverse of the Hessian where all classes are equally probable (Böhning 1992, Annals of the
Institute of Statistical Mathematics 44, bounds the Hessian by such a product everywhere). It was chosen by measuring:
on the features of benchmarks/probe.py it takes about 16 passes to within 1e-6 of the minimum, where scikit-learn's
L-BFGS takes 100 to 150 and ends 2e-3 above it. Newton's method with conjugate gradients would need a pass for each
product with the Hessian, which leaves little to gain.

One-vs-rest, for rows with any number of classes, is as many problems as there are classes, each what
sklearn.multiclass.OneVsRestClassifier gives to a LogisticRegression of two classes: one vector of weights, and the
losses of `losses.OneVsRest`. They share the passes and nothing else: each has its own L-BFGS, its own steps, and its
own end. Each begins at the odds of its class, with the Hessian there.

The first passes multiply in bfloat16 where that is faster; what ends the descent is computed in float32, its sums in
float64.
"""

from clipindex.logistic.blocks import Block, Passes, block_rows, map_blocks
from clipindex.logistic.descent import Fit, Linear, fit
from clipindex.logistic.losses import ClassLists, Loss, OneVsRest
from clipindex.logistic.problem import Problem

__all__ = [
    "Block",
    "ClassLists",
    "Fit",
    "Linear",
    "Loss",
    "OneVsRest",
    "Passes",
    "Problem",
    "block_rows",
    "fit",
    "map_blocks",
]
