"""Fused operations with their plain references: `from igate_edge.kernels.gated_select import gated_select`.

Training: gated_select. Deploy, CUDA C++ in cuda/: grouped_conv (igemm_s8_*), merge (merge_s8), image (preprocess_s8,
argmax_, depth_ and normals_upsample), each with its plan (what the host prepares) beside its definition in numpy.
emulator/ runs those sources on a CPU, below a whole CUDA driver if need be. build compiles them ahead of time; device
and launcher load and start them. plugin is how TensorRT starts them (C++ in plugin/, built by build_plugin where it
runs; plugin_choice says for which layers). Nothing is re-exported here: importing this package must load no torch.
"""
