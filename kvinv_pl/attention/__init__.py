"""CP-attn. Exports what authors of variants import; other code imports from the modules."""

from kvinv_pl.attention.cp_attention import CPAttention
from kvinv_pl.attention.processor import Sdpa
from kvinv_pl.attention.registry import resolve
from kvinv_pl.attention.sites import Selection, Site, select, self_attentions

__all__ = ["CPAttention", "Sdpa", "Selection", "Site", "resolve", "select", "self_attentions"]
