"""What the demo shows in the terminal besides progress bars."""

from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from motley.data.tasks import family_named
from motley.demo.plan import DemoPlan
from motley.plan.network.flops import active_parameters, parameters
from motley.progress import in_words

WORTH_SAYING = 0.1  # a change of steps beyond this share


def welcome(machine: str, plan: DemoPlan, seconds: float, resumed: bool) -> RenderableType:
    """The machine, what will be trained on it, and how long each part should take."""
    shape = plan.shape(plan.vocab_size)
    lines = [
        machine,
        f"Model `{plan.size}`: DeepSeek-V3's architecture, {parameters(shape) / 1e6:.1f} M parameters, "
        f"{active_parameters(shape) / 1e6:.1f} M active for each token.",
        f"It will read {plan.pretrain_tokens / 1e6:.2f} M tokens of text, then learn from "
        f"{plan.finetune_tokens / 1e6:.2f} M tokens of {plan.problems:,} problems with thinking: "
        f"{'; '.join(skill(plan))}.",
        *([f"Where so much was tried, {plan.skill.accuracy:.0%} of fresh problems were answered right."]
          if plan.enough_minutes is None and plan.skill.accuracy is not None else []),
        f"It should take {in_words(seconds)}.",
    ]  # fmt: skip
    title = "motley demo (going on where it stopped)" if resumed else "motley demo"
    return Panel(Group(*lines), title=title, title_align="left")


def skill(plan: DemoPlan) -> list[str]:
    """What is learned: each kind of problem and how difficult it gets, in words."""
    families = [family_named(name) for name in plan.families]
    return [f"{family.title} ({family.difficulty})" for family in families]


def replanned(before: DemoPlan, now: DemoPlan, stage: str, left: float) -> str | None:
    """What the plan, made again before a training stage, changes, if that is worth a line."""
    name = "pretrain" if stage == "pretrain" else "finetune"
    steps, planned = getattr(now, name).steps, getattr(before, name).steps
    changes = []
    if abs(steps / planned - 1) > WORTH_SAYING:
        changes.append(f"{steps} steps instead of {planned}")
    if now.level != before.level:
        changes.append(f"other problems: {'; '.join(skill(now))}")
    if not changes:
        return None
    return f"{in_words(max(0.0, left))} of the promised time are left, so {' and '.join(changes)}"


def stage_line(stage: dict[str, Any], remembered: bool = False) -> str:
    """One line as a stage begins, or is found complete."""
    if remembered:
        return f"[green]✓[/] {stage['title']} (done before, {in_words(stage['seconds'])})"
    seconds = stage.get("planned_seconds", stage["predicted_seconds"])
    return f"[bold]▸ {stage['title']}[/] (about {in_words(seconds)})"


def times_table(stages: list[dict[str, Any]]) -> Table:
    """Predicted and actual time of each stage and of the whole."""
    table = Table(title="Time", title_justify="left")
    table.add_column("stage")
    for name in ("predicted", "actual"):
        table.add_column(name, justify="right")
    for stage in stages:
        table.add_row(stage["title"], in_words(stage["predicted_seconds"]), in_words(stage["seconds"]))
    table.add_section()
    predicted, actual = (sum(stage[key] for stage in stages) for key in ("predicted_seconds", "seconds"))
    table.add_row("[bold]all", f"[bold]{in_words(predicted)}", f"[bold]{in_words(actual)}")
    return table


def outcome(facts: dict[str, Any]) -> RenderableType:
    """What came of it: measured answers, the promise about time held against the clock, where everything lies."""
    problems = facts["problems"]
    off = facts["seconds"] / facts["predicted_seconds"] - 1
    lines = [
        f"[bold]{problems['accuracy']:.1%}[/] of {problems['count']} fresh problems answered right "
        f"(standard error {problems['standard_error']:.1%}); "
        f"text takes {facts['text']['bits_per_byte']:.2f} bits per byte.",
        f"Predicted {in_words(facts['predicted_seconds'])}, took [bold]{in_words(facts['seconds'])}[/] ({off:+.0%}).",
        f"Report: {facts['report']}",
        f"Model for other tools: {facts['model']}",
    ]
    return Panel(Group(*lines), title="done", title_align="left")
