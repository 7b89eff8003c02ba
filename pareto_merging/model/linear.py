"""nn.Linear whose weight is merged."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pareto_merging.model.convert import register
from pareto_merging.model.layer import ParetoModule, merged_property
from pareto_merging.model.parametrize import parametrize


class ParetoLinear(ParetoModule, nn.Linear):
    """nn.Linear whose weight is W(γ) and whose bias is b0 + Σ_k λ_k τ_k.

    Input ``[*, in]``, output ``[*, out]``. A preference per item wants the items along the first dimension of x.
    """

    weight = merged_property("weight")
    bias = merged_property("bias")

    @classmethod
    def from_linears(
        cls,
        pretrained: nn.Linear,
        finetuned: Sequence[nn.Linear] | Mapping[str, nn.Linear],
        rank: int = 16,
        init_lambda: float = 0.3,
    ) -> "ParetoLinear":
        """Make one layer of its pretrained form and K copies, by task name or not. ``rank`` 0: λ only."""
        model = parametrize(pretrained, finetuned, rank, "all" if rank else "none", init_lambda=init_lambda)
        if not isinstance(model, cls):
            raise ValueError("finetuned: expected at least one copy that differs from pretrained, got none")
        return model

    def forward(self, input: Tensor) -> Tensor:
        return self.pareto_project(input, "weight", self.bias, slice(None), self.pareto_batch_dim)

    def extra_repr(self) -> str:
        parameter = self.pareto_parameter("weight")
        tasks = "folded" if parameter.task_vectors is None else f"tasks={len(parameter.task_vectors)}"
        return f"{super().extra_repr()}, {tasks}" + ("" if parameter.A is None else f", rank={parameter.A.shape[1]}")


def _fits(module: nn.Module, names: Sequence[str]) -> bool:
    # a layer with parameters of its own making, or none where its weight should be (weight_norm), is an unknown module
    return set(names) <= {"weight", "bias"} and "weight" in module._parameters


for kind in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    register(kind, ParetoLinear, _fits)
