"""What every dataset loader returns, and what a loader is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm.data.files import Files
from fedmllm.data.sample import Sample, Task
from fedmllm.data.tables import Report


@dataclass(frozen=True)
class Dataset:
    """A loaded dataset; images stay unread.

    task: what is asked. train, test: samples; test samples hold both modalities.
    flashcards: text-only training samples for the parties that hold text, where a domain is made
        of two sources (medical: image questions and flashcards). They are split among the
        text-holding parties and `train` among the image-holding ones, evenly at random.
    parties: training samples by party, where they come ready split (a user's own files); then
        `train` is their concatenation and no partition is drawn.
    """

    task: Task
    train: Sequence[Sample]
    test: Sequence[Sample]
    flashcards: Sequence[Sample] = ()
    parties: Mapping[str, Sequence[Sample]] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnerFiles:
    """What `fedmllm data info` and `fedmllm data check` know of a dataset that comes as files.

    unpack: what to get and how it must lie, for a person. splits: the owners' split names.
    needed: those that must be there. read: the samples of one split; raises `AbsentError` if its
        table is not there. archives: downloads that may lie inside the root, as they are called.
    published: counts by what they count: a split (``train``), a split's group (``test/en``, as in
        `check.counts`), or ``images``; an empty mapping if the owners published none.
    counted_by: where those counts stand.
    """

    unpack: str
    splits: tuple[str, ...]
    needed: tuple[str, ...]
    read: Callable[[Files, str, Report], list[Sample]]
    archives: tuple[str, ...] = ()
    published: Mapping[str, int] = field(default_factory=dict)
    counted_by: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """A registry entry: one line for `fedmllm ls`, where it comes from, and its loader.

    load: called with keyword options (config keys under ``data`` except ``name``); raises
        `UserError` for bad files.
    options: the option names that `load` takes, with their default values.
    ready: the parties may come ready made, and their number is known only once they are read.
    source, licence, citation: for `fedmllm data info`. files: of datasets that a user fetches.
    """

    summary: str
    load: Callable[..., Dataset]
    options: Mapping[str, object] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    citation: str = ""
    ready: bool = False
    files: OwnerFiles | None = None
