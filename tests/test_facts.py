"""What a run is made of, in words."""

from __future__ import annotations

import pytest
import torch

from cnnlab.building.facts import classes_in_words, unseen_classes

LETTERS = tuple("abcdefgh")


@pytest.mark.parametrize(
    ("names", "counts", "words"),
    [
        (("cat", "dog"), [2, 1], "cat 2, dog 1"),
        (("cat", "dog"), None, "cat, dog"),
        (LETTERS, [3] * 8, "8 (a, b, c, d, e, ...), 3 training images each"),
        (LETTERS, [2, 1, 1, 1, 1, 1, 1, 0], "8 (a, b, c, d, e, ...), 0 to 2 training images each"),
        (LETTERS, None, "8 (a, b, c, d, e, ...)"),
    ],
)
def test_classes(names, counts, words):
    assert classes_in_words(names, None if counts is None else torch.tensor(counts)) == words


def test_a_class_without_a_training_image_is_told():
    assert unseen_classes(("cat", "dog", "horse"), torch.tensor([3, 1, 0])) == [
        "data: no training image of horse, which the network cannot learn"
    ]
    assert "a, b, c, d, e and 3 more" in unseen_classes(LETTERS, torch.zeros(8))[0]
    assert unseen_classes(("cat",), torch.tensor([1])) == unseen_classes(LETTERS, None) == []
