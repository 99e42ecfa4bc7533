"""In what order a pipeline stage computes its micro-batches: plain lists that a test can check.

1f1b         stage 0   F0 F1 F2 B0 F3 B1 B2 B3           a stage keeps at most (stages - its number) micro-batches
             stage 1      F0 F1 B0 F2 B1 F3 B2 B3
             stage 2         F0 B0 F1 B1 F2 B2 F3 B3

zero_bubble  B makes only the gradient that the stage before waits for; W, that of the weights, waits until a stage
             keeps as many micro-batches as there are stages: what late stages put off lies behind their last B,
             when early ones still work (ZB-H1 of Zero Bubble Pipeline Parallelism, arXiv 2401.10241)
             stage 0   F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3
             stage 2         F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
"""

from typing import Literal

from motley.parallel.layout import Schedule

Action = Literal["F", "B", "W"]


def order(schedule: Schedule, stage: int, stages: int, count: int) -> list[tuple[Action, int]]:
    """What a stage does with `count` micro-batches, in order."""
    behind = stages - 1 - stage
    todo: list[tuple[Action, int]] = []
    ran = weighed = 0  # forward passes; gradients of weights
    for micro in range(count):
        while ran < count and ran - micro <= behind:
            if schedule == "zero_bubble" and stages > 1 and ran - weighed == stages:
                todo.append(("W", weighed))
                weighed += 1
            todo.append(("F", ran))
            ran += 1
        todo.append(("B", micro))
        if schedule == "zero_bubble" and stages > 1 and ran == count:
            todo.append(("W", weighed))
            weighed += 1
    for micro in range(weighed, count if schedule == "zero_bubble" and stages > 1 else 0):
        todo.append(("W", micro))
    return todo
