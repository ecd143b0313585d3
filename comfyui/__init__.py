"""The nodes of KV Inversion; link or copy this folder into ComfyUI's custom_nodes."""

from kvinv_pl.app.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
