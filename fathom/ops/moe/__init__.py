"""Mixture of experts: which experts a token takes, and the experts' matmuls. Definitions: reference.py."""

from fathom.ops.moe.experts import routed_experts
from fathom.ops.moe.permute import Dispatch, combine, dispatch
from fathom.ops.moe.reference import routed_experts_reference, select_experts_reference
from fathom.ops.moe.routing import route, select_experts

__all__ = [
    "Dispatch",
    "combine",
    "dispatch",
    "route",
    "routed_experts",
    "routed_experts_reference",
    "select_experts",
    "select_experts_reference",
]
