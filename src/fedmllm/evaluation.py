"""Evaluation of an adapter on test samples, under the modality conditions.

Test samples hold both modalities; a condition withholds some. Choice tasks are scored from the
probabilities of the options, open tasks from greedily generated answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fedmllm import metrics
from fedmllm.data.sample import Sample, Task
from fedmllm.fusion import Fusion
from fedmllm.heterogeneity import is_complete
from fedmllm.models.mllm import Mllm
from fedmllm.models.passes import Encoded, batches_of
from fedmllm.prompts import render

CONDITIONS: dict[str, tuple[bool, bool]] = {
    # name -> (keep image, keep text)
    "both": (True, True),
    "image_withheld": (False, True),
    "text_withheld": (True, False),
    "neither": (False, False),
}


class TestSet:
    """Test samples under each condition, encoded once and used for every evaluation of a run.

    encode: how a sample, masked as the condition has it, becomes tokens; by default in `style`,
    within `max_length`, by `long_text` (`Mllm.encode`).
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        mllm: Mllm,
        task: Task,
        samples: Sequence[Sample],
        *,
        style: str = "plain",
        max_length: int = 1200,
        long_text: str = "refuse",
        encode: Callable[[Sample], Encoded] | None = None,
    ) -> None:
        self.mllm, self.task, self.samples = mllm, task, samples
        self.style, self.max_length, self.long_text = style, max_length, long_text
        self._encode = encode or self._rendered
        self._encoded: dict[str, dict[int, Encoded]] = {}

    def encoded(self, condition: str, which: Iterable[int]) -> list[Encoded]:
        """Samples as the condition has them."""
        image, text = CONDITIONS[condition]
        made = self._encoded.setdefault(condition, {})
        found = []
        for i in which:
            if i not in made:
                masked = self.samples[i].masked(keep_image=image, keep_text=text)
                made[i] = self._encode(masked)
            found.append(made[i])
        return found

    def _rendered(self, sample: Sample) -> Encoded:
        return self.mllm.encode(
            render(sample, self.task, self.style),
            max_length=self.max_length,
            long_text=self.long_text,
        )

    def shortened(self) -> set[str]:
        """Ids of the samples whose text was shortened."""
        made = [item for items in self._encoded.values() for item in items.values()]
        return {item.id for item in made if item.shortened}

    def read(self, condition: str, which: Sequence[int], longest: int | None = None) -> list[Any]:
        """What the model's present adapter says to samples, as one batch: the probabilities of
        the options of a choice task, the answer to an open question of at most `longest` tokens."""
        items = self.encoded(condition, which)
        if longest is None:
            return list(self.mllm.score_options(items, batch_size=len(items)).numpy())
        return self.mllm.generate(items, batch_size=len(items), max_new_tokens=longest)

    def _read_all(
        self,
        condition: str,
        which: Sequence[int],
        batch_size: int,
        readers: Readers | None,
        longest: int | None = None,
    ) -> list[Any]:
        """The same in batches by length, each distinct question once; here or by `readers`."""
        found, like = batches_of(self.encoded(condition, which), batch_size)
        batches = [[which[i] for i in batch] for batch in found]
        said: dict[int, Any] = {}
        for number, values in (readers or _here)(self, condition, batches, longest):
            said.update(zip(batches[number], values, strict=True))
        return [said[which[i]] for i in like]

    def probabilities(
        self,
        condition: str,
        size: int,
        *,
        batch_size: int = 64,
        fusion: Fusion | None = None,
        readers: Readers | None = None,
    ) -> np.ndarray:
        """Probabilities of the options [size, C] for the first `size` samples of a choice task."""

        def score(condition: str, which: Sequence[int]) -> np.ndarray:
            return np.stack(self._read_all(condition, which, batch_size, readers))

        found = score(condition, range(size))
        whole = [i for i, s in enumerate(self.samples[:size]) if is_complete(s)]
        if condition != "both" or fusion is None or not fusion.share or not whole:
            return found
        alone = score("text_withheld", whole), score("image_withheld", whole)
        fused = found.astype(np.float64)
        fused[whole] = fusion(found[whole], *alone)
        return fused

    def evaluate(
        self,
        condition: str = "both",
        *,
        limit: int | None = None,
        batch_size: int = 64,
        given: list[str] | None = None,
        fusion: Fusion | None = None,
        readers: Readers | None = None,
    ) -> dict[str, float]:
        """Metrics of the model's present adapter; `limit` takes the first so many samples.

        given: a list that gets the answers of an open task, in the order of the samples. fusion: of
        the samples of a choice task that have both modalities under the condition. readers: where
        batches are read, by default here.
        """
        size = min(limit or len(self.samples), len(self.samples))
        samples = self.samples[:size]
        if self.task.kind == "choice":
            scores = self.probabilities(
                condition, size, batch_size=batch_size, fusion=fusion, readers=readers
            )
            return choice_metrics(scores, [int(s.label or 0) for s in samples], self.task)
        items = self.encoded(condition, range(size))
        longest = max(16, *(len(item.answer) for item in items))
        answers = self._read_all(condition, range(size), batch_size, readers, longest)
        if given is not None:
            given.extend(answers)
        return open_metrics(answers, samples)


class Readers(Protocol):
    """Where batches of test samples are read: yields (number of the batch, what `TestSet.read`
    gives for it) in any order, by the adapter that the test set's model has."""

    def __call__(
        self,
        test: TestSet,
        condition: str,
        batches: Sequence[Sequence[int]],
        longest: int | None,
    ) -> Iterable[tuple[int, list[Any]]]: ...


def _here(
    test: TestSet, condition: str, batches: Sequence[Sequence[int]], longest: int | None
) -> Iterable[tuple[int, list[Any]]]:
    for number, which in enumerate(batches):
        yield number, test.read(condition, which, longest)


def modality_alignment(
    test: TestSet, *, limit: int | None = None, batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """How near masked test samples are to whole ones in the model, by what is withheld.

    cosine: the mean over samples of cos(h - m, h_masked - m), where h is the hidden state that
    decides the answer of the whole sample, h_masked that of the masked one, and m the mean of all
    h: without m, hidden states of any two samples are alike. distance: the mean of
    ||h - h_masked|| over that of ||h - m||. limit: the first so many samples.
    """
    size = min(limit or len(test.samples), len(test.samples))
    whole = test.mllm.represent(test.encoded("both", range(size)), batch_size=batch_size).numpy()
    middle = whole.mean(0)
    found = {}
    for condition in CONDITIONS:
        if condition == "both":
            continue
        masked = test.mllm.represent(
            test.encoded(condition, range(size)), batch_size=batch_size
        ).numpy()
        a, b = whole - middle, masked - middle
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        dots = (a * b).sum(1)
        cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        apart = np.linalg.norm(whole - masked, axis=1).mean()
        scale = np.linalg.norm(a, axis=1).mean()
        found[condition] = {
            "cosine": float(cosines.mean()),
            "distance": float(apart / scale) if scale else 0.0,
        }
    return found


def choice_metrics(scores: np.ndarray, labels: Sequence[int], task: Task) -> dict[str, float]:
    """Metrics of option probabilities [n, classes]."""
    predictions = scores.argmax(1)
    accuracy = float((predictions == np.asarray(labels)).mean())
    found: dict[str, float] = {
        "n": len(labels),
        "accuracy": accuracy,
        "accuracy_se": metrics.accuracy_standard_error(accuracy, len(labels)),
        "macro_f1": metrics.macro_f1(labels, predictions.tolist(), len(task.classes)),
    }
    if task.metric == "macro_f1":
        found["macro_f1_se"] = metrics.macro_f1_standard_error(
            labels, predictions.tolist(), len(task.classes)
        )
    if len(task.classes) == 2:
        found["auc"] = metrics.auc(labels, scores[:, 1].tolist())
        found["auc_se"] = metrics.auc_standard_error(labels, scores[:, 1].tolist())
        found["hard_letter_auc"] = metrics.hard_letter_auc(labels, predictions.tolist())
    return found


def open_metrics(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """VQA accuracy of generated answers, for all questions and for each kind of question."""
    groups = metrics.vqa_accuracy(
        list(answers), [s.answer for s in samples], [s.kind for s in samples]
    )
    overall = groups.pop("all")
    own = {
        "n": len(samples),
        "unparsable": metrics.unparsable(list(answers), [s.answer for s in samples]),
        "accuracy": overall,
        "accuracy_se": metrics.accuracy_standard_error(overall, len(samples)),
    }
    # a kind called "se" is no standard error
    return {**{f"accuracy_{kind}": value for kind, value in groups.items()}, **own}


def mean_over(results: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean, spread and extremes of each metric over clients."""
    spread = {}
    for name in sorted(set.intersection(*(set(r) for r in results))):
        values = np.array([r[name] for r in results], dtype=float)
        spread[name] = {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return spread
