"""What the page tells about the model: measured numbers, and plainly what it can and cannot do."""

from typing import Any

from motley.data.tasks import make_problems
from motley.demo.plan import DemoPlan
from motley.demo.show import skill
from motley.plan.network.flops import active_parameters, parameters

PROMPT_SEED = 3  # of the prompts offered; drawn, not picked
PROMPTS_PER_FAMILY = 2


def about(results: dict[str, Any], plan: DemoPlan, data: tuple[str, ...]) -> dict[str, Any]:
    """The content of about.json beside the exported model."""
    problems, text = results["problems"], results["text"]
    source = "the text you gave" if data else "the source of the Python standard library"
    shape = plan.shape(plan.vocab_size)
    families = plan.families
    offered = make_problems(families, PROMPTS_PER_FAMILY * len(families), PROMPT_SEED, evaluation=True)
    return {
        "model": f"motley-{plan.size}",
        "parameters": parameters(shape),
        "active_parameters": active_parameters(shape),
        "context_length": shape.max_position_embeddings,
        "about": [
            f"This model was just trained on this machine, from nothing, in minutes: first on {source}, then on "
            "problems with worked thinking.",
            f"It was trained on the kinds of problem offered here, and no harder ones: {'; '.join(skill(plan))}.",
            f"On {problems['count']} fresh ones it had not seen, {problems['accuracy']:.0%} of its answers were right.",
            "It cannot hold a conversation, knows no facts and follows no other instruction: ask it anything else and "
            "it answers with nonsense, confidently.",
        ],
        "prompts": [{"family": problem.family, "text": problem.question} for problem in offered],
        "accuracy": {name: problems[name] for name in ("accuracy", "standard_error", "count", "families")},
        # as measured: one question at a time, the most probable answer
        "defaults": {"temperature": 0.0, "max_tokens": 400, "thinking": True, "remember": False},
        "bits_per_byte": text["bits_per_byte"],
    }
