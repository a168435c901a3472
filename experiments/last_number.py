"""Verifier of experiments/smollm2.sh: the last number of a response is the answer.

Unlike VERIFIER=math, it accepts no expression that equals the answer, so repeating `3 - 2 + 4` of the prompt
earns nothing.
"""

import re


def reward(response, answer):
    """1.0 if the last integer of the text `response` is the integer `answer` (text), else 0.0.

    >>> reward("3 - 2 + 4 = 5", "5"), reward("3 - 2 + 4", "5"), reward("It is -1,024.", "-1024")
    (1.0, 0.0, 1.0)
    """
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", response.replace(",", ""))
    return float(bool(numbers) and numbers[-1] == answer.strip())
