"""Names of a model's routers, as the pages show them."""

from fathom.model.config import ModelConfig


def router_names(config: ModelConfig) -> list[str]:
    """In the order of `Model.routers`: MoE layers by their index in the model, then the MTP modules."""
    layers = [f"layer {layer}" for layer in range(config.first_k_dense_replace, config.num_hidden_layers)]
    return layers + [f"MTP module {k + 1}" for k in range(config.num_nextn_predict_layers)]
