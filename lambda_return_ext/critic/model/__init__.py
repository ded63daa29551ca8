"""The value model; what an exported critic is loaded by."""

from lambda_return_ext.critic.model.value_model import ValueModel

__all__ = ["ValueModel"]
