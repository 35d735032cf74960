"""The backends of the ops: chunks of logits in plain torch, and Triton kernels."""
