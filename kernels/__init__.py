"""Fused operations with their plain references: `from igate_edge.kernels.gated_select import gated_select`.

Nothing is re-exported here: an operation has its file's name, and importing this package must load no torch.
"""
