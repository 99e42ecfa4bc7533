"""The part of the model that one rank computes: some of its layers and, with expert parallelism, of their experts."""

import torch
from torch import Tensor, nn

from motley.model import ModelConfig, Transformer
from motley.model.moe import MoE
from motley.model.rotary import Rotary
from motley.model.where import Where
from motley.parallel.expert.dispatch import ExpertParallel
from motley.parallel.layout import Coordinates


class IdentityBlock(nn.Module):
    """In the place of a layer that another stage computes."""

    def forward(self, x: Tensor, where: Where) -> tuple[Tensor, None]:
        return x, None


def build_stage(config: ModelConfig, coordinates: Coordinates, device: torch.device) -> Transformer:
    """The part of the model that one rank computes, ready on `device` but for its parameters, which are only shapes.

    Modules keep their published names; layers of other stages return their input, stacks of experts hold only its own.
    """
    with torch.device("meta"):
        model = Transformer(config)
    own = coordinates.group.stage_layers(coordinates.stage)
    for layer in range(config.num_hidden_layers):
        if layer not in own:
            model.model.layers[layer] = IdentityBlock()
    if not coordinates.last:
        model.mtp = nn.ModuleList()
        model.model.add_module("norm", nn.Identity())
        del model.lm_head
    if not coordinates.first and not (coordinates.last and (len(model.mtp) or config.tie_word_embeddings)):
        del model.model.embed_tokens
    if coordinates.group.experts:
        held = coordinates.group.expert_range(coordinates.replica, config.n_routed_experts or 0)
        for module in model.modules():
            if isinstance(module, MoE):
                with torch.device("meta"):
                    module.experts = ExpertParallel(
                        len(held), coordinates.group.experts, config.hidden_size, config.moe_intermediate_size
                    )
    for gate in model.gates():
        for name, buffer in gate.named_buffers():
            setattr(gate, name, torch.zeros_like(buffer, device=device))
    model.rotary = Rotary(config).to(device)
    return model
