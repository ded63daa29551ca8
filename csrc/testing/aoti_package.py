"""Compiles the operators ahead of time into a package that aoti_test.cpp runs without Python.

python csrc/testing/aoti_package.py OUTPUT.pt2

Exits with 77, which ctest takes for skipped, where the Python package is not installed.
"""

import sys

import torch

try:
    import lambda_return_ext as lr
    from lambda_return_ext.categorical import Bins, compute_categorical_value_loss
except ImportError as error:
    print(f"skipped: the Python package is not installed ({error})")
    sys.exit(77)


class Model(torch.nn.Module):
    """Returns, padded and packed, advantages, and the losses."""

    def forward(
        self,
        values: torch.Tensor,
        rewards: torch.Tensor,
        mask: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lam: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Values [B, T], rewards [B], mask [B, T], cu_seqlens [B + 1] of the same tokens, packed, and lambdas [B]."""
        returns = lr.compute_lambda_return(values, rewards, mask, 1.0, 0.5)
        loss = lr.compute_lambda_value_loss(values, rewards, mask, mask, 1.0, 0.5)
        packed = lr.lambda_return_varlen(values.flatten(), rewards, cu_seqlens, mask.flatten(), 1.0, 0.5)
        huber, statistics = lr.compute_lambda_value_loss(
            values, rewards, mask, mask, 1.0, lam, loss="huber", reduction="sum", return_statistics=True
        )
        both = lr.returns_and_advantages(values, rewards, mask, 1.0, lam, 1.0, rewards=torch.full_like(values, 0.25))
        logits = torch.stack([-values, values], -1)  # of two bins, 0 and 1: of value sigmoid(2 values)
        categorical = compute_categorical_value_loss(logits, rewards, mask, mask, 1.0, 1.0, bins=Bins(target="two_hot"))
        return returns, loss, packed, huber, categorical, statistics, *both


if __name__ == "__main__":
    B, T = torch.export.Dim("B", max=1024), torch.export.Dim("T", max=1 << 20)
    inputs = torch.rand(3, 8), torch.rand(3), torch.ones(3, 8, dtype=torch.uint8), torch.tensor([0, 8, 16, 24])
    shapes = {0: B, 1: T}, {0: B}, {0: B, 1: T}, {0: B + 1}, {0: B}
    program = torch.export.export(Model(), (*inputs, torch.rand(3)), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
