"""`--rm-type f1`: how many words of the answer and the label agree (SQuAD, arXiv:1606.05250; yes/no as in HotpotQA)."""

import re
import string
from collections import Counter

CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(s: str) -> str:
    """Lower case, without punctuation and articles, words separated by one space."""
    return " ".join(_ARTICLES.sub(" ", s.lower().translate(_PUNCTUATION)).split())


def f1_score(prediction: str | None, ground_truth: str) -> tuple[float, float, float]:
    """F1, precision and recall of the words; all 0 when nothing agrees.

    When either side is `yes`, `no` or `noanswer` the other must be the same.
    """
    nothing = (0.0, 0.0, 0.0)
    if prediction is None:
        return nothing
    given, truth = normalize_answer(prediction), normalize_answer(ground_truth)
    if given != truth and not CLOSED_ANSWERS.isdisjoint({given, truth}):
        return nothing
    given_words, truth_words = given.split(), truth.split()
    num_same = sum((Counter(given_words) & Counter(truth_words)).values())
    if num_same == 0:
        return nothing
    precision, recall = num_same / len(given_words), num_same / len(truth_words)
    return 2 * precision * recall / (precision + recall), precision, recall
