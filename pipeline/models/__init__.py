"""Networks: the backbone that takes a compression, heads, the momentum encoder."""
