"""What a run is made of, in words."""

from __future__ import annotations

import pytest
import torch

from cnnlab.facts import classes_in_words, unseen_classes

LETTERS = tuple("abcdefgh")


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (("cat", "dog"), [0, 0, 1], "cat 2, dog 1"),
        (("cat", "dog"), None, "cat, dog"),
        (LETTERS, [*range(8)] * 3, "8 (a, b, c, d, e, ...), 3 training images each"),
        (LETTERS, [0, 0, 1, 2, 3, 4, 5, 6], "8 (a, b, c, d, e, ...), 0 to 2 training images each"),
        (LETTERS, None, "8 (a, b, c, d, e, ...)"),
    ],
)
def test_classes(names, labels, words):
    assert classes_in_words(names, None if labels is None else torch.tensor(labels)) == words


def test_a_class_without_a_training_image_is_told():
    assert unseen_classes(("cat", "dog", "horse"), torch.tensor([3, 1, 0])) == [
        "data: no training image of horse, which the network cannot learn"
    ]
    assert "a, b, c, d, e and 3 more" in unseen_classes(LETTERS, torch.zeros(8))[0]
    assert unseen_classes(("cat",), torch.tensor([1])) == unseen_classes(LETTERS, None) == []
