"""CP-attn. What authors of variants import is here; everybody else names the file that it is in."""

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.processor import Sdpa
from kvinv_pl.attention.registry import resolve
from kvinv_pl.attention.sites import Selection, Site, select, self_attentions

__all__ = ["CPAttention", "Sdpa", "Selection", "Site", "resolve", "select", "self_attentions"]
