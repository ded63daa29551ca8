"""The functions of :mod:`lambda_return_ext.functional` as modules that carry gamma and lam."""

from torch import Tensor, nn

from . import functional
from ._arguments import check_unit_interval


class _Discounted(nn.Module):
    def __init__(self, gamma: float = 1.0, lam: float = 0.95):
        super().__init__()
        self.gamma = check_unit_interval("gamma", gamma)
        self.lam = check_unit_interval("lam", lam)

    def extra_repr(self) -> str:
        """Show gamma and lam."""
        return f"gamma={self.gamma}, lam={self.lam}"


class LambdaReturn(_Discounted):
    """:func:`~lambda_return_ext.compute_lambda_return` with fixed ``gamma`` and ``lam``."""

    def forward(self, values: Tensor, terminal_rewards: Tensor, loss_mask: Tensor) -> Tensor:
        """Return the targets [B, T] of ``values`` [B, T]."""
        return functional.compute_lambda_return(values, terminal_rewards, loss_mask, self.gamma, self.lam)


class LambdaValueLoss(_Discounted):
    """:func:`~lambda_return_ext.compute_lambda_value_loss` with fixed ``gamma`` and ``lam``."""

    def forward(
        self, value_logits: Tensor, terminal_rewards: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> Tensor:
        """Return the 0-dim loss of ``value_logits`` [B, T] or [B, T, 1]."""
        return functional.compute_lambda_value_loss(
            value_logits, terminal_rewards, attention_mask, loss_mask, self.gamma, self.lam
        )
