"""A dynamically quantised TFLite file: float activations, int8 weights, made with the exporter's own quantiser."""

from __future__ import annotations

from pathlib import Path

from ai_edge_quantizer import qtyping, quantizer, recipe_manager


def write_dynamic(source: Path, target: Path) -> None:
    """Quantise the float TFLite file ``source`` dynamically."""
    recipe = recipe_manager.RecipeManager()
    recipe.add_dynamic_config(".*", qtyping.TFLOperationName.ALL_SUPPORTED, 8)
    made = quantizer.Quantizer(str(source), recipe.get_quantization_recipe()).quantize().quantized_model
    target.write_bytes(bytes(made))
