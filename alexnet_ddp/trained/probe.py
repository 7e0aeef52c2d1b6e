"""How well a linear classifier tells the classes apart by a net's features alone: the probe of transfer learning.

scikit-learn's LogisticRegression (multinomial, L2) on features standardised by the training part's means and
deviations. How much it is regularised is chosen from GRID: fitted to four fifths of (at most CHOOSING of) the training
part, the best on the last fifth, stratified by class; then it is fitted anew to the whole training part. scikit-learn's
C multiplies the *sum* of the losses, so C = strength / images keeps the balance whatever their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alexnet_ddp.data.index.sources import listed
from alexnet_ddp.errors import UserError
from alexnet_ddp.trained.classes import mapped
from alexnet_ddp.trained.feature_file import Features, read_features

GRID = (0.1, 1.0, 10.0, 100.0)  # of the strength of the losses against the penalty; a tie goes to the smaller
CHOOSING = 10_000  # images
HELD_OUT = 0.2
STEPS = 200  # of L-BFGS
ALIKE = ("layer", "net", "weights", "preprocessing", "dimension")  # of the tasks: else features mean different things


@dataclass(frozen=True)
class Probe:
    """`accuracy` over `samples` images, damaged ones counted as wrong; fitted to `trained_on`, the damaged left out."""

    accuracy: float
    samples: int
    trained_on: int
    dimension: int
    classes: int
    c: float
    converged: bool

    @property
    def told(self) -> str:
        slow = "" if self.converged else f"; stopped after {STEPS} steps, before it had converged"
        return (f"linear probe: {self.accuracy:.2%} of {self.samples:,} images right ({self.classes} classes; logistic "
                f"regression on {self.dimension:,} standardised features, fitted to {self.trained_on:,} images, "
                f"C = {self.c:.3g} chosen on held-out ones of these{slow})")


def check_probe(train: str | Path, task: dict[str, Any], *, classes: Sequence[str]) -> None:
    """Raises UserError where scikit-learn isn't here, or where features of `task` couldn't be told by `train`'s: other
    features, or without some of the `classes` that the data of `task` have."""
    _scikit_learn()
    found = read_features(train)
    theirs = found.task
    if differ := [key for key in ALIKE if theirs.get(key) != task.get(key)]:
        layers = tuple((one.get("layer") or {}).get("name") for one in (theirs, task))
        raise UserError(f"--linear-probe {train} holds other features than these: they differ in {', '.join(differ)}" +
                        (f" ({layers[0]} there, {layers[1]} here)" if layers[0] != layers[1] else "") +
                        ". Extract both with the same model and --layer.")
    if unknown := sorted(set(classes) - set(found.classes)):
        raise UserError(f"--linear-probe {train} has {len(unknown)} of the data's {len(classes)} classes not: "
                        f"{listed(unknown)}. Its own are {listed(list(found.classes))}. Fit to features of data with "
                        "the same class folders.")


def linear_probe(train: Features, test: Features) -> Probe:
    """Fits to `train`, scores on `test`; holds both in memory. Classes are matched by their names.

    Raises UserError where scikit-learn isn't here, or where there are fewer than two classes or five whole images.
    """
    _scikit_learn()
    from threadpoolctl import threadpool_limits  # scikit-learn needs it itself

    # One thread: those of the BLAS wait for each other spinning, which on a busy machine took ten times as long; and
    # the accuracy doesn't hang on their number.
    with threadpool_limits(1):
        return _fitted_and_scored(train, test)


def _fitted_and_scored(train: Features, test: Features) -> Probe:
    linear_model, model_selection, preprocessing, exceptions = _scikit_learn()
    inputs, labels = _whole(train)
    wanted = mapped(test.labels.astype(np.int32), of=test.classes, to=train.classes, source="the test part")
    if len(np.unique(labels)) < 2 or len(labels) < 5:
        raise UserError(f"--linear-probe needs images of at least two classes to fit to; there are {len(labels)} of "
                        f"{len(np.unique(labels))}.")
    scaler = preprocessing.StandardScaler(copy=False)
    inputs = scaler.fit_transform(inputs)

    def stratified(rows: Any) -> Any:
        """Their labels, where each class has enough of them to be dealt to both parts."""
        counts = np.bincount(labels[rows])
        counts = counts[counts > 0]
        return labels[rows] if counts.min() > 1 and len(rows) * HELD_OUT >= len(counts) else None

    order = np.random.default_rng(0).permutation(len(labels))
    few = order[:CHOOSING]
    fit, held_out = model_selection.train_test_split(few, test_size=HELD_OUT, random_state=0, stratify=stratified(few))
    if len(np.unique(labels[fit])) < 2:  # a rare class is held out, or left out of the few: one of it changes places
        other = order[labels[order] != labels[fit[0]]][0]
        held_out = np.where(held_out == other, fit[-1], held_out)
        fit[-1] = other

    def fitted(c: float, rows: Any) -> tuple[Any, bool]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", exceptions.ConvergenceWarning)
            made = linear_model.LogisticRegression(C=c, max_iter=STEPS).fit(inputs[rows], labels[rows])
        return made, not any(issubclass(one.category, exceptions.ConvergenceWarning) for one in caught)

    scores = [fitted(strength / len(fit), fit)[0].score(inputs[held_out], labels[held_out]) for strength in GRID]
    c = GRID[int(np.argmax(scores))] / len(labels)
    made, converged = fitted(c, slice(None))
    answers = made.predict(scaler.transform(np.array(test.features, np.float32)))
    right = int(((answers == wanted) & np.asarray(test.whole)).sum())
    return Probe(right / len(test), len(test), len(labels), inputs.shape[1], len(np.unique(labels)), c, converged)


def _whole(part: Features) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rows = np.flatnonzero(part.whole)
    return np.array(part.features[rows], np.float32), np.array(part.labels[rows])


def _scikit_learn() -> tuple[Any, Any, Any, Any]:
    try:
        from sklearn import exceptions, linear_model, model_selection, preprocessing
    except ImportError:
        raise UserError("--linear-probe needs scikit-learn: pip install 'alexnet-ddp[probe]'. Without it the features "
                        "are written all the same.") from None
    return linear_model, model_selection, preprocessing, exceptions
